"""How long a save stops the training loop, beside how long the step and the writing take.

    python scripts/bench_checkpoint.py                                   a GPT of 20 M parameters on 4 simulated devices
    python scripts/bench_checkpoint.py --config configs/gpt2-124m.toml   a config's own model, mesh and schedule

The stall is what `Keeper.save` takes: on accelerators the way to the canonical layout and the copy to the host, on CPUs
a copy. A copy alone is timed too, into memory that is kept as long as a save needs it: less no save can take.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.meta import Meta
from jaxpipe.checkpoint.store import Store
from jaxpipe.config.run import SCHEMA, Config, from_tables
from jaxpipe.config.sections import CheckpointConfig
from jaxpipe.config.toml import override
from jaxpipe.runtime.layout.state import StateLayout
from jaxpipe.terminal import Silent
from jaxpipe.train import load
from jaxpipe.train.assemble import assemble
from jaxpipe.train.keeper import Keeper
from jaxpipe.train.optim import adamw, learning_rate
from jaxpipe.train.step import init_state, make_train_step

DEFAULT: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 8, "num_heads": 8, "d_model": 448},
    "mesh": {"pipe": 4, "simulate": 4},
    "schedule": {"repeats": 2, "microbatches": 4},
    "train": {"batch_size": 4, "seq_len": 64},
}


def main() -> None:
    """Trains a few steps, saves after each, and prints the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", metavar="CONFIG", help="a training run's config")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value")
    parser.add_argument("--saves", type=int, default=5, metavar="N")
    parser.add_argument("--dir", metavar="PATH", help="where to write; by default a temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.config:
        config = load(options.config, options.set)
    else:
        config = from_tables(override(DEFAULT, options.set, SCHEMA))
    folder = Path(options.dir or tempfile.mkdtemp())
    numbers = measure(config, folder / "checkpoints", options.saves)
    if not options.dir:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps(numbers, indent=1))
        return
    print(f"state      {numbers['bytes'] / 1e6:.1f} MB in {numbers['leaves']} arrays, {numbers['chunks']} chunks")
    print(f"step       {numbers['step_s']:.4f} s without a save")
    print(f"stall      {numbers['stall_s']:.4f} s per save, the first {numbers['first_stall_s']:.4f} s")
    print(f"copy       {numbers['copy_s']:.4f} s for the same bytes from devices to the host, the least possible")
    print(f"writing    {numbers['write_s']:.4f} s in the background")


def measure(config: Config, folder: Path, saves: int) -> dict[str, float]:
    """Medians over some saves, in seconds."""
    run = assemble(config)
    tx, batch = run.pipe.optimizer(adamw(config.optim, steps=100)), run.put(run.train, 0)
    state = init_state(run.pipe, tx, jax.random.key(0), batch)
    rate = learning_rate(config.optim, steps=100)
    step = make_train_step(run.pipe, tx, state, batch, rate, None)
    layout = StateLayout(run.pipe.layout, state, state.params)
    total = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in layout.leaves)

    def describe(step: int, row: int, leaves: dict) -> Meta:
        return Meta(step, row, time.time(), None, None, [0, 0], {}, {}, {}, "", leaves)

    keeper = Keeper(Store(folder), CheckpointConfig(keep=1, keep_best=0), layout, describe, Silent())
    keeper.begin(-1, False, {})
    steps, copies, writes = [], [], []
    for number in range(1, saves + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        kept = [np.array(shard.data) for leaf in jax.tree.leaves(state) for shard in _distinct(leaf)]
        copies.append(time.perf_counter() - start)
        del kept
        keeper.save(state, number, 0)
        start = time.perf_counter()
        keeper.settled()
        writes.append(time.perf_counter() - start)
    stalls = keeper.stall_s
    return {
        "bytes": total,
        "leaves": len(layout.leaves),
        "chunks": len(layout.chunks),
        "step_s": statistics.median(steps),
        "first_stall_s": stalls[0],
        "stall_s": statistics.median(stalls[1:] or stalls),
        "copy_s": statistics.median(copies),
        "write_s": statistics.median(writes),
    }


def _distinct(leaf: jax.Array) -> list:
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


if __name__ == "__main__":
    main()
