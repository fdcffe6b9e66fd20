"""Tables that lower but that the compiled loop has no lane or route for are refused in one line."""

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.runtime.supported import check_supported
from jaxpipe.schedule import build, lower


@pytest.mark.parametrize("name", ["zb_h1", "zb_v", "dualpipe_v"])
def test_split_backwards_and_snakes_are_refused(name):
    with pytest.raises(ScheduleError, match=r"cannot be compiled yet: .*; try") as error:
        check_supported(lower(build(name, devices=2, microbatches=4)))
    assert "\n" not in str(error.value)


def test_forwards_and_backwards_on_the_loop_are_taken():
    for name in ("gpipe", "1f1b", "interleaved_1f1b", "inference"):
        check_supported(lower(build(name, devices=2, microbatches=4)))
