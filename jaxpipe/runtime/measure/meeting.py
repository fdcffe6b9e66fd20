"""A check of compiled programs: nothing that all devices must join stands where not all of them come by.

Idle devices skip their lanes. What crosses `tensor` inside a lane is fine, for devices that share a stage are busy and
idle together; but XLA moves some things by a permute, which is a meeting of all devices of the mesh. In a lane that
only some of them run the others never come, and the program hangs. That happens where annotations make XLA shift data
that is cut over `tensor`: slices, rolls, or fused columns that are not split by heads.
"""

import re

from jaxpipe.errors import PartitionError
from jaxpipe.runtime.measure.traffic import branches_of, computations


def check_meetings(text: str) -> None:
    """Raises PartitionError where a permute stands in a lane that devices may skip.

    Args:
        text: Optimized HLO of a step, as ``compiled.as_text()`` gives it.
    """
    parts = computations(text)
    hopping = {name for name, lines in parts.items() if any("/ppermute" in line for line in lines)}
    for line in (line for name in hopping for line in parts[name]):
        for lane in _lanes(line):
            # A loop of one turn is laid open, so that the next loop stands beside its hops: that is no lane.
            if lane not in hopping and (made := _permute(parts, lane)):
                raise PartitionError(
                    f"{made!r} in a lane that not all devices run moves data that is cut over 'tensor' between them, "
                    "so the program would hang; try other specs (fused columns in runs of whole heads), no carry_spec, "
                    "or mesh.tensor=1"
                )


def _lanes(line: str) -> list[str]:
    """The computations that an instruction runs or skips."""
    loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
    return [loop[1]] if loop else branches_of(line) if " conditional(" in line else []


def _permute(parts: dict[str, list[str]], name: str) -> str | None:
    """The name of an operation below a computation that became a permute, if there is one."""
    for line in parts.get(name, ()):
        if re.search(r" collective-permute(-start)?\(", line):
            made = re.search(r'op_name="[^"]*?([^"/]*)"', line)
            return made[1] if made else "an operation"
        for called in _lanes(line):
            if found := _permute(parts, called):
                return found
    return None
