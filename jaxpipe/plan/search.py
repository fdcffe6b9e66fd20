"""The fastest plan that fits, proven: branch and bound over everything that may be chosen.

Options are enumerated, those that cannot fit are dropped by a closed form of their memory, and the rest is simulated in
the order of a closed-form bound on their time until the bound passes the best time found. Because what is enumerated
does not depend on the memory, nor on any speed, more memory or faster links never give a slower plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

from jaxpipe.errors import PartitionError
from jaxpipe.plan.bounds import bound, least_memory, least_s
from jaxpipe.plan.cost import ModelCosts
from jaxpipe.plan.evaluate import plans
from jaxpipe.plan.memory import Memory
from jaxpipe.plan.price import SPLIT
from jaxpipe.plan.problem import Option, Plan, Problem
from jaxpipe.schedule.catalog import CATALOG

TWINS = {"eager_1f1b": "1f1b", "interleaved_1f1b": "1f1b", "circular": "gpipe", "breadth_first": "gpipe"}
"""What a schedule is the same as for V = 1, and need not be tried where that is."""

MOST_ACTIONS = 400_000
"""Larger schedules are built only where their steady phase repeats."""

PARETO_STEP = 0.7
"""Each point of the Pareto set must do with this share of the memory of the one before."""


@dataclass(frozen=True)
class Rejection:
    """Why a schedule is not the answer.

    Attributes:
        schedule: Its name.
        reason: One line.
    """

    schedule: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes:
        problem: The question.
        best: The fastest plan that fits, None if none does.
        plans: All that were simulated and fit, the fastest split and packing of each option, fastest first.
        pareto: Plans of which none is faster with less memory, fastest first.
        rejected: The schedules that are not the best one's, with the first reason.
        least: The plan that needs the least memory, if none fits.
        tried: How many options there were, and how many of them were simulated.
    """

    problem: Problem
    best: Plan | None
    plans: tuple[Plan, ...]
    pareto: tuple[Plan, ...]
    rejected: tuple[Rejection, ...]
    least: Plan | None
    tried: tuple[int, int] = field(default=(0, 0))


def search(problem: Problem, pareto: bool = True) -> Answer:
    """Finds the fastest plan that fits.

    Args:
        problem: The question.
        pareto: Whether to look for plans with less memory too.
    """
    table = _Table(problem)
    best = table.fastest(problem.limit_bytes)
    front = []
    point = best
    while pareto and point is not None and len(front) < 4:
        front.append(point)
        point = table.fastest(point.memory.total * PARETO_STEP)
    fitting = sorted(
        (plan for found in table.simulated.values() for plan in _each_best(found, problem.limit_bytes)),
        key=lambda plan: plan.step_s,
    )
    return Answer(
        problem=problem,
        best=best,
        plans=tuple(fitting),
        pareto=tuple(front),
        rejected=tuple(table.reasons(best)),
        least=table.smallest() if best is None else None,
        tried=(len(table.entries), len(table.simulated)),
    )


def options(problem: Problem, refused: dict[str, str] | None = None) -> Iterator[Option]:
    """Everything that may be chosen.

    Args:
        problem: The question.
        refused: Takes, by schedule, the first reason why one of its options does not exist.
    """
    space, refused = problem.space, {} if refused is None else refused
    for pipe, tensor, fsdp, data in _meshes(problem):
        for rows, microbatches in _slices(problem, data * fsdp):
            for name in space.schedules:
                family = CATALOG[name]
                factor, plus = family.least
                if microbatches < factor * pipe + plus:
                    least = f"{factor}*P{plus:+}" if factor != 1 or plus else "P"
                    text = f"needs at least {least} microbatches: P={pipe} has {microbatches}"
                    refused.setdefault(name, text)
                    continue
                for repeats in _repeats(problem, name, pipe):
                    if pipe * repeats * microbatches > MOST_ACTIONS and microbatches % pipe:
                        refused.setdefault(name, f"M={microbatches} is no multiple of P={pipe} and too large to pack")
                        continue
                    for remat in space.remats:
                        for head in space.heads:
                            yield Option(name, pipe, repeats, microbatches, rows, data, fsdp, tensor, remat, head)


