"""How many bytes a compiled loop only moves: copies, slices read and slices written, per turn.

The compiled step keeps activations, residuals and gradients in numbered buffers, and what it loses against a loop that
computes alone is mostly memory traffic. XLA's text says how much there is: of a buffer that is updated in place only
the update moves; a buffer that XLA could not update in place is copied whole, every turn.

Counted is what the text shows. Not counted are the operands and results of everything that computes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
_LANE = re.compile(r'op_name="([^"]*/)branch_\d+/while"')
"""A loop of a lane's branch: what comes before the branch is the lane's, see `jaxpipe.runtime.loop.lane`."""
_MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
_SLICES = {"dynamic-slice", "dynamic-update-slice"}
_PASSES_ON = {"bitcast", "convert", "copy", "transpose", "reshape"}
"""What may stand between an update in place and the result of its fusion."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one turn of a loop moves, each array counted once where it is read or written.

    A conditional counts with its dearest branch, and so do the loops of a lane's branches; another inner loop as often
    as it is known to turn, else once: the lanes of a working tick.

    Attributes:
        copy_bytes: Copied arrays, and buffers that a fusion writes whole to change a slice.
        slice_bytes: Slices read at a dynamic index.
        update_bytes: Slices written at a dynamic index, in place.
        turns: How often the loop turns, None where the text does not say.
        transpose_bytes: Arrays written in another order of their dims and nothing else: operands that a product wants
            turned. What of this XLA does within an instruction that computes as well differs between its versions.
    """

    copy_bytes: int = 0
    slice_bytes: int = 0
    update_bytes: int = 0
    turns: int | None = None
    transpose_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.copy_bytes + self.slice_bytes + self.update_bytes + self.transpose_bytes

    def plus(self, other: "Traffic", times: int = 1) -> "Traffic":
        """The sum, with the turns of this one."""
        return Traffic(
            self.copy_bytes + times * other.copy_bytes,
            self.slice_bytes + times * other.slice_bytes,
            self.update_bytes + times * other.update_bytes,
            self.turns,
            self.transpose_bytes + times * other.transpose_bytes,
        )


def traffic(text: str, at_least: int = 1024) -> list[Traffic]:
    """What each outermost loop of a compiled program moves per turn, in the order of the program.

    Args:
        text: Optimized HLO, as ``compiled.as_text()`` gives it, of any backend.
        at_least: Bytes; smaller arrays are left out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxpipe.runtime.measure.traffic import traffic
        >>> def put(buffer, row, at):
        ...     return jax.lax.scan(lambda b, i: (b.at[i].set(row), None), buffer, at)[0]
        >>> put = jax.jit(put, donate_argnums=0)
        >>> compiled = put.lower(jnp.zeros((8, 1000)), jnp.ones(1000), jnp.arange(8)).compile()
        >>> [(loop.copy_bytes, loop.update_bytes, loop.turns) for loop in traffic(compiled.as_text())]
        [(0, 4000, 8)]
    """
    parts = {name: list(_instructions(lines)) for name, lines in computations(text).items()}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return list(_loops(parts, entry.group(1), at_least)) if entry else []


def accessed_bytes(text: str) -> int:
    """What a compiled program reads and writes in memory: operands and results of every kernel, by their whole size.

    Not counted is what a kernel takes for itself. Conditionals and loops count as in `traffic`.

    Args:
        text: Optimized HLO.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxpipe.runtime.measure.traffic import accessed_bytes
        >>> compiled = jax.jit(lambda x, y: x @ y + 1).lower(jnp.ones((8, 16)), jnp.ones((16, 4))).compile()
        >>> accessed_bytes(compiled.as_text()) in (4 * (8 * 16 + 16 * 4 + 8 * 4) + 8 * 8 * 4 * n for n in (0, 1))
        True
    """
    parts = {name: list(_instructions(lines)) for name, lines in computations(text).items()}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return _accessed(parts, entry.group(1)) if entry else 0


@dataclass(frozen=True)
class Turn:
    """What one turn of a loop reads and writes, in bytes, as `accessed_bytes` counts it.

    Attributes:
        own: Outside of the lanes.
        lanes: For each conditional, and each loop of unknown length, in order: its branches; a loop's are none or one
            turn. A GPU asks the host which it is.
    """

    own: int
    lanes: tuple[tuple[int, ...], ...]


def turns_of_loops(text: str) -> list[Turn]:
    """What the kernels of each outermost loop of a compiled program read and write per turn, in order.

    Args:
        text: Optimized HLO of any backend.
    """
    parts = {name: list(_instructions(lines)) for name, lines in computations(text).items()}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    loops = _with_calls(parts, entry.group(1)) if entry else ()
    return [_turn_of(parts, line.calls("body")) for line in loops if line.opcode == "while"]


def _turn_of(parts: dict, body: str) -> Turn:
    lanes = [line for line in _with_calls(parts, body) if _asks(line)]
    branches = [
        tuple(_accessed(parts, branch) for branch in branches_of(line.rest))
        if line.opcode == "conditional"
        else (0, _accessed(parts, line.calls("body")))
        for line in lanes
    ]
    return Turn(_accessed(parts, body) - sum(map(max, branches)), tuple(branches))


def _asks(line: "_Instruction") -> bool:
    return line.opcode == "conditional" or (line.opcode == "while" and _turns(line) is None)


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of an HLO text, by its name."""
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


