"""What a run starts from: nothing, its own newest whole checkpoint, another run's checkpoint, or another run's weights.

And what may differ between the run that saved and the run that goes on: the model may not; all else may and is told.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from etils import epath

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.checkpoint.meta import Meta
from jaxpipe.checkpoint.store import Store, check_leaves, check_sums, read_leaves, read_meta
from jaxpipe.config.run import Config, from_tables, read
from jaxpipe.errors import CheckpointError, ConfigError
from jaxpipe.runtime.layout.state import Chunk, StateLayout
from jaxpipe.terminal import Report

MAY_CHANGE = {"model": {"dropout", "dtype", "attention", "sequence_parallel"}}
"""Keys of sections that decide what the weights are, and yet may change."""
NOT_TOLD = {"checkpoint", "watchdog", "metrics", "sample", "health"}
"""Sections that decide about no number of the training."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        candidates: Checkpoints to try, the best first; empty for a new run.
        weights_only: Take the weights of the first candidate and nothing else.
        own: The candidates are of the run itself, which goes on.
        meta: Description of the newest candidate that has one.
    """

    candidates: tuple[epath.Path, ...] = ()
    weights_only: bool = False
    own: bool = False
    meta: Meta | None = None


def choose(config: Config, store: Store, folder: RunFolder) -> Start:
    """Finds what the config asks for.

    Args:
        config: The run.
        store: Its own checkpoints.
        folder: Its folder.

    Raises:
        CheckpointError: What it names is not there, or the run's own checkpoints would contradict it.
        ConfigError: The folder holds another run that was never saved, or checkpoints have no folder.
    """
    wanted, overwrite = config.checkpoint.resume, config.train.overwrite
    steps = () if overwrite else store.steps()
    own = tuple(store.at(step) for step in reversed(steps))
    if config.checkpoint.enabled and store.path.exists() and not store.path.is_dir():
        raise ConfigError(f"checkpoint.dir={str(store.path)!r} must be a folder, a file is there; try another")
    if config.checkpoint.enabled and str(config.train.steps) in store.foreign():
        raise CheckpointError(
            f"{store.at(config.train.steps)} has the place of the run's last checkpoint and is not jaxpipe's; move it "
            "away, or pass another checkpoint.dir=…"
        )
    if own and (wanted == "auto" or _began_with(wanted, own)):
        return Start(own, own=True)
    if wanted not in ("auto", "never"):
        return _named(wanted, store, steps, overwrite)
    if own:
        raise CheckpointError(
            f"checkpoint.resume={wanted!r} would start over beside the checkpoints in {store.path}; leave it out to go "
            "on from them, pass train.overwrite=true to delete them, or another train.out"
        )
    if folder.config.exists() and not overwrite and not _is_same(config, folder):
        raise ConfigError(
            f"train.out={str(folder.path)!r} already holds a run of another model; to start over pass "
            "train.overwrite=true, to keep it pass another train.out=…"
        )
    if config.checkpoint.init_from:
        return Start((find(config.checkpoint.init_from),), weights_only=True)
    return Start()


def _named(wanted: str, store: Store, steps: Sequence[int], overwrite: bool) -> Start:
    """A start from the checkpoint that the user names, which may be one of the run's own."""
    path = find(wanted)
    own = path.parent.resolve() == store.path.resolve()
    if own and overwrite:
        raise CheckpointError(
            f"checkpoint.resume={wanted!r} is among what train.overwrite=true deletes; leave one of them out"
        )
    newer = [step for step in steps if not own or step > int(path.name)]
    if newer:
        raise CheckpointError(
            f"checkpoint.resume={wanted!r} would go on beside {store.path}/{newer[-1]}; delete what is newer with "
            f"`jaxpipe checkpoint prune {store.path} --after {path.name if own else -1}`, or pass another train.out"
        )
    return Start((path,), own=own)


def _began_with(wanted: str, own: Sequence[epath.Path]) -> bool:
    """Whether the run that saved here was started by this very word, so that the same command goes on with it."""
    for path in own if wanted != "never" else ():
        try:
            return read_meta(path).config.get("checkpoint", {}).get("resume") == wanted
        except CheckpointError:
            continue
    return False


def _is_same(config: Config, folder: RunFolder) -> bool:
    """Whether the run in a folder that has no checkpoint yet is the one that shall start there again."""
    try:
        return from_tables(read(folder.config)).model == config.model
    except ConfigError:
        return False


def check_start(config: Config, start: Start, data: dict[str, Any]) -> Start:
    """Checks the newest candidate that can be read against the run, before anything is written or compiled.

    Returns:
        The start with the description of that candidate.

    Raises:
        CheckpointError: It is of another model or other data, or none can be read.
    """
    first: CheckpointError | None = None
    for path in start.candidates:
        try:
            meta = read_meta(path)
            if not start.weights_only:
                _check_key(meta, path)
        except CheckpointError as error:
            first = first or error
            continue  # told when it is tried
        compare(config, meta, path)
        if not start.weights_only:
            check_data(config, meta, data, path)
        return replace(start, meta=meta)
    if first is not None:
        raise CheckpointError(f"{first}; to start over pass train.overwrite=true") from first
    return start


