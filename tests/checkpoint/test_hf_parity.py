"""Against transformers itself (extra `parity`): logits, gradients, and folders that go there and back."""

import runpy
from pathlib import Path

import jax
import pytest
from hf_models import answer, as_jax, close

from jaxpipe.checkpoint.convert import from_hf, to_hf
from jaxpipe.checkpoint.weights import open_hf

for library in ("torch", "transformers"):
    pytest.importorskip(library, reason=f"compares with transformers: {library} is missing, see the extra parity")

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "hf_fixtures.py"))
pytestmark = pytest.mark.filterwarnings("default")  # torch's own


@pytest.mark.parametrize("name", SCRIPT["CASES"])
def test_a_model_of_transformers_goes_there_and_back(name, tmp_path):
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    theirs, batch = SCRIPT["make"](name), SCRIPT["batch"](name)
    theirs.save_pretrained(tmp_path / "hf")
    expected = SCRIPT["answer"](theirs, batch)
    cfg, weights = open_hf(tmp_path / "hf")
    with jax.default_matmul_precision("highest"):
        found = answer(cfg, weights, as_jax(batch))
    close(found["logits"], expected["logits"], 1e-4)
    close(found["loss"], expected["loss"], 1e-4)
    for key in expected:
        if key.startswith("grad "):
            close(found[key], expected[key], 1e-3)

    from_hf(tmp_path / "hf", tmp_path / "run")
    to_hf(str(tmp_path / "run"), tmp_path / "back", max_shard_bytes=3000)
    again = getattr(transformers, type(theirs).__name__).from_pretrained(
        tmp_path / "back", attn_implementation="eager", dtype="auto"
    )
    state = again.state_dict()
    assert all(torch.equal(weight, state[key]) for key, weight in theirs.state_dict().items())
    assert torch.equal(SCRIPT["answer"](again.eval(), batch)["logits"], expected["logits"])
