"""What becomes of a step's numbers."""

import io
import json
import math
import time

import pytest

from jaxpipe.terminal import Lines, Silent
from jaxpipe.train.health import NonFiniteError
from jaxpipe.train.report.metrics import MetricsLog
from jaxpipe.train.track import Track


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    yield log
    log.close()


def good(step):
    return {"loss": 5.0 - step / 10, "grad_norm": 1.0, "lr": 1e-3}


def test_lines_come_at_the_first_every_nth_and_the_last_step(log, tmp_path):
    track = Track(log, Silent(), steps=7, tokens_per_step=100, log_every=3)
    for step in range(1, 8):
        track.settle(step, good(step))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    assert set(lines[0]) == {"step", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s"}
    assert lines[1]["loss"] == good(3)["loss"]
    assert math.isclose(lines[1]["step_time_s"] * lines[1]["tokens_per_s"], 100)
    assert lines == log.lines


def test_the_measured_bubble_is_what_the_work_leaves_of_the_step(log):
    track = Track(log, Silent(), steps=2, tokens_per_step=100, log_every=1, busy_s=0.02)
    for step in (1, 2):
        time.sleep(0.03)
        track.settle(step, good(step))
    assert [line["bubble"] for line in log.lines] == [1 - 0.02 / line["step_time_s"] for line in log.lines]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_with_the_last_good_ones(log, tmp_path, name, value):
    track = Track(log, Silent(), steps=7, tokens_per_step=100, log_every=1)
    track.settle(1, good(1))
    with pytest.raises(
        NonFiniteError, match=rf"^{name} is {value} at step 2; last good: step 1, loss 4.9, grad_norm 1"
    ):
        track.settle(2, {**good(2), name: value})
    assert track.last["step"] == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_step_before_the_first_is_not_made_up(log):
    track = Track(log, Silent(), steps=7, tokens_per_step=100, log_every=1)
    with pytest.raises(NonFiniteError, match="loss is nan at step 1; no step before it was good"):
        track.settle(1, {**good(1), "loss": math.nan})


def test_a_validation_loss_that_is_not_finite_stops(log):
    track = Track(log, Silent(), steps=7, tokens_per_step=100, log_every=1)
    track.validate(0, lambda: 5.5)
    with pytest.raises(NonFiniteError, match="validation loss is inf at step 3"):
        track.validate(3, lambda: math.inf)
    assert log.lines == [{"step": 0, "val_loss": 5.5}]


def test_plain_lines_say_where_the_run_is(log):
    out = io.StringIO()
    track = Track(log, Lines(out), steps=50, tokens_per_step=100, log_every=1)
    track.validate(0, lambda: 5.5)
    track.settle(1, good(1))
    first, second = out.getvalue().splitlines()
    assert first == "step  0/50  validation loss 5.500"
    assert second.startswith("step  1/50  loss 4.900  ")
    assert all(word in second for word in ("tokens/s", "ms/step", "ETA 0:0"))
