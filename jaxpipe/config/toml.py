"""How TOML and `key=value` overrides become typed values, and back.

Nothing here knows which options exist: a *schema* maps each section to its keys and their types, and comes from the
dataclasses of `jaxpipe.config.run`. Everything a user can get wrong in a file or on the command line ends here, as
a `ConfigError` that names the key, the value and the nearest valid choice. TOML is data: reading it runs no code.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from jaxpipe.documents import MAX_BYTES, MAX_DEPTH, check_depth, shown
from jaxpipe.errors import ConfigError
from jaxpipe.models.fields import nearest

Schema = Mapping[str, Mapping[str, Any]]
"""Section name -> key -> type annotation."""


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads a TOML file of sections.

    Raises:
        ConfigError: The file is missing or unreadable, is not TOML, or has a key outside any section.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ConfigError(f"config file {path} is longer than {MAX_BYTES:,} bytes")
        if any(word.count(b".") > MAX_DEPTH for word in re.split(rb"[\s,=\[\]{}]+", text)):
            raise RecursionError  # a key of thousands of parts, for which the parser takes minutes
        tables = tomllib.loads(text.decode("utf-8").replace("\r\n", "\n"))
        check_depth(tables)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"config file {path} does not exist{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"config file {path} is nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, whole numbers of thousands of digits, a name with a null character
        raise ConfigError(f"config file {path} is not TOML: {error}") from error
    for key, value in tables.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {key} must stand in a section; try [train] above it")
    return tables


def write(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The TOML text of sections; keys whose value is None are left out (TOML has no such value).

    Example:
        >>> print(write({"train": {"steps": 3, "out": None, "files": ("a", "b")}}), end="")
        [train]
        steps = 3
        files = [
            "a",
            "b",
        ]
    """
    kept = {
        name: {
            key: list(value) if isinstance(value, tuple) else value for key, value in table.items() if value is not None
        }
        for name, table in tables.items()
    }
    return tomli_w.dumps(kept)


def check(tables: Mapping[str, Mapping[str, Any]], schema: Schema) -> dict[str, dict[str, Any]]:
    """Checks every key against the schema and converts every value to its type.

    Raises:
        ConfigError: An unknown section or key (with the nearest known one), or a value of another type.
    """
    for section, table in tables.items():
        if section not in schema:
            near = difflib.get_close_matches(section, schema, n=1)
            hint = f"did you mean [{near[0]}]?" if near else f"sections are {', '.join(schema)}"
            raise ConfigError(f"unknown section [{section}]; {hint}")
        for key in table:
            find(f"{section}.{key}", schema)
    return {
        section: {key: convert(value, schema[section][key], f"{section}.{key}") for key, value in table.items()}
        for section, table in tables.items()
    }


def override(
    tables: Mapping[str, Mapping[str, Any]], pairs: Sequence[str], schema: Schema
) -> dict[str, dict[str, Any]]:
    """Applies `section.key=value` pairs on top of tables; later pairs win.

    Raises:
        ConfigError: A pair without ``=``, an unknown key, or a value of another type than the key's.

    Example:
        >>> schema = {"train": {"steps": int, "out": str}}
        >>> override({"train": {"steps": 3}}, ["train.steps=5", "train.out=runs/a"], schema)
        {'train': {'steps': 5, 'out': 'runs/a'}}
    """
    out = {section: dict(table) for section, table in tables.items()}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"override {pair!r} must have the form section.key=value; try {name}=…")
        section, key = find(name, schema)
        out.setdefault(section, {})[key] = convert(_literal(text, schema[section][key]), schema[section][key], name)
    return out


def find(name: str, schema: Schema) -> tuple[str, str]:
    """Section and key of ``section.key``.

    Raises:
        ConfigError: There is no such key; the nearest is named, by spelling or by meaning.
    """
    section, dot, key = name.partition(".")
    if not dot and (sections := difflib.get_close_matches(section, schema, n=1)):
        raise ConfigError(f"unknown key {name}; did you mean the section {sections[0]}?")
    if key not in schema.get(section, {}):
        raise ConfigError(f"unknown key {name}{_nearest(name, schema)}")
    return section, key


def fields_of(cls: type) -> dict[str, Any]:
    """The keys and type annotations of a dataclass."""
    return get_type_hints(cls)


def convert(value: Any, kind: Any, name: str) -> Any:
    """One TOML value as the type `kind`; a whole number is accepted where a float is asked for, a list for a tuple.

    Raises:
        ConfigError: The value is of another type, or not one of a `Literal`'s choices.
    """
    options = get_args(kind)
    if get_origin(kind) is Literal:
        if value in options and any(type(value) is type(option) for option in options):
            return value
        near = nearest(value, list(map(str, options)))
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, options))}; try {near!r}")
    if get_origin(kind) in (Union, UnionType):
        return _convert_union(value, _alternatives(kind), name)
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}={value!r} must be a list; try {[value]!r}")
        return tuple(convert(item, options[0], name) for item in value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name}={shown(value)} must be below 2**63; try {2**31}")
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        raise ConfigError(f"{name}={value!r} must be a whole number; try {int(value)}")
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be finite; try 0.0")
    if type(value) is not kind:
        raise ConfigError(
            f"{name}={value!r} must be {_WORDS[kind]}; got {_WORDS.get(type(value), type(value).__name__)}"
        )
    return value


