"""What becomes of every key of a config.json, family by family.

A key is *honoured* (it becomes a field of our config), *refused* (every value but the one that our model computes
with), or *idle*: transformers computes the same logits whatever its value is. Keys that are none of these are refused.
What stands here was found by changing each key that transformers' config classes have, that its models read, or that
published repositories carry, and comparing logits; ``tests/checkpoint/test_hf_keys_parity.py`` does it again where
transformers is installed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """The keys of one family.

    Attributes:
        honoured: Become fields of our config.
        refused: May only have the value that our model computes with.
        idle: Change no logit of transformers'.
        aliases: Other names of honoured keys. Where both are there, they must be equal.
    """

    honoured: frozenset[str]
    refused: frozenset[str]
    idle: frozenset[str]
    aliases: dict[str, str]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ABOUT = _words("""
    architectures transformers_version model_type torch_dtype dtype auto_map name_or_path tokenizer_class prefix
    finetuning_task id2label label2id num_labels problem_type task_specific_params return_dict use_return_dict
    output_hidden_states output_attentions output_past torchscript tf_legacy_loss use_bfloat16 xla_device use_cache
    attn_implementation experts_implementation chunk_size_feed_forward gradient_checkpointing pruned_heads
    initializer_range initializer_factor classifier_dropout hidden_dropout pretraining_tp tie_last_hidden_states
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id eos_token_ids
    is_encoder_decoder is_decoder tie_encoder_decoder cross_attention_hidden_size
""")
"""What the file says about itself, the training, and heads that the model with the logits does not have."""
_DROPOUT = _words(
    "attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout_rate dropout attention_probs_dropout_prob"
)
"""Dropout is the training's own, see ``model.dropout``."""
_GENERATION = _words("""
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty output_scores return_dict_in_generate epsilon_cutoff
    eta_cutoff encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_lookbehind target_lookbehind max_new_tokens
""")
"""Sampling is asked for with each prompt."""
_REPOSITORIES = _words("""
    transformers.js_config unsloth_fixed unsloth_version rope_interleaved is_llama_config use_mrope
    dual_chunk_attention_config max_sequence_length model_max_length tokenizer_model_max_length seq_length max_seq_len
    vocab_size_or_config_json_file n_special predict_special_tokens adapters author created_date license
    is_composition use_flash_attention use_flash_attention_2 use_flash_attn flash_attn use_sdpa use_fused_rope
    use_fused_rms_norm loss_type pad_token eos_token bos_token unk_token base_model processor_class n_ctx
    cache_implementation bos_token_ids pad_token_ids reorder_and_upcast_attn summary_activation summary_first_dropout
    summary_last_dropout summary_proj_to_labels summary_type summary_use_proj
""")
"""What published repositories carry and no code of transformers' reads."""
_EVERYWHERE = _ABOUT | _DROPOUT | _GENERATION | _REPOSITORIES
_ROTARY = _words("rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings")


def _llama(honoured: str = "", refused: str = "", idle: str = "") -> Keys:
    """What Llama's relatives share, and their own."""
    return Keys(
        honoured=_words(f"""
            vocab_size max_position_embeddings num_hidden_layers num_attention_heads num_key_value_heads hidden_size
            head_dim intermediate_size rms_norm_eps hidden_act tie_word_embeddings rope_theta rope_scaling
            rope_parameters original_max_position_embeddings {honoured}
        """),
        refused=_words(f"partial_rotary_factor is_causal per_layer_config layer_types {refused}"),
        idle=_EVERYWHERE | _words(f"n_positions decoder_start_token_id {idle}"),
        aliases={},
    )


KEYS: dict[str, Keys] = {
    "gpt2": Keys(
        honoured=_words("""
            vocab_size n_positions n_layer n_head n_embd n_inner layer_norm_epsilon activation_function
            tie_word_embeddings
        """),
        refused=_words("""
            scale_attn_weights scale_attn_by_inverse_layer_idx add_cross_attention is_causal per_layer_config
        """),
        idle=_EVERYWHERE | _ROTARY | _words("layer_types decoder_start_token_id"),
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    "llama": _llama(honoured="attention_bias mlp_bias", idle="sliding_window use_sliding_window max_window_layers"),
    "mistral": _llama(honoured="sliding_window", idle="attention_bias mlp_bias use_sliding_window max_window_layers"),
    "qwen2": _llama(honoured="sliding_window use_sliding_window max_window_layers", idle="attention_bias mlp_bias"),
    "qwen3": _llama(
        honoured="sliding_window use_sliding_window max_window_layers", refused="attention_bias", idle="mlp_bias"
    ),
    "t5": Keys(
        honoured=_words("""
            vocab_size num_layers num_decoder_layers num_heads d_model d_kv d_ff feed_forward_proj dense_act_fn
            is_gated_act relative_attention_num_buckets relative_attention_max_distance layer_norm_epsilon
            tie_word_embeddings scale_decoder_outputs
        """),
        refused=_words("is_causal per_layer_config decoder_start_token_id"),
        idle=_EVERYWHERE | _ROTARY | _words("layer_types n_positions"),
        aliases={
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        },
    ),
}
"""By model_type."""
