"""Reference models in Flax NNX, and weights of others.

    gpt          the decoder, dense or with mixtures of experts (`moe`); `gpt_config` its sizes
    encdec       an encoder-decoder in the form of T5; `encdec_config`, `relative` its positions
    layers       what both are made of; `fields` the rules of their configs
    build        a configuration becomes the model of a pipeline: `gpt_model`, `encdec_model`
    attention    the old place of `jaxpipe.ops.attention.attend`
    hf/          weights of Hugging Face's format, in and out

Read `gpt` first.
"""
