"""`jaxpipe checkpoint`: what checkpoints there are, what is in them, whether they are whole, and which may go."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from jaxpipe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from jaxpipe.checkpoint.meta import Meta
    from jaxpipe.checkpoint.store import Store

DONE, DAMAGED = 0, 1

EXAMPLES = """examples:
  jaxpipe checkpoint ls runs/quickstart
  jaxpipe checkpoint show runs/quickstart                      the newest
  jaxpipe checkpoint verify runs/quickstart/checkpoints/400
  jaxpipe checkpoint prune runs/quickstart --keep 1 --keep-best 1

exit codes: 0 done, 1 a checkpoint is damaged, 2 bad arguments or no checkpoint"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "checkpoint",
        help="list, show, verify and delete checkpoints",
        description="Looks after checkpoints. PATH is a run's folder, a folder of checkpoints, or one of them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("ls", _ls, "one line per checkpoint"),
        ("show", _show, "what a checkpoint says about itself"),
        ("verify", _verify, "read every array and compare it with its checksum"),
        ("prune", _prune, "delete all but some"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.add_argument("path", metavar="PATH")
        action.add_argument("--json", action="store_true", help="print the answer as JSON")
        action.set_defaults(run=run)
        if name == "prune":
            action.add_argument("--keep", type=int, metavar="N", help="keep the N newest")
            action.add_argument("--keep-best", type=int, metavar="N", help="and the N with the lowest validation loss")
            action.add_argument("--after", type=int, metavar="STEP", help="instead: delete what is newer than STEP")
            action.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _ls(options: argparse.Namespace) -> int:
    store, rows, damaged = _store(options.path), [], False
    for step in store.steps():
        try:
            rows.append(_row(store, step, store.meta(step)))
        except CheckpointError as error:
            rows.append({"step": step, "damaged": str(error)})
            damaged = True
    if options.json:
        print(json.dumps(rows, indent=1))
        return DAMAGED if damaged else DONE
    print(f"{'step':>10}  {'size':>9}  {'loss':>8}  {'val loss':>8}  {'saved':16}  mesh")
    for row in rows:
        if "damaged" in row:
            print(f"{row['step']:>10}  {row['damaged']}")
            continue
        losses = "  ".join(f"{_loss(row[name]):>8}" for name in ("loss", "val_loss"))
        mesh = " ".join(f"{name}={size}" for name, size in row["mesh"].items() if size > 1 or name == "pipe")
        print(f"{row['step']:>10}  {_size(row['bytes']):>9}  {losses}  {row['saved']:16}  {mesh}, {row['schedule']}")
    return DAMAGED if damaged else DONE


def _show(options: argparse.Namespace) -> int:
    from jaxpipe.checkpoint.resume import find
    from jaxpipe.checkpoint.store import read_meta
    from jaxpipe.config import toml

    path = find(options.path)
    meta = read_meta(path)
    if options.json:
        print(json.dumps(meta.to_json(), indent=1))
        return DONE
    facts = {
        "checkpoint": path,
        "step": meta.step,
        "saved": _when(meta.time),
        "loss": meta.loss,
        "val loss": meta.val_loss,
        "data": f"row {meta.row}, {meta.data}",
        "mesh": ", ".join(f"{name}={size}" for name, size in meta.mesh.items()),
        "schedule": meta.schedule,
        "versions": ", ".join(f"{name} {number}" for name, number in meta.versions.items()),
        "size": _size(meta.bytes),
    }
    for name, value in facts.items():
        print(f"{name:<11}{value}")
    print("\narrays")
    for name, leaf in meta.leaves.items():
        print(f"  {leaf['dtype']}{leaf['shape']}  {name}")
    print(f"\nconfig\n{toml.write(meta.config)}", end="")
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from jaxpipe.checkpoint.store import damage
    from jaxpipe.runtime.layout.mesh import simulate_devices

    store = _store(options.path)
    simulate_devices(1)
    answer: dict[str, list[str]] = {}
    for step in _named(store, options.path):
        path = store.at(step)
        try:
            found = [f"{name} {wrong}" for name, wrong in damage(path) if wrong]
        except CheckpointError as error:
            found = [str(error)]
        answer[str(path)] = found
        if not options.json:
            print(f"{path}  {'whole' if not found else 'DAMAGED'}")
            for text in found:
                print(f"  {text}")
    if options.json:
        print(json.dumps(answer, indent=1))
    return DAMAGED if any(answer.values()) else DONE


def _prune(options: argparse.Namespace) -> int:
    from jaxpipe.train.keeper import stale

    store = _store(options.path)
    steps, damaged = store.steps(), []
    if (options.after is None) == (options.keep is None):
        raise ConfigError("prune needs --keep or --after, one of them; try --keep 3")
    if options.keep is not None and options.keep < 1:
        raise ConfigError(f"--keep {options.keep} must be at least 1; try 1")
    if options.keep is None:
        if options.keep_best is not None:
            raise ConfigError(f"--keep-best {options.keep_best} has no effect with --after; leave it out")
        gone = [step for step in steps if step > options.after]
    else:
        losses = _whole(store, options.keep, options.keep_best or 0)
        gone = stale(losses, options.keep, options.keep_best or 0)
        damaged = [step for step in steps if step not in losses]
    if not options.dry_run:
        for step in gone:
            store.remove(step)
    kept = [step for step in steps if step not in (*gone, *damaged)]
    if options.json:
        print(json.dumps({"deleted": gone, "kept": kept, "damaged": damaged, "dry_run": options.dry_run}))
    else:
        verb = "would delete" if options.dry_run else "deleted"
        print(f"{verb} {', '.join(map(str, gone)) or 'nothing'}; kept {', '.join(map(str, kept)) or 'nothing'}")
        if damaged:
            print(f"damaged, neither counted nor deleted: {', '.join(map(str, damaged))}")
    return DONE


def _whole(store: "Store", keep: int, keep_best: int) -> dict[int, float]:
    """Validation losses of the checkpoints, without those that would be kept and are damaged, and those that say none.

    What stays is read to the end before anything is deleted for it.
    """
    import math

    from jaxpipe.checkpoint.store import damage
    from jaxpipe.runtime.layout.mesh import simulate_devices
    from jaxpipe.train.keeper import stale

    simulate_devices(1)
    losses: dict[int, float] = {}
    for step in store.steps():
        try:
            loss = store.meta(step).val_loss
        except CheckpointError:
            continue
        losses[step] = math.inf if loss is None else loss
    read: set[int] = set()
    while unread := set(losses) - set(stale(losses, keep, keep_best)) - read:
        step = max(unread)
        read.add(step)
        if any(wrong for _, wrong in damage(store.at(step))):
            del losses[step]
    return losses


def _store(path: str) -> "Store":
    from jaxpipe.checkpoint.resume import find
    from jaxpipe.checkpoint.store import Store

    return Store(find(path).parent)


def _named(store: "Store", path: str) -> list[int]:
    """The one checkpoint that the user names, or all of a folder."""
    from etils import epath

    own = epath.Path(path)
    if own.parent.resolve() == store.path.resolve() and own.name.isdecimal():
        return [int(own.name)]
    return store.steps()


def _row(store: "Store", step: int, meta: "Meta") -> dict[str, Any]:
    return {
        "step": step,
        "path": str(store.at(step)),
        "bytes": meta.bytes,
        "loss": meta.loss,
        "val_loss": meta.val_loss,
        "saved": _when(meta.time),
        "mesh": meta.mesh,
        "schedule": meta.schedule,
    }


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