def _meshes(problem: Problem) -> Iterator[tuple[int, int, int, int]]:
    """(pipe, tensor, fsdp, data) whose product is the number of devices."""
    space, blocks = problem.space, problem.shape.blocks.values()
    layers = len(problem.shape.kinds)
    for pipe in space.pipe or _divisors(problem.devices):
        if problem.devices % pipe or (pipe > layers and space.counts is None):
            continue
        for tensor in space.tensor or _divisors(problem.devices // pipe):
            rest, odd = divmod(problem.devices // pipe, tensor)
            heads = all(a.allows(tensor) for block in blocks for a in block.attentions)
            hidden = all(block.mlp.hidden % tensor == 0 for block in blocks)
            if odd or not heads or not hidden or tensor > problem.device.devices_per_host:
                continue
            near = max(1, min(rest, problem.device.devices_per_host // tensor))
            for fsdp in space.fsdp or sorted({1, near, rest}):
                if rest % fsdp == 0 and (space.data is None or rest // fsdp in space.data):
                    yield pipe, tensor, fsdp, rest // fsdp


def _slices(problem: Problem, shards: int) -> Iterator[tuple[int, int]]:
    """(rows, microbatches) of a data shard's part of the batch."""
    if problem.batch % shards:
        return
    each, space = problem.batch // shards, problem.space
    for rows in space.rows or [rows for rows in _divisors(each) if rows <= 64]:
        if each % rows == 0 and (space.microbatches is None or each // rows in space.microbatches):
            yield rows, each // rows


def _repeats(problem: Problem, name: str, pipe: int) -> list[int]:
    space, layers, only = problem.space, len(problem.shape.kinds), CATALOG[name].repeats
    allowed = space.repeats or [v for v in range(1, 13) if layers % (pipe * v) == 0 or v <= 4]
    twin = TWINS.get(name)
    return [
        v
        for v in allowed
        if (only is None or v == only)
        and (pipe * v <= layers or space.counts is not None)
        and (space.counts is None or len(space.counts) == pipe * v)
        and not (v == 1 and twin in space.schedules)
        and not (pipe == 1 and name != ("1f1b" if "1f1b" in space.schedules else space.schedules[0]))
        and not (pipe == 1 and v > 1 and only is None and space.repeats is None)
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class _Entry:
    """An option with what is known of it in closed form."""

    option: Option
    costs: ModelCosts
    least: Memory
    least_s: float


class _Table:
    """The options of a problem with their bounds, and the plans of those that were simulated."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.refused: dict[str, str] = {}
        self.simulated: dict[Option, list[Plan]] = {}
        self.bounds: dict[Option, float] = {}
        self.below: dict[Option, float] = {}
        self.entries = sorted(self._entries(), key=lambda entry: (entry.least_s, entry.least.total))

    def _entries(self) -> Iterator[_Entry]:
        made: dict[tuple[int, int], ModelCosts] = {}
        problem = self.problem
        for option in options(problem, self.refused):
            key = option.rows, option.tensor
            if key not in made:
                made[key] = problem.costs(*key)
            costs = made[key]
            yield _Entry(option, costs, least_memory(problem, option, costs), least_s(problem, option, costs))

    def fastest(self, limit: float) -> Plan | None:
        """The fastest plan that keeps at most `limit` bytes."""
        best = None
        # [1] Each option stands in the queue with its cheap bound, then with the bound of its splits.
        queue = [(entry.least_s, n, False) for n, entry in enumerate(self.entries) if entry.least.total <= limit]
        heapify(queue)
        while queue and (best is None or queue[0][0] < best.step_s):
            _, n, tight = heappop(queue)
            entry = self.entries[n]
            if not tight:
                least = self._bound(entry)
                if least is not None:
                    heappush(queue, (least, n, True))
                continue
            for plan in self._plans(entry, best.step_s if best else float("inf")):
                if plan.memory.total <= limit and (best is None or _rank(plan) < _rank(best)):
                    best = plan
        return best

    def _bound(self, entry: _Entry) -> float | None:
        """Seconds that no packing can beat; None if there is no split."""
        option = entry.option
        if option not in self.bounds:
            try:
                self.bounds[option] = bound(self.problem, option, entry.costs)
            except PartitionError as error:
                self.refused.setdefault(option.schedule, str(error))
                self.bounds[option] = float("inf")
        least = self.bounds[option]
        return None if least == float("inf") else least

    def _plans(self, entry: _Entry, below: float) -> Sequence[Plan]:
        """The plans of an option that may take less than `below` seconds."""
        option = entry.option
        if self.below.get(option, -1.0) < below:
            self.below[option] = below
            self.simulated[option] = list(plans(self.problem, option, entry.costs, below))
        return self.simulated[option]

    def smallest(self) -> Plan | None:
        """The plan that needs the least memory."""
        best = None
        for entry in sorted(self.entries, key=lambda entry: entry.least.total):
            if best is not None and entry.least.total >= best.memory.total:
                break
            for plan in plans(self.problem, entry.option, entry.costs):
                if best is None or plan.memory.total < best.memory.total:
                    best = plan
        return best

    def reasons(self, best: Plan | None) -> Iterator[Rejection]:
        """Why each schedule that is not the best one's is not."""
        limit = self.problem.limit_bytes
        for name in self.problem.space.schedules:
            if best is not None and name == best.option.schedule:
                continue
            mine = [entry for entry in self.entries if entry.option.schedule == name]
            if not mine:
                twin = TWINS.get(name)
                same = f"with V=1 the ticks of {twin}" if twin else "no size fits the devices"
                yield Rejection(name, self.refused.get(name, same))
                continue
            fitting = [entry for entry in mine if entry.least.total <= limit]
            if not fitting:
                yield Rejection(name, _too_large(min(mine, key=lambda entry: entry.least.total), limit))
            else:
                yield Rejection(name, self._slower(fitting, best))

    def _slower(self, fitting: Sequence[_Entry], best: Plan | None) -> str:
        limit = self.problem.limit_bytes
        known = [plan for entry in fitting for plan in self.simulated.get(entry.option, ())]
        within = [plan for plan in known if plan.memory.total <= limit]
        if within and best is not None:
            fastest = min(within, key=lambda plan: plan.step_s)
            others = [entry for entry in fitting if entry.option not in self.simulated]
            open_s = min((self.bounds.get(e.option, e.least_s) for e in others), default=float("inf"))
            if open_s >= fastest.step_s:
                slower = fastest.step_s / best.step_s - 1
                return f"{slower:.1%} slower: {fastest.step_s:.4g} s, bubble {fastest.bubble:.1%}"
            return f"at least {max(open_s / best.step_s - 1, 0):.1%} slower"
        if known and best is None:
            least = min(known, key=lambda plan: plan.memory.total)
            return f"memory: {_gb(least.memory.total)} of {_gb(limit)}"
        if best is None:
            return _too_large(min(fitting, key=lambda entry: entry.least.total), limit)
        least = min(self.bounds.get(entry.option, entry.least_s) for entry in fitting)
        if least < best.step_s:
            return f"memory: what would be faster keeps more than {_gb(limit)}"
        return f"at least {least / best.step_s - 1:.1%} slower: {least:.4g} s if no tick waited"


def _too_large(entry: _Entry, limit: float) -> str:
    least, over = entry.least, entry.least.total - limit
    if over <= 0:
        return f"memory: more than {_gb(limit)} once its ticks are packed"
    terms = {name: getattr(least, name) for name in ("weights", "optimizer", "activations", "buffers")}
    largest = max(terms, key=lambda name: terms[name])
    return f"memory: at least {_gb(least.total)}, {_gb(over)} too much; most of it {largest}, {_gb(terms[largest])}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _rank(plan: Plan) -> tuple:
    """Fastest first; equals by memory, then by what is simpler to run."""
    o = plan.option
    simple = plan.packing != "auto", plan.order != "ideal", o.schedule in SPLIT, o.repeats, o.pipe, o.tensor, o.fsdp
    return round(plan.step_s, 12), plan.memory.total, simple


def _each_best(found: Sequence[Plan], limit: float) -> list[Plan]:
    within = [plan for plan in found if plan.memory.total <= limit]
    return [min(within, key=_rank)] if within else []


def relaxed(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The problem with one restriction less, and that knob in words, in the order in which to try them."""
    space = problem.space
    for knob, changed in (
        ("remat=full", replace(space, remats=("none", "full", "all"))),
        ("microbatches of one row", replace(space, rows=(1,), microbatches=None)),
        ("fsdp", replace(space, fsdp=None, data=None)),
        ("another schedule", replace(space, schedules=tuple(n for n in CATALOG if n != "inference"), repeats=None)),
        ("tensor", replace(space, tensor=None, fsdp=None, data=None)),
        ("more pipeline stages", replace(space, pipe=None, repeats=None, counts=None, fsdp=None, data=None)),
    ):
        if changed != space:
            yield knob, replace(problem, space=changed)
    for times in (2, 4, 8, 16, 32, 64):
        grown = replace(space, pipe=None, data=None, fsdp=None, tensor=None, counts=None)
        yield f"{problem.devices * times} devices", replace(problem, space=grown, devices=problem.devices * times)


def way_out(answer: Answer) -> str:
    """What gets a problem without a plan to one, in a few words.

    Args:
        answer: Without a best plan.
    """
    limit = answer.problem.limit_bytes
    for knob, problem in relaxed(answer.problem):
        least = _Table(problem).smallest()
        if least is not None and least.memory.total <= limit:
            return f"or {knob} ({_gb(least.memory.total)})"
    return "or a smaller model"
