"""Versions of JAX and Flax that do not go together: one line for those who need NNX, nothing for the others."""

import ast
import subprocess
import sys
from pathlib import Path

import flax
import jax

ROOT = Path(__file__).parent.parent

BROKEN = """
import importlib.abc, sys

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "flax.nnx":
            raise AttributeError("module 'jax.experimental.hijax' has no attribute 'HiPrimitive'")

sys.meta_path.insert(0, Broken())
"""
"""What flax 0.12.9 does with jax 0.11.2."""

MESSAGE = (
    f"flax.nnx of flax {flax.__version__} does not load with jax {jax.__version__} (module 'jax.experimental.hijax' "
    "has no attribute 'HiPrimitive'); try pip install 'flax>=0.12.10' 'jax<=0.12.0.1'"
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A process in which `flax.nnx` does not load."""
    return subprocess.run([sys.executable, "-c", BROKEN + code], capture_output=True, text=True, cwd=ROOT)


def command(*words: str) -> tuple[int, str]:
    """The exit code of a command in such a process, and what it says on standard error."""
    done = run(f"""
import contextlib, io
from jaxpipe.cli import main
with contextlib.redirect_stderr(io.StringIO()) as error:
    code = main({list(words)})
print("said", repr((code, error.getvalue())))
""")
    return ast.literal_eval(done.stdout.rpartition("said ")[2])


def test_commands_that_need_nnx_say_one_line_and_end_with_2():
    assert command("train", "configs/quickstart.toml") == (2, f"jaxpipe: error: {MESSAGE}\n")


def test_every_name_that_needs_nnx_says_the_same_line_each_time():
    done = run("""
import jaxpipe as jp
from jaxpipe.errors import VersionError
for name in ("Pipelined", "from_nnx", "nnx_model", "vocab_embed", "vocab_head", "nnx_model"):
    try:
        getattr(jp.nn, name)
    except VersionError as error:
        print(error)
""")
    assert done.stdout.splitlines() == [MESSAGE] * 6, done.stderr


def test_models_of_plain_functions_and_of_linen_train_without_nnx():
    done = run("""
sys.path.insert(0, "tests")
import jax, jaxpipe as jp
from flax import linen
jp.simulate_devices(2)
from jaxpipe.nn import linen_model
from jaxpipe.schedule import build

def model():
    return jp.Model(
        jp.Embed(lambda key, mb: {}, lambda p, mb, key: mb["x"]),
        [jp.Block(lambda key, x: jax.numpy.ones(3), lambda p, x, mb, key: x * p[None])] * 2,
        jp.HeadLoss(lambda key, x, mb: {}, lambda p, x, mb, key: (x.sum(), jax.numpy.float32(x.shape[0]))),
    )

batch = {"x": jax.numpy.ones((4, 3))}
pipe = jp.Pipeline(model(), schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(pipe=2))
params = pipe.init(jax.random.key(0), batch)
loss, grads = jax.jit(pipe.value_and_grad)(params, batch)
oracle = jp.sequential(model()).value_and_grad(pipe.to_canonical(params), batch)[0]
print(float(loss), float(oracle), jp.nn.linen.Pipelined.__name__, "flax.nnx" in sys.modules)
""")
    assert done.stdout.split() == ["3.0", "3.0", "Pipelined", "False"], done.stderr


def test_the_planner_answers_without_nnx():
    assert command("plan", "configs/gpt2-124m.toml", "--devices", "8", "--device", "h100") == (0, "")
