"""Schedules as values: build, verify, price, lower and draw them. Imports neither jax nor numpy."""

from jaxpipe.schedule import show as show
from jaxpipe.schedule.catalog import CATALOG, build
from jaxpipe.schedule.costs import Costs
from jaxpipe.schedule.ir import Action, Schedule
from jaxpipe.schedule.lower import ModelBytes, TickTable, lower
from jaxpipe.schedule.verify import verify

__all__ = [
    "CATALOG",
    "Action",
    "Costs",
    "ModelBytes",
    "Schedule",
    "TickTable",
    "build",
    "lower",
    "show",
    "verify",
]
