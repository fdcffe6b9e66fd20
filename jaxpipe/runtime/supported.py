"""Which tables the compiled loop can run."""

from jaxpipe.errors import ScheduleError
from jaxpipe.schedule import TickTable


def check_supported(table: TickTable) -> None:
    """Refuses tables that need a lane or a route that the loop does not have.

    Raises:
        ScheduleError: The schedule holds I or W, or its placement is not loop.
    """
    schedule = table.schedule
    if schedule.placement != "loop" or not schedule.phases <= {"F", "B"}:
        raise ScheduleError(
            f"schedule={schedule.name!r} with phases {' '.join(sorted(schedule.phases))} and placement "
            f"{schedule.placement} lowers but cannot be compiled yet: only F and B on placement loop; "
            "try 'interleaved_1f1b'"
        )
