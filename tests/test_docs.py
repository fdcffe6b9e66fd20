"""The pages of docs and the docstrings: their examples run, and users get the messages that they show."""

import doctest
import importlib
import re
import runpy
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxpipe.cli.main import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ("theory.md", 15),
    ("wrap-your-model.md", 40),
    ("models.md", 60),
    ("parallelism.md", 20),
    ("choose-a-schedule.md", 40),
    ("performance.md", 4),
    ("gpus.md", 6),
    ("planner.md", 4),
    ("generation.md", 14),
]
CHOOSE = (DOCS / "choose-a-schedule.md").read_text()
DRAWN = re.findall(r"^jaxpipe (schedule .*--out) docs/(images/\S+)$", CHOOSE, flags=re.M)


@pytest.mark.parametrize(("page", "examples"), PAGES)
def test_every_example_of_the_page_runs(page, examples):
    failed, tried = doctest.testfile(str(DOCS / page), module_relative=False)
    assert tried >= examples
    assert failed == 0


SOURCES = [path.relative_to(ROOT) for path in sorted((ROOT / "jaxpipe").rglob("*.py")) if ">>> " in path.read_text()]
IMPORTED = {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "nn": linen}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_example_of_the_docstrings_runs(source):
    module = importlib.import_module(".".join(source.with_suffix("").parts))
    failed, tried = doctest.testmod(module, extraglobs=IMPORTED)
    assert tried and failed == 0


def test_every_picture_has_its_command():
    assert {name for _, name in DRAWN} == set(re.findall(r"!\[.*\]\((.*)\)", CHOOSE))


@pytest.mark.parametrize(("command", "name"), DRAWN)
def test_a_picture_is_what_its_command_draws(command, name, tmp_path):
    drawn = tmp_path / "drawn.svg"
    assert main([*shlex.split(command), str(drawn)]) == 0
    assert drawn.read_text() == (DOCS / name).read_text()


def test_the_picture_of_the_folders_is_what_the_imports_are():
    architecture = runpy.run_path(str(ROOT / "scripts" / "architecture.py"))
    assert (DOCS / "images" / "architecture.svg").read_text() == architecture["draw"](architecture["imports"]())


def test_the_page_on_how_it_is_built_names_files_that_are_there():
    page = (DOCS / "architecture.md").read_text()
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md))`", page):
        assert any((ROOT / folder / name).exists() for folder in ("", "jaxpipe", "jaxpipe/runtime")), name
