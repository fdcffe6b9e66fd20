"""Who may import whom, and that schedules need no accelerator stack."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpipe

ROOT = Path(jaxpipe.__file__).parent
MAY_IMPORT = {
    "errors": set(),
    "schedule": {"errors"},
    "plan": {"errors", "schedule"},
    "runtime": {"errors", "schedule", "models"},
    "models": {"errors"},
    "nn": {"errors", "schedule", "plan", "runtime"},
    "train": {"errors", "schedule", "plan", "runtime", "models", "nn"},
    "infer": {"errors", "schedule", "plan", "runtime", "models", "nn", "train"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in MAY_IMPORT)


def imported(path: Path) -> set[str]:
    """The parts of jaxpipe that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("jaxpipe.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) <= MAY_IMPORT[part] | {part}


def test_schedules_and_plans_load_neither_jax_nor_numpy():
    code = (
        "import sys, jaxpipe.schedule as s; s.lower(s.build('1f1b', devices=2, microbatches=2)); "
        "from jaxpipe.plan import explain, find_device, report; find_device('h100'); "
        "print([m for m in ('jax', 'jaxlib', 'numpy', 'flax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
