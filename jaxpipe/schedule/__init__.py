"""Schedules as values: build, verify, price, lower and draw them. Imports neither jax nor numpy."""

from jaxpipe.schedule import show as show
from jaxpipe.schedule.auto import Choice, auto
from jaxpipe.schedule.by_name import build
from jaxpipe.schedule.catalog import CATALOG
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lower import ModelBytes, TickTable, lower
from jaxpipe.schedule.simulate import Interval, Timing, simulate
from jaxpipe.schedule.stages import even_stages, format_stages, parse_stages
from jaxpipe.schedule.text import from_csv, from_json, parse, to_csv, to_json
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
