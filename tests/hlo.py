"""Reading XLA's text output: what is in a loop, what is copied, what a hop flies behind."""

import re
from dataclasses import dataclass
from typing import Any

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
WORK = ("fusion", "custom-call", "conditional", "while", "call", "dot", "convolution")


def hlo_text(compiled: Any) -> str:
    """The optimized program of a compiled function, on GPUs in scheduled order."""
    return compiled.as_text()


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = found.setdefault(head.group(1), [])
        elif line.startswith("}"):
            lines = None
        elif lines is not None and line.strip():
            lines.append(line.strip())
    return found


def branches_of(line: str) -> list[str]:
    """The computations that a conditional chooses from, the one for 0 or false first."""
    listed = [name for group in _BRANCHES.findall(line) for name in re.findall(r"%?([\w.\-]+)", group)]
    sides = (re.search(rf"{side}_computation=%?([\w.\-]+)", line) for side in ("false", "true"))
    return listed or [found.group(1) for found in sides if found]


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


def copies(lines: list[str]) -> list[tuple[int, ...]]:
    """The shapes that are copied, one entry per copy."""
    found = (re.search(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", line) for line in lines)
    return [tuple(int(d) for d in m.group(1).split(",") if d) for m in found if m]


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


def holds_product(line: str, parts: dict[str, list[str]]) -> bool:
    """Whether an instruction, or anything it calls, is a matrix product.

    Args:
        line: An instruction.
        parts: From `computations`.
    """
    if re.search(r' dot\(| convolution\(|custom_call_target="__(cublas|cudnn|triton|onednn)|__triton', line):
        return True
    called = _CALLED.findall(line) + [
        c for group in _BRANCHES.findall(line) for c in re.findall(r"%?([\w.\-]+)", group)
    ]
    return any(holds_product(inner, parts) for name in called for inner in parts.get(name, ()))
