"""How close the compiled step comes to what the machine can do, on simulated CPU devices.

Three things are timed in turn, round after round, so that the machine's drift falls on all of them:

    step    the compiled training step: loss and gradients of one batch
    T_dev   every device runs its own stages' forwards and backwards for all microbatches at the same time, with
            the same lane functions, but no schedule, no hops and no stash: what the backend can do
    T1      the single-device gradient-accumulation step of the whole model, in a process pinned to one core

    limit   T_dev * (lockstep makespan / ideal time); T_dev where devices share cores (P > cores), for there bubbles
            cost nothing

Reported are medians over the rounds and their ratios.

Reading order: `case` (what is measured), `lanes` (T_dev as a program), `one_core` (T1), `measure`, `trace` (when the
lanes of one step really ran), `report`; `memory` keeps freed memory in the process.
"""

from jaxpipe.measure.bench.case import Case, Workload, make_cases, workload_of
from jaxpipe.measure.bench.measure import Row, measure
from jaxpipe.measure.bench.one_core import OneCore, accumulation_step, in_groups, timed_step
from jaxpipe.plan.device import num_cores

__all__ = [
    "Case",
    "OneCore",
    "Row",
    "Workload",
    "accumulation_step",
    "in_groups",
    "make_cases",
    "measure",
    "num_cores",
    "timed_step",
    "workload_of",
]
