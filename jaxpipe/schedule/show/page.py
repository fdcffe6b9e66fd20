"""An HTML page to look closely: one panel per schedule on a common time axis, hover, zoom. One file, no network."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.show.timeline import FILL, INK, PHASE_NAMES, Drawable, Timeline, hop_count, timelines
from jaxpipe.schedule.show.vector import EDGE, IDLE, legend_entries, legend_note
from jaxpipe.schedule.simulate import Runtime

TEMPLATE = Path(__file__).with_name("page.html")
"""The page without its content; what stands in @@WORD@@ is filled in."""


def html(
    what: "Drawable | Sequence[Drawable]",
    costs: Costs | None = None,
    runtime: Runtime = "async",
) -> str:
    """Timelines as one self-contained HTML page.

    Args:
        what: A schedule, tick table or timeline, or several, which stand side by side.
        costs: Times of the phases, by default 1 each.
        runtime: Of schedules, as in `simulate`.

    Returns:
        The HTML text.
    """
    lines = timelines(what, costs, runtime)
    data = {
        "fill": FILL,
        "ink": INK,
        "names": PHASE_NAMES,
        "idle": IDLE,
        "edge": EDGE,
        "timelines": [_panel(line) for line in lines],
    }
    content = {
        "TITLE": escape(", ".join(dict.fromkeys(line.schedule.name for line in lines))),
        "LEGEND": "".join(_legend_entry(kind, words) for kind, words in legend_entries(lines)),
        "NOTE": escape(legend_note(lines)),
        "TABLE": "".join(_table_row(line) for line in lines),
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for word, filling in content.items():
        page = page.replace(f"@@{word}@@", filling)
    return page


def _panel(line: Timeline) -> dict[str, object]:
    digits = 9
    return {
        "title": line.title,
        "caption": line.caption,
        "length": line.length,
        "repeats": line.schedule.repeats,
        "peaks": [f"{peak:.4g}" for peak in line.peaks],
        "rows": [
            [
                [
                    round(start, digits),
                    round(end, digits),
                    action.phase,
                    action.stage,
                    action.microbatch,
                    line.schedule.repeat_of(action.stage),
                ]
                for start, end, action in row
            ]
            for row in line.busy
        ],
        "hops": [
            [round(hop.start, digits), round(hop.end, digits), hop.sender, hop.receiver, hop.action.phase]
            for hop in line.hops
        ],
    }


def _legend_entry(kind: str, words: str) -> str:
    if kind.endswith("hop"):
        dash = "" if kind == "hop" else ' stroke-dasharray="3 2"'
        sample = f'<svg width="16" height="14"><path d="M0 1l16 12" stroke="#333"{dash}/></svg>'
    else:
        fill, edge = (FILL[kind], FILL[kind]) if kind in FILL else (IDLE, EDGE)
        sample = f'<i style="background:{fill};border-color:{edge}"></i>'
    return f"<span>{sample}{words}</span>"


def _table_row(line: Timeline) -> str:
    cells = (
        f"{line.length:.6g}",
        f"{line.bubble:.1%}",
        f"{abs(line.span_bubble):.1%}",
        f"{max(line.peaks):.4g} A",
        str(hop_count(line.schedule)),
    )
    return f"<tr><th>{escape(line.title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