def _convert_union(value: Any, kinds: Sequence[Any], name: str) -> Any:
    """A value of the one kind of `kinds` that it can be: a list goes to the tuple, everything else to the other."""
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    others = [kind for kind in kinds if get_origin(kind) is not tuple]
    if lists and (not others or isinstance(value, (list, tuple))):
        return convert(value, lists[0], name)
    if lists and others == [str] and not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be a string or a list; try {[value]!r}")
    return convert(value, others[0], name)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def _literal(text: str, kind: Any) -> Any:
    """The value that `text` stands for on the command line, where strings need no quotes and lists no brackets."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    kinds = _alternatives(kind)
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    wants_text = any(map(_is_text, kinds))
    if lists and isinstance(value, list):
        return value
    if lists and not wants_text:
        return [item.strip() for item in text.split(",")] if text else []
    if lists and "," in text:
        return _items(text, lists[0], value)
    if lists:
        return value
    return text if wants_text and not isinstance(value, str) else value


def _items(text: str, kind: Any, otherwise: Any) -> Any:
    """The list without brackets that `text` stands for, or `otherwise` where that is none of the kind."""
    (item, *_) = get_args(kind)
    try:
        return [convert(_literal(part.strip(), item), item, "") for part in text.split(",")]
    except ConfigError:
        return otherwise


def _alternatives(kind: Any) -> list[Any]:
    """What a value may be; None cannot be written."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [option for option in options if option is not NoneType]


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(option, str) for option in get_args(kind)))


def _keys(schema: Schema) -> list[str]:
    return [f"{section}.{key}" for section, table in schema.items() for key in table]


MEANT = {
    "optim.clip_norm": "grad_clip gradient_clip max_grad_norm clip_grad_norm clip_gradients gradient_clipping",
    "optim.learning_rate": "lr max_lr peak_lr base_lr",
    "optim.final_learning_rate": "min_lr final_lr end_lr lr_min lr_end",
    "optim.warmup_steps": "warmup warmup_iters lr_warmup",
    "optim.weight_decay": "wd decay",
    "train.steps": "max_steps num_steps total_steps max_iters train_iters epochs num_epochs num_train_epochs",
    "train.batch_size": "global_batch_size per_device_batch_size micro_batch_size batch",
    "train.seq_len": "seq_length sequence_length context_length max_length block_size",
    "train.out": "output_dir out_dir save_dir",
    "schedule.microbatches": "gradient_accumulation_steps grad_accum accumulate num_microbatches",
    "schedule.remat": "gradient_checkpointing activation_checkpointing recompute checkpoint_activations",
    "schedule.repeats": "virtual_stages virtual_pipeline num_chunks interleave",
    "checkpoint.every_steps": "save_steps save_interval save_every",
    "checkpoint.keep": "save_total_limit max_to_keep",
    "data.train": "dataset train_files data_path path",
    "model.dtype": "bf16 fp16 precision compute_dtype mixed_precision",
    "model.num_layers": "n_layer n_layers num_hidden_layers layers",
    "model.num_heads": "n_head n_heads num_attention_heads heads",
    "model.d_model": "n_embd hidden_size hidden_dim width embed_dim",
    "model.d_ff": "intermediate_size ffn_dim mlp_dim ffn_hidden_size",
    "model.num_kv_heads": "num_key_value_heads n_kv_heads num_query_groups",
    "mesh.pipe": "pp pipeline_parallel pipeline_model_parallel_size stages",
    "mesh.tensor": "tp tensor_parallel tensor_model_parallel_size model",
    "mesh.data": "dp data_parallel",
}
"""What other programs call a key."""

LISTED = ("optim.name", "optim.optimizer", "optim.type", "optim.schedule", "optim.scheduler", "optim.lr_schedule")
"""Keys that other programs have and no one key here stands for: the whole section is listed."""


def _nearest(name: str, schema: Schema) -> str:
    """The closest known name as a hint: by the whole name, by meaning, then by its last word (`steps`)."""
    section, _, word = name.rpartition(".")
    names = _keys(schema)
    meant = [key for key, others in MEANT.items() if key in names and word in others.split()]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75) or meant
    if not near and name not in LISTED:
        by_word = {full.rpartition(".")[2]: full for full in names}
        near = [by_word[match] for match in difflib.get_close_matches(word, by_word, n=1, cutoff=0.75)]
    if near:
        return f"; did you mean {near[0]}?"
    if section in schema:
        return f"; [{section}] has {', '.join(schema[section])}"
    return f"; sections are {', '.join(schema)}"
