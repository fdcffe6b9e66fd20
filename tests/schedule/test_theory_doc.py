"""The worked example of docs/theory.md: its numbers are those that the simulator computes."""

import doctest
from pathlib import Path

THEORY = Path(__file__).parents[2] / "docs" / "theory.md"


def test_every_example_of_the_theory_page_runs():
    failed, tried = doctest.testfile(str(THEORY), module_relative=False)
    assert tried >= 15
    assert failed == 0
