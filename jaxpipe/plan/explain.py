"""What limits a plan, and what one change of the machine or the batch would buy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxpipe.plan.price import SPLIT, ends_of, times_of
from jaxpipe.plan.problem import Plan, Problem
from jaxpipe.plan.search import search


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: What it is.
        seconds: How long.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Change:
    """One change and the best plan after it.

    Attributes:
        name: What is changed.
        step_s: Of the best plan then; None if there is none.
        how: That plan in a few words.
    """

    name: str
    step_s: float | None
    how: str = ""


def parts(problem: Problem, plan: Plan) -> list[Part]:
    """Where a plan's step goes; the parts add up to it."""
    option = plan.option
    costs = problem.costs(option.rows, option.tensor)
    split = option.schedule in SPLIT
    lanes = {kind: times_of(block, option) for kind, block in costs.blocks.items()}
    ends = ends_of(costs, option, problem)
    share = option.microbatches / option.pipe
    if problem.device.cores is not None:
        share = max(share / costs.alone, option.microbatches * option.stride / problem.device.cores)
    plain = {kind: block.times["all"] for kind, block in costs.blocks.items()}

    def total(lanes: dict) -> float:
        each = {k: t.forward + (t.input + t.weight if split else t.backward) for k, t in lanes.items()}
        return share * sum(each[kind] for kind in problem.shape.kinds)

    blocks, again = total(plain), total(lanes) - total(plain)
    around = share * (ends.first_forward + ends.first_backward + ends.last_forward)
    around += option.microbatches * ends.everywhere
    waits = max(0.0, plan.loop_s - blocks - again - around)
    return [
        Part("blocks", blocks),
        Part("computed again (remat)", again),
        Part("embedding and head", around),
        Part("waiting: bubble and hops", waits),
        Part("gathers and reductions", plan.sync_s),
        Part("optimizer", plan.optimizer_s),
    ]


def changes(problem: Problem, plan: Plan) -> Iterator[Change]:
    """The best plan after each of a few changes."""
    device = problem.device
    faster = {
        "twice the network": {"network_bytes_per_s": 2 * device.network_bytes_per_s},
        "twice the links": {"link_bytes_per_s": 2 * device.link_bytes_per_s},
    }
    limit = problem.limit_bytes
    yield _after("half more memory", replace(problem, memory_bytes=1.5 * limit))
    yield _after("a quarter less memory", replace(problem, memory_bytes=0.75 * limit))
    if plan.source == "analytic":
        from jaxpipe.plan.cost import analytic

        for name, numbers in faster.items():
            other = replace(device, **numbers)
            yield _after(
                name,
                replace(
                    problem,
                    device=other,
                    memory_bytes=limit,
                    costs=lambda rows, tensor, other=other: replace(
                        analytic(problem.shape, other, rows=rows, tensor=tensor),
                        passes_in_place=problem.costs(rows, tensor).passes_in_place,
                    ),
                ),
            )
    twice = _after("twice the batch", replace(problem, batch=2 * problem.batch))
    if twice.step_s is not None:
        twice = replace(twice, step_s=twice.step_s / 2, how=f"per half of it; {twice.how}")
    yield twice


def _after(name: str, problem: Problem) -> Change:
    best = search(problem, pareto=False).best
    if best is None:
        return Change(name, None)
    o = best.option
    mesh = f"P={o.pipe} V={o.repeats} data={o.data} fsdp={o.fsdp} tensor={o.tensor}"
    return Change(name, best.step_s, f"{o.schedule} {mesh} M={o.microbatches} remat={o.remat}")
