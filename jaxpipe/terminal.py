"""What a run shows while it goes on: a live line on a terminal, plain lines anywhere else.

This is the only file of the package that writes to the screen.
"""

import sys
from typing import Protocol, TextIO

from jaxpipe.reader import stop_unread
from jaxpipe.screen import behind, printable


class Report(Protocol):
    """Who is told what happens."""

    def note(self, text: str):
        """Something that happens once."""

    def progress(self, step: int, steps: int, values: dict[str, float]):
        """A step is done. `values` are those of the step, see `jaxpipe.train.report.metrics`."""

    def close(self):
        """No more progress."""


class Silent:
    """Shows nothing."""

    def note(self, text: str): ...

    def progress(self, step: int, steps: int, values: dict[str, float]): ...

    def close(self): ...


class Lines:
    """Plain text, one line per report."""

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stdout

    def note(self, text: str):
        self._file = stop_unread(self._file, printable(text))

    def progress(self, step: int, steps: int, values: dict[str, float]):
        self.note(f"step {step:>{len(str(steps))}}/{steps}  {describe(values)}  ETA {_left(step, steps, values)}")

    def close(self): ...


class Live:
    """A progress bar that stays at the bottom of the terminal.

    Args:
        console: A `rich.console.Console`; by default one on standard output.
    """

    def __init__(self, console=None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = console or Console(file=behind(sys.stdout))
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = None

    def note(self, text: str):
        self._progress.console.print(printable(text), markup=False, highlight=False)

    def progress(self, step: int, steps: int, values: dict[str, float]):
        text = f"{describe(values)}  ETA {_left(step, steps, values)}"
        if self._task is None:
            self._task = self._progress.add_task("", total=steps, text=text)
            self._progress.start()
        self._progress.update(self._task, completed=step, text=text)
        self._progress.refresh()

    def close(self):
        self._progress.stop()


def terminal_report() -> Report:
    """`Live` when standard output is a terminal, else `Lines`."""
    return Live() if sys.stdout.isatty() else Lines()


def describe(values: dict[str, float]) -> str:
    """One step's numbers for people.

    Example:
        >>> describe({"loss": 2.345, "tokens_per_s": 12345.6, "step_time_s": 0.2})
        'loss 2.345  12,346 tokens/s  200 ms/step'
    """
    return (
        f"loss {values['loss']:.3f}  {values['tokens_per_s']:,.0f} tokens/s  {values['step_time_s'] * 1e3:.0f} ms/step"
    )


def _left(step: int, steps: int, values: dict[str, float]) -> str:
    seconds = round((steps - step) * values["step_time_s"])
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
