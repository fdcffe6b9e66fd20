"""jaxpipe's processes of `bench_torch.py`: one rank of the pipelined step, or the step on one core."""

import json
import os
import sys
import time

import jax
import numpy as np
import optax
from bench_case import Case
from bench_workers import serve

from jaxpipe.measure.bench import Workload, accumulation_step, in_groups
from jaxpipe.models.gpt import GPTConfig


def main() -> None:
    """Arguments: a JSON object, and the file descriptor to serve on."""
    options = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {options["core"]})
    case = Case(**options["case"])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    if "rank" in options:
        serve(int(sys.argv[2]), lambda: Rank(case, options["port"], options["ranks"], options["rank"]).answers)
    else:
        serve(int(sys.argv[2]), lambda: OneCore(case).answers)


class Rank:
    """One process, with one device, of the pipeline."""

    def __init__(self, case: Case, port: int, ranks: int, rank: int):
        jax.distributed.initialize(f"127.0.0.1:{port}", ranks, rank)
        self.workload, self.ranks = _workload(case), ranks
        self.steps = {}
        self.answers = {"build": self.build, "step": self.step}

    def build(self, name: str, schedule: str, repeats: int, microbatches: int, remat: str) -> dict:
        """Compiles the step, runs it once, and says what it computes."""
        import jaxpipe as jp
        from jaxpipe.schedule import build

        built = build(schedule, devices=self.ranks, microbatches=microbatches, repeats=repeats)
        pipe = jp.Pipeline(self.workload.model(), schedule=built, mesh=jp.make_mesh(pipe=self.ranks), remat=remat)  # pyright: ignore[reportArgumentType]
        # Every process has the whole batch, and `device_put` takes from it what its own devices hold.
        batch = jax.device_put(self.workload.batch(microbatches), pipe.batch_sharding)
        params = pipe.init(jax.random.key(0), batch)
        start = time.perf_counter()
        compiled = jax.jit(pipe.value_and_grad).lower(params, batch).compile()
        compile_s = time.perf_counter() - start
        self.steps[name] = compiled, (params, batch)
        loss, grads = compiled(params, batch)
        return {"loss": float(loss), "grad_norm": float(jax.jit(optax.global_norm)(grads)), "compile_s": compile_s}

    def step(self, name: str) -> dict:
        """Times one step."""
        compiled, arguments = self.steps[name]
        return _time(compiled, *arguments)


class OneCore:
    """The step with no pipeline."""

    def __init__(self, case: Case):
        self.workload = _workload(case)
        self.params, self.compiled = accumulation_step(self.workload)
        self.answers = {"arrays": self.arrays, "build": self.build, "step": self.step}

    def arrays(self, microbatches: int) -> dict:
        """Parameters and batch as ``{name: (dtype, shape, bytes)}``, in which the other side has them."""
        arrays = {
            "/".join(key.key for key in path): leaf
            for path, leaf in jax.tree.leaves_with_path(self.params | self.workload.batch(microbatches))
        }
        return {name: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for name, x in arrays.items()}

    def build(self, microbatches: int) -> dict:
        """Compiles the step, and says what it computes."""
        self.groups = in_groups(self.workload.batch(microbatches), microbatches)
        grads, losses = self.compiled(self.params, self.groups)
        return {"loss": float(losses.mean()), "grad_norm": float(optax.global_norm(grads)) / microbatches}

    def step(self) -> dict:
        """Times one step."""
        return _time(self.compiled, self.params, self.groups)


def _workload(case: Case) -> Workload:
    config = GPTConfig(
        vocab_size=case.vocab_size,
        max_seq_len=case.seq,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
        d_model=case.d_model,
        tied=False,
    )
    return Workload(config, case.seq, case.rows)


def _time(function, *arguments) -> dict:
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*arguments))
    return {"time_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    main()
