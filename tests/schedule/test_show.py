"""Pictures: what they draw, to scale, and that they stand alone."""

import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.schedule import Costs, Schedule, build, lower, show, simulate
from jaxpipe.schedule.show.timeline import FILL, hop_count

SVG = "{http://www.w3.org/2000/svg}"


def shapes(document: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(document).iter(SVG + tag))


def actions(document: str) -> list[ET.Element]:
    return [box for box in shapes(document, "rect") if box.find(SVG + "title") is not None]


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def test_text_grid_is_this_picture():
    assert str(build("1f1b", devices=3, microbatches=4)) == (
        "1f1b P=3 M=4 V=1 loop\n"
        "0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3\n"
        ".   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3 .\n"
        ".   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   ."
    )


def test_colours_change_nothing_but_colours():
    printed = str(build("zb_h1", devices=2, microbatches=3))
    painted = show.coloured(printed)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == printed
    assert painted.count("\x1b[48;5;") == 2 * 3 * 3


def test_a_tick_table_shows_its_ticks():
    printed = show.table_text(lower(build("1f1b", devices=2, microbatches=2), packing="paired"))
    assert "paired packing: " in printed.splitlines()[0]
    assert "1F0+1B0" in printed


def test_fills_stay_apart_in_grey_print():
    greys = sorted(map(luminance, FILL.values()))
    assert all(b - a > 0.1 for a, b in pairwise(greys))


@pytest.mark.parametrize(("devices", "microbatches"), [(4, 8), (16, 64)])
def test_svg_is_to_scale_and_clips_nothing(devices, microbatches):
    schedule, costs = build("zb_h1", devices=devices, microbatches=microbatches), Costs(1.0, 1.2, 0.8, hop=0.1)
    document = show.svg(schedule, costs)
    timing = simulate(schedule, costs)
    width, height = (float(ET.fromstring(document).attrib[name]) for name in ("width", "height"))
    boxes = actions(document)
    assert len(boxes) == 3 * devices * microbatches
    spans = {box.attrib["fill"]: float(box.attrib["width"]) for box in boxes}
    assert spans[FILL["I"]] / spans[FILL["F"]] == pytest.approx(1.2, abs=0.01)
    assert spans[FILL["W"]] / spans[FILL["F"]] == pytest.approx(0.8, abs=0.01)
    ends = [float(box.attrib["x"]) + float(box.attrib["width"]) for box in boxes]
    starts = [float(box.attrib["x"]) for box in boxes]
    assert (max(ends) - min(starts)) / spans[FILL["F"]] == pytest.approx(timing.makespan, rel=0.01)
    for words in shapes(document, "text"):
        size, content = float(words.attrib["font-size"]), words.text or ""
        room = 0.62 * size * len(content)  # wider than any of the usual sans-serif fonts
        middle = words.attrib.get("text-anchor") == "middle"
        left = float(words.attrib["x"]) - (room / 2 if middle else 0)
        assert left >= 0
        assert left + room <= width
        assert size / 2 <= float(words.attrib["y"]) <= height
        assert size >= 6


def test_svg_says_bubble_peaks_and_hops():
    schedule = build("interleaved_1f1b", devices=4, microbatches=8, repeats=2)
    document = show.svg(schedule, Costs(hop=0.1))
    words = [element.text for element in shapes(document, "text")]
    for peak in ("5.5", "4.5", "3.5", "2.5"):
        assert f"peak {peak} A" in words
    timing = simulate(schedule, Costs(hop=0.1))
    assert any(w and f"bubble {timing.bubble:.1%}" in w and "hop 0.1" in w for w in words)
    assert {"forward", "backward", "idle", "hop of activations", "hop of gradients"} <= set(words)
    slanted = [p for p in shapes(document, "path") if "L" in p.attrib["d"]]
    assert len(slanted) == hop_count(schedule) == 2 * 8 * 7


def test_a_hop_count_is_of_transfers_between_devices():
    assert hop_count(build("1f1b", devices=4, microbatches=8)) == 2 * 8 * 3
    assert hop_count(build("zb_v", devices=4, microbatches=8)) == 2 * 8 * 6  # the turn of the v stays on its device


def test_several_schedules_share_a_time_axis():
    pair = [build(name, devices=4, microbatches=8) for name in ("1f1b", "zb_h1")]
    boxes = actions(show.svg(pair))
    forwards = {box.attrib["width"] for box in boxes if box.attrib["fill"] == FILL["F"]}
    assert len(boxes) == 2 * 32 + 3 * 32
    assert len(forwards) == 1


def test_svg_of_a_tick_table_shows_every_action_once():
    assert len(actions(show.svg(lower(build("interleaved_1f1b", devices=2, microbatches=4, repeats=2))))) == 32


def test_a_name_with_markup_stays_text():
    s = build("1f1b", devices=2, microbatches=2)
    named = Schedule("<b>&</script>", s.devices, s.microbatches, s.repeats, s.placement, s.order)
    assert "<b>" not in show.svg(named)
    ET.fromstring(show.svg(named))
    page = show.html(named)
    assert "<b>" not in page
    assert page.count("</script>") == 2


def test_html_stands_alone_and_holds_every_action():
    pair = [build(name, devices=4, microbatches=8) for name in ("1f1b", "zb_v")]
    page = show.html(pair, Costs(hop=0.1))
    assert "@@" not in page
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [sum(map(len, one["rows"])) for one in data["timelines"]] == [64, 192]
    assert [len(one["hops"]) for one in data["timelines"]] == [48, 96]


def test_trace_has_a_slice_per_action_and_an_arrow_per_hop():
    schedule = build("1f1b", devices=4, microbatches=8)
    events = json.loads(show.trace(schedule, Costs(hop=0.5)))["traceEvents"]
    slices = {event["name"]: event for event in events if event["ph"] == "X"}
    assert len(slices) == 64
    assert slices["1F0"]["ts"] == 1500.0
    assert slices["1F0"]["dur"] == 1000.0
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} >= {"device 0", "device 3"}
    leaves = {event["id"]: event["ts"] for event in events if event["ph"] == "s"}
    arrives = {event["id"]: event["ts"] for event in events if event["ph"] == "f"}
    assert len(leaves) == hop_count(schedule)
    assert leaves.keys() == arrives.keys()
    assert all(arrives[arrow] >= leaves[arrow] + 500 for arrow in leaves)


def test_png_is_a_picture():
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib (extra viz)")
    pixels = image.imread(io.BytesIO(show.png(build("zb_h1", devices=2, microbatches=2), Costs(hop=0.2))))
    assert pixels.shape[0] > 150
    assert len({tuple(pixel) for row in pixels[::4] for pixel in row[::4].tolist()}) > 4


def test_without_matplotlib_png_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpipe\[viz\]'"):
        show.png(build("1f1b", devices=2, microbatches=2))


def test_free_actions_draw_nothing_wrong():
    nothing = Costs(0.0, 0.0, 0.0)
    schedule = build("1f1b", devices=2, microbatches=2)
    for draw in (show.svg, show.html, show.trace):
        assert not re.search(r"\b(nan|inf|infinity)\b", draw(schedule, nothing), re.IGNORECASE)
