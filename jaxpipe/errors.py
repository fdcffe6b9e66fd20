"""Errors that users see.

Every message states the rule, the received value and the nearest valid choice, in one line. They are
raised where input enters (constructors, `build`, the config reader); what lies behind trusts its input.
"""

import operator
from typing import Any


class JaxpipeError(ValueError):
    """Base of every error that jaxpipe raises for wrong input."""


class ScheduleError(JaxpipeError):
    """A schedule that cannot run, or parameters for which a schedule family has no schedule."""


class PartitionError(JaxpipeError):
    """A model that cannot be cut into the stages that were asked for."""


class ConfigError(JaxpipeError):
    """A wrong option, a wrong type, or options that do not fit together."""


class CheckpointError(JaxpipeError):
    """A checkpoint that is missing, torn or made by something else."""


class DataError(JaxpipeError):
    """A data file that is missing, empty or out of the model's range."""


class UnavailableError(JaxpipeError):
    """Input that is right but cannot be used now: a folder that another run uses, a disk that is full or read-only.

    Commands end with exit code 1, so that whoever supervises them tries again.
    """


class QueueFullError(JaxpipeError):
    """An engine that has as many requests waiting as it takes."""


class VersionError(JaxpipeError):
    """Installed versions of JAX and Flax that do not work together."""


def whole_number(name: str, value: Any, least: int = 1, error: type[JaxpipeError] = ConfigError) -> int:
    """A count that a user gave, as Python's own integer; NumPy's are taken too.

    Args:
        name: As the user writes it.
        value: What was given.
        least: The smallest that is allowed.
        error: What to raise.

    Raises:
        JaxpipeError: It is no whole number, or below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise error(f"{name}={value!r} must be a whole number of at least {least}; try {least}")
    return number


def one_of_type(name: str, value: Any, kind: type | tuple[type, ...], near: str, error: type[JaxpipeError]) -> None:
    """Raises unless a value is of a type.

    Args:
        name: As the user writes it.
        value: What was given.
        kind: The type, or several.
        near: What to write instead.
        error: What to raise.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        found = repr(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
        wanted = " or ".join(one.__name__ for one in kinds)
        raise error(f"{name} is {found} but must be a {wanted}; try {near}")
