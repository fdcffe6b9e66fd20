"""The guide to models: its examples run, and users get the messages that it shows."""

import doctest
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "models.md"


def test_every_example_of_the_guide_to_models_runs():
    failed, tried = doctest.testfile(str(GUIDE), module_relative=False)
    assert tried >= 60
    assert failed == 0
