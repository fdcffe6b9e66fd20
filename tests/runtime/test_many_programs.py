"""Programs that wait for each other on CPUs, where devices have few threads.

JAX lets 32 programs wait; with one thread per device, the thread that starts the next holds up the others' collectives
for ever. What JAX's own pool would have on a machine of 2 cores is set here by ``NPROC``.
"""

import os
import subprocess
import sys
from textwrap import dedent

MANY = 40


def run(code: str, threads: int | None) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    env |= {} if threads is None else {"NPROC": str(threads)}
    done = subprocess.run([sys.executable, "-c", dedent(code)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_model_of_many_leaves_is_relaid():
    found = run(
        f"""
        import jax, numpy as np
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
        import jaxpipe as jp
        from jaxpipe.runtime.layout.relayout import Layout
        schedule = jp.schedule.build("1f1b", devices=2, microbatches=2)
        layout = Layout(jp.make_mesh(pipe=2), schedule, ("block",) * 4, (2, 2))
        blocks = {{f"w{{n}}": np.full((4, 512, 512), n, np.float32) for n in range({MANY})}}
        params = layout.from_canonical({{"embed": {{}}, "head": {{}}, "blocks": {{"block": blocks}}}})
        back = layout.to_canonical(layout.from_canonical(layout.to_canonical(params)))
        print(*[int(leaf.min()) for leaf in back["blocks"]["block"].values()])
        """,
        threads=2,
    )
    assert found.split() == sorted(map(str, range(MANY)), key=lambda n: f"w{n}")


def test_a_loop_that_reads_no_result_ends():
    found = run(
        """
        import jax, jax.numpy as jnp
        from functools import partial
        from jax.sharding import PartitionSpec
        import jaxpipe as jp
        jp.simulate_devices(2)
        mesh = jp.make_mesh(pipe=2)

        @jax.jit
        @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("pipe"), out_specs=PartitionSpec("pipe"))
        def step(x):
            return jax.lax.ppermute(jax.lax.psum(x, "pipe") / 2, "pipe", [(0, 1), (1, 0)]) @ jnp.eye(256)

        x = jnp.ones((2, 256, 256))
        for _ in range(300):
            x = step(x)
        print(float(x.sum()))
        """,
        threads=None,
    )
    assert float(found) == 2 * 256 * 256
