"""How to split, schedule and spread a model over given devices, and what it takes. Imports neither jax nor numpy.

    problem    the question; `shape` of the model, `device` of the hardware
    search     the answer: all that may be enumerated, best bounds first; `bounds`, `evaluate`, `splits` do the work
    partition  where to cut; `chain`, `cuts` its parts
    cost       seconds and bytes of a block; `links` of transfers, `rhythm` of a schedule, `price` of a plan, `memory`
    explain    why; `report` tables and pages

Read `problem` and `search` first.
"""

from jaxpipe.plan.chain import Chain
from jaxpipe.plan.cost import BlockCost, LaneTimes, ModelCosts, analytic
from jaxpipe.plan.device import DEVICES, DeviceSpec, find_device
from jaxpipe.plan.partition import Partition, partition
from jaxpipe.plan.problem import Option, Plan, Problem, Space
from jaxpipe.plan.search import Answer, Rejection, search
from jaxpipe.plan.shape import Attention, BlockShape, Mlp, ModelShape

__all__ = [
    "DEVICES",
    "Answer",
    "Attention",
    "BlockCost",
    "BlockShape",
    "Chain",
    "DeviceSpec",
    "LaneTimes",
    "Mlp",
    "ModelCosts",
    "ModelShape",
    "Option",
    "Partition",
    "Plan",
    "Problem",
    "Rejection",
    "Space",
    "analytic",
    "find_device",
    "partition",
    "search",
]
