"""Schedules as values: build, verify, price, lower and draw them. Imports neither jax nor numpy.

    ir         `Schedule` and `Action`; `rules` what must come before what; `stages` layouts as text
    by_name    `build`; `catalog` its names, `family` what a family is, `auto` the search
    families/  one file a family
    verify     whether a schedule is legal; `costs`, `simulate` what it takes
    lowering/  to the table of the compiled loop
    forms/     text, CSV, JSON; show/ pictures

Read `ir` and `verify` first; a new schedule is one file in `families/`.
"""

from jaxpipe.schedule import show as show
from jaxpipe.schedule.auto import Choice, auto
from jaxpipe.schedule.by_name import build
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.forms.text import from_csv, from_json, parse, to_csv, to_json
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lowering.lower import ModelBytes, TickTable, lower
from jaxpipe.schedule.simulate import Interval, Timing, simulate
from jaxpipe.schedule.stages import even_stages, format_stages, parse_stages
from jaxpipe.schedule.verify import verify

__all__ = [
    "CATALOG",
    "Action",
    "Choice",
    "Costs",
    "Interval",
    "ModelBytes",
    "Schedule",
    "TickTable",
    "Timing",
    "auto",
    "build",
    "even_stages",
    "format_stages",
    "from_csv",
    "from_json",
    "lower",
    "parse",
    "parse_stages",
    "show",
    "simulate",
    "to_csv",
    "to_json",
    "verify",
]
