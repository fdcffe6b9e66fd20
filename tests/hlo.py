"""Reading XLA's text output: what is in a loop, what is copied, what a hop flies behind."""

import re
from dataclasses import dataclass
from typing import Any

from jaxpipe.runtime.measure.traffic import branches_of, computations

__all__ = [
    "branches_of",
    "computations",
    "copies",
    "hlo_text",
    "holds_product",
    "hops",
    "loop_bodies",
    "products",
    "typed_copies",
]

_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")
WORK = ("fusion", "custom-call", "conditional", "while", "call", "dot", "convolution")


def hlo_text(compiled: Any) -> str:
    """The optimized program of a compiled function, on GPUs in scheduled order."""
    return compiled.as_text()


def loop_bodies(text: str, inner: bool = False, hopping: bool = True) -> list[list[str]]:
    """The instructions of the bodies of the program's loops.

    Args:
        text: HLO text.
        inner: With the instructions of the lanes (branches and inner loops, but not fusions) that a body calls.
        hopping: Only the loops that hold hops.
    """
    parts = computations(text)
    names = [
        m.group(1) for body in parts.values() for line in body if (m := re.search(r" while\(.*body=%?([\w.\-]+)", line))
    ]
    bodies = [name for name in names if not hopping or any(" collective-permute" in line for line in parts[name])]
    return [_with_branches(parts, name) if inner else parts[name] for name in bodies]


def _with_branches(parts: dict[str, list[str]], name: str) -> list[str]:
    lines = list(parts[name])
    for line in parts[name]:
        if lane := re.search(r" while\(.*body=%?([\w.\-]+)", line):
            lines += _with_branches(parts, lane.group(1))
        if " conditional(" in line:
            lines += [inner for branch in branches_of(line) for inner in _with_branches(parts, branch)]
    return lines


def copies(lines: list[str], fresh: bool = True) -> list[tuple[int, ...]]:
    """The shapes of `typed_copies`."""
    return [shape for _, shape in typed_copies(lines, fresh)]


def typed_copies(lines: list[str], fresh: bool = True) -> list[tuple[str, tuple[int, ...]]]:
    """The dtypes, as XLA writes them, and shapes that are copied, one entry per copy.

    Args:
        lines: Instructions.
        fresh: Also of what was filled with one number just before: of two gathers from one array, XLA makes the zeros
            for one gradient and copies them for the other.
    """
    lines = [line for line in lines if fresh or "broadcast" not in line.partition(" copy(")[2].partition(")")[0]]
    found = (re.search(r"= (\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", line) for line in lines)
    return [(m.group(1), tuple(int(d) for d in m.group(2).split(",") if d)) for m in found if m]


@dataclass(frozen=True)
class Hop:
    """One collective-permute of a scheduled program.

    Attributes:
        asynchronous: Whether it has a start and a done and is not marked synchronous.
        behind: The computations and operations scheduled between start and done.
    """

    asynchronous: bool
    behind: tuple[str, ...]


def hops(lines: list[str]) -> list[Hop]:
    """The hops of one scheduled computation, with what stands between their start and done."""
    found, started = [], {}
    for at, line in enumerate(lines):
        if re.search(r" collective-permute\(", line):
            found.append(Hop(False, ()))
        elif start := re.match(r"(?:ROOT )?%?([\w.\-]+) = .* collective-permute-start\(", line):
            started[start.group(1)] = at
        elif done := re.search(r" collective-permute-done\([^%]*%?([\w.\-]+)\)", line):
            first = started[done.group(1)]
            behind = tuple(other for other in lines[first + 1 : at] if re.search(rf" ({'|'.join(WORK)})\(", other))
            found.append(Hop('"is_sync":true' not in lines[first], behind))
    return found


def products(text: str, scope: str = "") -> list[list[str]]:
    """The operands of the matrix products of a program, like ``bf16[2,3]``.

    Args:
        text: HLO text.
        scope: Part of the names of the operations that are asked for.
    """
    found = []
    product = re.compile(r' dot\(%?([\w.\-]+), %?([\w.\-]+)\)| custom-call\(%?([\w.\-]+), %?([\w.\-]+).*"__cublas')
    for lines in computations(text).values():
        results = (re.match(r"(?:ROOT )?%?([\w.\-]+) = (\w+\[[\d,]*\])", line) for line in lines)
        arrays = {m.group(1): m.group(2) for m in results if m}
        matches = (product.search(line) for line in lines if re.search(rf'op_name="[^"]*{scope}', line))
        found += [[arrays[name] for name in m.groups() if name] for m in matches if m]
    return found


def holds_product(line: str, parts: dict[str, list[str]]) -> bool:
    """Whether an instruction, or anything it calls, is a matrix product.

    Args:
        line: An instruction.
        parts: From `computations`.
    """
    if re.search(r' dot\(| convolution\(|custom_call_target="__(cublas|cudnn|triton|onednn)|__triton', line):
        return True
    called = _CALLED.findall(line) + branches_of(line)
    return any(holds_product(inner, parts) for name in called for inner in parts.get(name, ()))
