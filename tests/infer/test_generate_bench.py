"""`jaxpipe bench --generate` runs, and what it reports adds up."""

import json

import pytest

from jaxpipe.cli.main import main

SMALL = ["model.preset=tiny", "model.num_layers=2", "model.d_model=16", "train.seq_len=16"]


def test_a_small_ring_is_measured(capsys):
    sizes = ["--sequences", "2", "--prompt-len", "4", "--new-tokens", "3", "--rounds", "1"]
    assert main(["bench", "--generate", "--devices", "2", *sizes, "--json", "--set", *SMALL]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["P"] == 2 and sum(row["stages"]) == 2
    assert [row[name]["tokens"] for name in ("ring", "one", "plain", "groups")] == [4] * 4
    assert row["cache_bytes"] == max(row["stages"]) * 2 * 8 * 16 * 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequences", "4"], "--sequences 4 has no effect without --generate"),
        (["--generate", "--trace"], "--trace has no effect with --generate"),
        (["--generate", "--new-tokens", "0"], "--new-tokens 0 must be at least 1"),
        (["--generate", "--new-tokens", "1"], "new_tokens=1 must be at least 2"),
        (["--generate", "--repeats", "1", "2"], "must be one number with --generate"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err
