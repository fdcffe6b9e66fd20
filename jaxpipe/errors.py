"""Errors that users see.

Every message states the rule, the received value and the nearest valid choice, in one line. They are
raised at the door (constructors, `build`, the config reader); engines behind the door trust their input.
"""


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
