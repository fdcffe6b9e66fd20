"""A folder of Hugging Face: its config and its safetensors, read where they are indexed, and written shard by shard."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jaxpipe.documents import read_object
from jaxpipe.errors import ConfigError, DataError
from jaxpipe.models.hf.family import Family, ModelConfig
from jaxpipe.models.hf.leaves import Leaf, Shape

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
"""Keys that count layers."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class HFFolder:
    """A folder as `save_pretrained` writes it. Files are mapped, not read.

    Args:
        path: The folder.

    Raises:
        ConfigError: It is not there, or holds no config or no safetensors.
        DataError: A file is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is no folder" if self.path.exists() else "does not exist"
            raise ConfigError(f"{path} {what}; name a folder with {CONFIG} and {WHOLE}")
        if not (self.path / CONFIG).is_file():
            raise ConfigError(f"{path} has no {CONFIG}, so it is no model's folder of Hugging Face")
        self.where = str(self.path / CONFIG)
        self.config: dict[str, Any] = read_object(self.path / CONFIG, DataError)
        self._open: dict[str, Any] = {}
        for name in self._names():
            opened = _safe_open(self.path / name)
            self._open |= dict.fromkeys(opened.keys(), opened)
        self._alias: dict[str, str] = {}
        for key in LAYERS:  # before anything of that length is made
            if isinstance(count := self.config.get(key), int) and count > len(self._open):
                raise DataError(f"{self.where}: {key}={count}, but the folder has {len(self._open)} tensors in all")

    def _names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            files = read_object(self.path / INDEX, DataError).get("weight_map")
            if not isinstance(files, dict) or not all(
                isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
                for name in files.values()
            ):
                raise DataError(f"{self.path / INDEX} has no 'weight_map' from keys to files beside it")
            return sorted(set(files.values()))
        if (self.path / WHOLE).is_file():
            return [WHOLE]
        pickled = sorted(file.name for pattern in PICKLED for file in self.path.glob(pattern))
        if pickled:
            raise ConfigError(
                f"{self.path} has its weights in {pickled[0]}, and unpickling runs code; save them as safetensors: "
                "model.save_pretrained(DIR, safe_serialization=True)"
            )
        raise ConfigError(f"{self.path} has neither {WHOLE} nor {INDEX}")

    def tensor(self, key: str) -> Any:
        """A tensor that is read where it is indexed."""
        key = self._alias.get(key, key)
        return self._open[key].get_slice(key)

    def dtypes_of(self, leaf: Leaf, shape: Shape) -> set[str]:
        """The dtypes of a leaf's tensors."""
        return {DTYPES[self.tensor(key).get_dtype()] for key, _ in leaf.tensors(shape)}

    def check(self, family: Family, cfg: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[Leaf, ...]:
        """The family's table, after a look at all keys and shapes of the folder.

        Args:
            family: Of the folder.
            cfg: Its config.
            shapes: Of our leaves.

        Raises:
            DataError: A tensor is missing, of another shape or type, or none of the model's.
        """
        table, have = family.table(cfg), dict.fromkeys(self._open)
        bare = bool(family.prefix) and not any(key.startswith(family.prefix) for key in have)
        if bare:  # saved from the class without logits
            named = {key if key == "lm_head.weight" else family.prefix + key: key for key in have}
        else:
            named = {key: key for key in have}
        wanted = {}
        for leaf in table:
            wanted |= dict(leaf.tensors(shapes[leaf.path]))
        for key, source in family.fallback.items():
            if key in wanted and key not in named and source in named:
                named[key] = named[source]
        self._alias = named
        for key, shape in wanted.items():
            self._check_tensor(key, shape, named)
        twins = family.twins(cfg)
        for key in named:
            if key in wanted or any(re.fullmatch(pattern, key) for pattern in family.ignored):
                continue
            if key not in twins:
                raise DataError(
                    f"{self.path}: unknown tensor {named[key]!r}, which {family.architecture} does not have"
                )
            self._check_twin(key, twins[key])
        return table

    def _check_tensor(self, key: str, shape: Shape, named: Mapping[str, str]):
        if key not in named:
            raise DataError(f"{self.path} lacks the tensor {key!r}")
        found = self.tensor(key)
        if tuple(found.get_shape()) != shape:
            raise DataError(
                f"{self.path}: {named[key]!r} has shape {list(found.get_shape())} but its config makes it {list(shape)}"
            )
        if found.get_dtype() not in DTYPES:
            raise DataError(
                f"{self.path}: {named[key]!r} has type {found.get_dtype()}, which must be one of {', '.join(DTYPES)}"
            )

    def _check_twin(self, key: str, source: str):
        one, other = self.tensor(key), self.tensor(source)
        same = one.get_shape() == other.get_shape() and one.get_dtype() == other.get_dtype()
        count = one.get_shape()[0] if same and one.get_shape() else 0
        cuts = [slice(row, min(row + 4096, count)) for row in range(0, count, 4096)]
        same = same and all(np.array_equal(one[cut], other[cut]) for cut in cuts)
        if not same:
            raise DataError(f"{self.path}: {key!r} differs from {source!r}, to which {self.where} ties it")


def write_shards(
    path: Path,
    tensors: Sequence[tuple[str, Shape]],
    arrays: Iterable[np.ndarray],
    *,
    dtype: Any,
    max_bytes: int,
) -> None:
    """Writes tensors as safetensors, holding one shard at a time; an index beside them where there are several.

    Args:
        path: The folder.
        tensors: Names and shapes, in the order in which `arrays` come.
        arrays: Their numbers, made when they are asked for.
        dtype: Of all of them.
        max_bytes: Size of a shard; a larger tensor has one of its own.
    """
    from safetensors.numpy import save_file

    sizes = [prod(shape) * np.dtype(dtype).itemsize for _, shape in tensors]
    shards: list[list[str]] = [[]]
    taken = 0
    for (key, _), size in zip(tensors, sizes, strict=True):
        if shards[-1] and taken + size > max_bytes:
            shards.append([])
            taken = 0
        shards[-1].append(key)
        taken += size
    count, numbers, where = len(shards), iter(arrays), {}
    for number, keys in enumerate(shards):
        name = WHOLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        shard = {key: np.ascontiguousarray(next(numbers), dtype) for key in keys}
        save_file(shard, path / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _safe_open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError("safetensors is missing; try pip install 'jaxpipe[hf]'") from error
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, but {INDEX} names it") from error
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is no whole safetensors file: {error}") from error