@dataclass(frozen=True)
class _Instruction:
    """One line of HLO; `rest` is what follows the opening parenthesis of its operands."""

    root: bool
    name: str
    bytes: int
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    def calls(self, attribute: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""


def _instructions(lines: list[str]) -> Iterator[_Instruction]:
    for found in filter(None, map(_INSTRUCTION.match, lines)):
        root, name, result, opcode, rest = found.groups()
        arrays = _ARRAY.findall(result)
        if opcode == "custom-call":
            arrays = [array for array in arrays if array[0] not in ("s8", "u8")] or arrays  # room for its own work
        if opcode == "copy-start":
            arrays = arrays[:1]  # (copy, original, context)
        yield _Instruction(bool(root), name, sum(map(_bytes, arrays)), opcode, rest)


def _bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    bits = 8 if dtype == "pred" else int("".join(filter(str.isdigit, dtype)) or 0)
    return math.ceil(bits * math.prod(int(d) for d in dims.split(",") if d) / 8)


def _loops(parts: dict, name: str, at_least: int) -> Iterator[Traffic]:
    for line in parts.get(name, ()):
        if line.opcode == "while":
            yield Traffic(turns=_turns(line)).plus(_moved(parts, line.calls("body"), at_least))
        elif line.opcode == "call":
            yield from _loops(parts, line.calls("to_apply"), at_least)


def _turns(loop: _Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found.group(1)) if found else None


def _moved(parts: dict, name: str, at_least: int) -> Traffic:
    """What a computation moves when it runs once."""
    sum_, lines = Traffic(), list(_with_calls(parts, name))
    branches: dict[str, Traffic] = {}
    sizes = {line.name: line.bytes for line in lines}
    for line in lines:
        if line.opcode in ("copy", "copy-start"):
            sum_ = sum_.plus(Traffic(copy_bytes=_if_large(line.bytes, at_least)))
        elif line.opcode == "dynamic-slice":
            sum_ = sum_.plus(Traffic(slice_bytes=_if_large(line.bytes, at_least)))
        elif line.opcode == "dynamic-update-slice":
            sum_ = sum_.plus(Traffic(update_bytes=_if_large(sizes[line.operands[1]], at_least)))
        elif line.opcode == "fusion":
            sum_ = sum_.plus(_fused(parts[line.calls("calls")], at_least))
        elif line.opcode == "while":
            loop, lane = _moved(parts, line.calls("body"), at_least), _LANE.search(line.rest)
            if lane:
                branches[lane.group(1)] = max(loop, branches.get(lane.group(1), loop), key=lambda of: of.total_bytes)
            else:
                sum_ = sum_.plus(loop, _turns(line) or 1)
        elif line.opcode == "conditional":
            each = (_moved(parts, branch, at_least) for branch in branches_of(line.rest))
            sum_ = sum_.plus(max(each, key=lambda of: of.total_bytes))
    for branch in branches.values():
        sum_ = sum_.plus(branch)
    return sum_


def _accessed(parts: dict, name: str) -> int:
    """What the kernels of a computation read and write when it runs once."""
    sum_, lines = 0, parts.get(name, ())
    sizes = {line.name: line.bytes for line in lines}
    for line in lines:
        if line.opcode == "while":
            sum_ += _accessed(parts, line.calls("body")) * (_turns(line) or 1)
        elif line.opcode == "conditional":
            sum_ += max(_accessed(parts, branch) for branch in branches_of(line.rest))
        elif line.opcode in ("call", "async-start"):
            sum_ += _accessed(parts, line.calls("to_apply") or line.calls("calls"))
        elif line.opcode == "dynamic-slice":
            sum_ += 2 * line.bytes
        elif line.opcode == "dynamic-update-slice":
            sum_ += 2 * sizes[line.operands[1]]
        elif line.opcode == "fusion":
            sum_ += _of_fusion(parts[line.calls("calls")])
        elif line.opcode not in _MOVES_NOTHING and not line.opcode.endswith("-done"):
            sum_ += line.bytes + sum(sizes.get(operand, 0) for operand in line.operands)
    return sum_


def _of_fusion(lines: list[_Instruction]) -> int:
    """What a fusion reads and writes: of an array that it only slices, or updates in place, no more than that."""
    by_name = {line.name: line for line in lines}
    (root,) = (line for line in lines if line.root)
    results = [by_name[name] for name in (root.operands if root.opcode == "tuple" else [root.name])]
    sum_ = 0
    for result in map(partial(_behind, by_name), results):
        sum_ += by_name[result.operands[1]].bytes if result.opcode == "dynamic-update-slice" else result.bytes
    for line in lines:
        if line.opcode == "parameter":
            users = [user for user in lines if line.name in user.operands]
            cut = all(user.opcode in _SLICES and user.operands[0] == line.name for user in users)
            sum_ += sum(user.bytes for user in users if user.opcode == "dynamic-slice") if cut else line.bytes
    return sum_


def _with_calls(parts: dict, name: str) -> Iterator[_Instruction]:
    """A computation's instructions, with those of what it calls in the calls' place: newer XLA calls small loops."""
    for line in parts.get(name, ()):
        if line.opcode in ("call", "async-start"):
            yield from _with_calls(parts, line.calls("to_apply") or line.calls("calls"))
        else:
            yield line


def _fused(lines: list[_Instruction], at_least: int) -> Traffic:
    """What a fusion moves beside what it computes.

    An update is in place if it is one of the fusion's results. Else it is a copy where a result is as large as the
    buffer, and where none is, the fusion only reads through it.
    """
    by_name = {line.name: line for line in lines}
    (root,) = (line for line in lines if line.root)
    results = [by_name[name] for name in (root.operands if root.opcode == "tuple" else [root.name])]
    largest, in_place = max(line.bytes for line in results), {_behind(by_name, line).name for line in results}
    sum_ = Traffic()
    for line in lines:
        if line.opcode == "dynamic-slice":
            sum_ = sum_.plus(Traffic(slice_bytes=_if_large(line.bytes, at_least)))
        elif line.opcode == "dynamic-update-slice" and line.name in in_place:
            sum_ = sum_.plus(Traffic(update_bytes=_if_large(by_name[line.operands[1]].bytes, at_least)))
        elif line.opcode == "dynamic-update-slice" and line.bytes <= largest:
            sum_ = sum_.plus(Traffic(copy_bytes=_if_large(line.bytes, at_least)))
    opcodes = {line.opcode for line in lines}
    if opcodes <= {"parameter", "tuple", *_PASSES_ON}:
        size = _if_large(root.bytes, at_least)
        sum_ = sum_.plus(Traffic(transpose_bytes=size) if "transpose" in opcodes else Traffic(copy_bytes=size))
    return sum_


def _behind(by_name: dict[str, _Instruction], line: _Instruction) -> _Instruction:
    """What a result is made of, if nothing but its form changes on the way."""
    while line.opcode in _PASSES_ON:
        line = by_name[line.operands[0]]
    return line


def _if_large(size: int, at_least: int) -> int:
    return size if size >= at_least else 0
