"""Who may import whom, and that schedules need no accelerator stack."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import jaxpipe

ROOT = Path(jaxpipe.__file__).parent
LAYERS = (
    "errors screen reader jax_internals",
    "documents flax_nnx terminal",
    "schedule ops",
    "plan runtime",
    "nn",
    "models",
    "config",
    "hosts data",
    "checkpoint",
    "measure",
    "train infer",
    "serve",
    "cli",
)
"""What is in one line may import what is in the lines above it."""
ALONE = {"schedule": {"documents", "errors"}, "plan": {"errors", "schedule"}}
"""What may import these and no more: they load without jax."""
PARTS = {part: number for number, line in enumerate(LAYERS) for part in line.split()}
MOST, LARGER = 14, {"plan"}
"""Files of a folder, and those that may have more."""
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in PARTS)
FOLDERS = sorted({path.parent for path in FILES} - {ROOT})


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
    below = ALONE.get(part, {other for other, number in PARTS.items() if number < PARTS[part]})
    assert imported(path) - {"__version__"} <= below | {part}


FOLDERS_OF_RUNTIME = ("layout", "stage", "loop", "measure", "layer")
"""Each may import those before it."""


@pytest.mark.parametrize("folder", FOLDERS_OF_RUNTIME)
def test_the_folders_of_runtime_go_down_too(folder):
    found = {
        name.split(".")[2]
        for path in (ROOT / "runtime" / folder).glob("*.py")
        for name in modules_of(path)
        if name.startswith("jaxpipe.runtime.")
    }
    above = set(FOLDERS_OF_RUNTIME[FOLDERS_OF_RUNTIME.index(folder) + 1 :])
    assert not found & (above | {"pipeline", "sequential"})


def loaded(tree: ast.AST) -> Iterator[ast.ImportFrom | ast.Import]:
    """The imports that happen when a module is loaded or its functions run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield node
        yield from loaded(node)


def test_no_import_goes_in_a_circle():
    """Not within functions either."""
    modules = {".".join(("jaxpipe", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = graph[name] = set()
        for node in loaded(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found |= {full if full in modules else node.module or ""} & modules.keys() - {name}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_is_small_and_its_map_names_every_file(folder):
    """So that who looks for something finds the file."""
    names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    assert len(names) <= MOST or folder.name in LARGER
    page = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []


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
