"""The quickstart's own program, compiled but not run."""

from pathlib import Path

import jax
from hlo import hlo_text, loop_bodies

from jaxpipe.train import load
from jaxpipe.train.assemble import assemble

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"


def test_the_quickstart_step_is_one_loop_per_phase_with_hops_in_it():
    run = assemble(load(CONFIG, []))
    pipe, batch = run.pipe, run.put(run.train, 0)
    assert pipe.mesh.shape["pipe"] == 4 and pipe.schedule.repeats == 2
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    placed = jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), params, pipe.layout.shardings(params)
    )
    text = hlo_text(jax.jit(pipe.value_and_grad).lower(placed, batch).compile())
    counts = sorted(sum(" collective-permute" in line for line in body) for body in loop_bodies(text))
    assert counts == sorted(phase.forward + phase.backward for phase in pipe.table.phases) == [1, 1, 2]
    million = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    assert 1 <= million <= 3