def _check_key(meta: Meta, path: epath.Path) -> None:
    words = jax.random.key_data(jax.random.key(0)).size
    if len(meta.key) != words:
        raise CheckpointError(f"{path}: its random key has {len(meta.key)} words, but keys have {words} here")


def find(name: str) -> epath.Path:
    """The checkpoint that a user means: the folder of one, a folder of several, or a run's; the newest of several.

    Raises:
        CheckpointError: There is none.
    """
    path = epath.Path(name)
    if not path.exists():
        raise CheckpointError(f"{name} does not exist; name a run's folder or one of its checkpoints")
    for folder in (path, path / "checkpoints"):
        if steps := Store(folder).steps():
            return folder / str(steps[-1])
    read_meta(path)
    return path


def compare(config: Config, meta: Meta, where: Any) -> list[str]:
    """The keys that differ from those of the checkpoint, one line each.

    Raises:
        CheckpointError: One of them makes another model.
    """
    lines = []
    for section, table in asdict(config).items():
        if section in NOT_TOLD:
            continue
        before = meta.config.get(section, {})
        for key, now in table.items():
            now = list(now) if isinstance(now, tuple) else now
            if key not in before or before[key] == now or (section, key) in (("train", "out"), ("train", "overwrite")):
                continue
            if section == "model" and key not in MAY_CHANGE["model"]:
                raise CheckpointError(
                    f"{section}.{key}={now!r} is another model than that of {where}, which has {section}.{key}="
                    f"{before[key]!r}; try {section}.{key}={_toml(before[key])}, or another train.out for a new run"
                )
            lines.append(f"{section}.{key} was {before[key]!r}, is {now!r}")
    return lines


def check_data(config: Config, meta: Meta, data: dict[str, Any], where: Any) -> bool:
    """Whether the run can go on at the checkpoint's place in the data.

    Args:
        config: The run.
        meta: The checkpoint's description.
        data: What the run's data are, as in `Meta.data`.
        where: What messages call the checkpoint.

    Raises:
        CheckpointError: They are others, or in another order, and the config does not allow it.
    """
    changed = [name for name, value in data.items() if name != "val_digest" and meta.data.get(name) != value]
    if not changed:
        return True
    if not config.checkpoint.allow_new_data:
        what = {"digest": "the training data", "seed": "train.seed", "seq_len": "train.seq_len"}
        name = changed[0] if changed[0] in what else "digest"
        raise CheckpointError(
            f"{what[name]} differs from that of {where}: was {meta.data.get(name)}, is {data.get(name)}; bring it "
            "back, or pass checkpoint.allow_new_data=true to go on with the first batch of the new data"
        )
    return False


def restore(start: Start, template: StateLayout, check, report: Report) -> tuple[list, Meta, epath.Path]:
    """Reads the first candidate that is whole into the pipeline's layout, chunk by chunk.

    Args:
        start: From `choose`.
        template: The two layouts of the state.
        check: ``(meta, path)``, called before arrays are read; raises where the checkpoint is for another run.
        report: Is told of candidates that are damaged.

    Returns:
        The flattened state (with ``weights_only`` only the parameters; other entries are None), the description, and
        the candidate that they are from.

    Raises:
        CheckpointError: No candidate can be used.
    """
    chunks = template.chunks_of("params") if start.weights_only else template.chunks
    reasons: list[str] = []

    def damaged(error: CheckpointError) -> None:
        reasons.append(str(error))
        if len(reasons) < len(start.candidates):
            report.note(f"damaged    {error}; going back to {start.candidates[len(reasons)]}")

    for path in start.candidates:
        try:
            meta = read_meta(path)
            if not start.weights_only:
                _check_key(meta, path)
        except CheckpointError as error:
            damaged(error)
            continue
        check(meta, path)
        try:
            check_leaves(path, meta, [leaf for chunk in chunks for leaf in chunk.leaves])
            return _read(path, meta, chunks, len(template.rest)), meta, path
        except CheckpointError as error:
            damaged(error)
    others = f"nor is any of the {len(reasons) - 1} before it whole" if len(reasons) > 1 else "there is no other"
    raise CheckpointError(f"{reasons[0]}; {others}; to start over pass train.overwrite=true")


def _read(path: epath.Path, meta: Meta, chunks: Sequence[Chunk], size: int) -> list:
    flat: list = [None] * size
    for chunk in chunks:
        sums = chunk.scatter(read_leaves(path, chunk.leaves), flat)
        check_sums(path, meta, chunk.leaves, sums)
    return flat


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
