"""Who may import whom, and that schedules need no accelerator stack."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpipe

ROOT = Path(jaxpipe.__file__).parent
MAY_IMPORT = {
    "errors": set(),
    "documents": {"errors"},
    "screen": set(),
    "jax_internals": set(),
    "flax_nnx": {"errors"},
    "reader": set(),
    "schedule": {"documents", "errors"},
    "plan": {"documents", "errors", "schedule"},
    "runtime": {"errors", "jax_internals", "schedule", "models"},
    "models": {"documents", "errors", "jax_internals", "flax_nnx"},
    "nn": {"errors", "jax_internals", "flax_nnx", "schedule", "plan", "runtime"},
    "data": {"documents", "errors"},
    "train": {
        "data",
        "documents",
        "errors",
        "flax_nnx",
        "jax_internals",
        "models",
        "nn",
        "plan",
        "reader",
        "runtime",
        "schedule",
        "screen",
    },
    "infer": {
        "documents",
        "errors",
        "jax_internals",
        "flax_nnx",
        "schedule",
        "plan",
        "runtime",
        "models",
        "nn",
        "train",
    },
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in MAY_IMPORT)


PROJECT = sorted(
    path
    for folder in (ROOT, *(ROOT.parent / name for name in ("tests", "scripts", "examples")))
    for path in folder.rglob("*.py")
)
PRIVATE = re.compile(r"jax\.(_src|core|extend|interpreters)\b|jaxlib\b")


def modules_of(path: Path) -> set[str]:
    """What a file imports, anywhere in it, by full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """The parts of jaxpipe that a file imports."""
    return {name.split(".")[1] for name in modules_of(path) if name.startswith("jaxpipe.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) <= MAY_IMPORT[part] | {part}


def test_private_names_of_jax_are_in_one_module():
    using = {path.name for path in PROJECT if any(map(PRIVATE.match, modules_of(path)))}
    assert using == {"jax_internals.py"}


def test_nnx_is_imported_in_one_module():
    """Which says in one line where it does not load, see `test_versions`."""
    using = {path.name for path in FILES if any(re.match(r"flax\.nnx\b", name) for name in modules_of(path))}
    assert using == {"flax_nnx.py"}


def test_schedules_and_plans_load_neither_jax_nor_numpy():
    code = (
        "import sys, jaxpipe.schedule as s; s.lower(s.build('1f1b', devices=2, microbatches=2)); "
        "from jaxpipe.plan import explain, find_device, report; find_device('h100'); "
        "print([m for m in ('jax', 'jaxlib', 'numpy', 'flax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
