"""The default optimizer. Any other optax transformation can take its place from Python, see `jaxpipe.train.loop`."""

import jax
import optax

from jaxpipe.config.sections import OptimConfig


def learning_rate(config: OptimConfig, *, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine that reaches `final_learning_rate` at the last of `steps` steps.

    The first step already moves the weights: it takes ``1/(warmup_steps+1)`` of the highest rate.

    Example:
        >>> rate = learning_rate(OptimConfig(learning_rate=1.0, final_learning_rate=0.0, warmup_steps=3), steps=11)
        >>> [round(float(rate(step)), 2) for step in (0, 1, 3, 7, 11)]
        [0.25, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = config.warmup_steps
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final_learning_rate,
    )


def adamw(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW; only arrays with two or more dims decay.

    The transformation is for logical layers: wrap it with `Pipeline.optimizer`, whose parameters have leading device
    dims of their own.

    Source:
        Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate(config, steps=steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(params):
    """True for every leaf that weight decay applies to."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
