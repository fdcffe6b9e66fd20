"""The shape of every leaf of the canonical tree, from the modules themselves; nothing is computed."""

from typing import Any

import jax

from jaxpipe.flax_nnx import nnx
from jaxpipe.models import encdec, gpt
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf.family import ModelConfig


def leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by path. Leaves of blocks have a row per layer; what is shared is in the embedding only.

    Example:
        >>> shapes = leaf_shapes(gpt.PRESETS["tiny"])
        >>> shapes["embed/table"], shapes["blocks/block/attn/qkv/kernel"], "head/kernel" in shapes
        ((256, 64), (4, 64, 192), False)
    """
    modules: dict[str, Any]
    if isinstance(cfg, GPTConfig):
        shared = {"head/kernel"} if cfg.tied else set()
        modules = {"embed": gpt.Embed, **{f"blocks/{kind}": gpt.BLOCKS[kind] for kind in cfg.kinds}, "head": gpt.Head}
    else:
        shared = set(encdec.shared(cfg))
        blocks = {"blocks/encoder": encdec.EncoderBlock, "blocks/decoder": encdec.DecoderBlock}
        modules = {"embed": encdec.Embed, **blocks, "head": encdec.Head}
    shapes = {}
    for part, module in modules.items():
        rows = (cfg.kinds.count(part.removeprefix("blocks/")),) if part.startswith("blocks/") else ()
        for path, shape in _own(module, cfg).items():
            if f"{part}/{path}" not in shared:
                shapes[f"{part}/{path}"] = (*rows, *shape)
    return shapes


def _own(module: Any, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    made = nnx.eval_shape(lambda: module(cfg, rngs=nnx.Rngs(0)))
    flat = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(made, nnx.Param)))
    return {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in flat}
