"""The pages of docs: their examples run, and users get the messages that they show."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("page", "examples"), [("theory.md", 15), ("models.md", 60), ("performance.md", 4)])
def test_every_example_of_the_page_runs(page, examples):
    failed, tried = doctest.testfile(str(DOCS / page), module_relative=False)
    assert tried >= examples
    assert failed == 0
