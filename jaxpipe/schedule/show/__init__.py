"""Schedules as pictures: a text grid, timelines to scale as SVG, PNG and HTML, and a trace for Perfetto.

    timeline  what is drawn: actions with their times; `vector` SVG, `raster` PNG, `page` HTML, `trace` for Perfetto

Every picture takes a schedule, a `TickTable`, a `Timeline`, or a list of them to compare on one time axis.
"""

from jaxpipe.schedule.forms.grids import coloured, grid, table_text, text
from jaxpipe.schedule.show.page import html
from jaxpipe.schedule.show.raster import png
from jaxpipe.schedule.show.timeline import Timeline, timed, timeline
from jaxpipe.schedule.show.trace import trace
from jaxpipe.schedule.show.vector import svg

__all__ = ["Timeline", "coloured", "grid", "html", "png", "svg", "table_text", "text", "timed", "timeline", "trace"]
