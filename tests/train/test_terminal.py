"""What a run shows, on a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from jaxpipe.terminal import Lines, Live, terminal_report

VALUES = {"loss": 2.5, "tokens_per_s": 12345.6, "step_time_s": 2.0}


def test_a_terminal_gets_a_live_line_below_the_notes():
    out = io.StringIO()
    live = Live(Console(file=out, force_terminal=True, width=200))
    live.note("[model] as typed")
    live.progress(5, 20, VALUES)
    live.note("validation")
    live.progress(6, 20, VALUES)
    live.close()
    text = out.getvalue()
    assert text.startswith("[model] as typed\n")
    assert "6/20" in text
    assert "loss 2.500  12,346 tokens/s  2000 ms/step  ETA 0:28" in text
    assert "\x1b[2K" in text, "the line before is wiped, not repeated"
    assert text.index("5/20") < text.index("validation") < text.index("6/20")


@pytest.mark.parametrize(("steps", "eta"), [(1, "0:00"), (40, "1:18"), (4000, "2:13:18")])
def test_time_left_reads_as_a_clock(steps, eta):
    out = io.StringIO()
    Lines(out).progress(1, steps, VALUES)
    assert out.getvalue().endswith(f"  ETA {eta}\n")


def test_no_terminal_means_plain_lines(capsys):
    report = terminal_report()
    assert isinstance(report, Lines)
    report.note("plain")
    assert capsys.readouterr().out == "plain\n"
