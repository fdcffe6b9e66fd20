"""Rows of the table, and the table as text and as Markdown."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: The part that it comes from.
        what: What was looked at.
        found: What was found, for people.
        asked: What it must be, for people; empty if nothing is asked.
        held: Whether it is so; None if nothing is asked.
        numbers: The same as plain values, for programs.
    """

    part: str
    what: str
    found: str
    asked: str = ""
    held: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One word."""
        return "" if self.held is None else "yes" if self.held else "NO"

    def line(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


HEAD = ("part", "what", "found", "asked", "held")


def cells(row: Row) -> tuple[str, ...]:
    """A row's columns."""
    return row.part, row.what, row.found, row.asked, row.verdict


def text_table(rows: Iterable[Row]) -> str:
    """The rows in columns."""
    table = [HEAD, *map(cells, rows)]
    widths = [max(len(line[n]) for line in table) for n in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def markdown(facts: dict[str, str], rows: Sequence[Row]) -> str:
    """The rows as Markdown, with what they were found on in the line above them."""
    table = [HEAD, ("---",) * len(HEAD), *map(cells, rows)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join(["; ".join(f"{name} {value}" for name, value in facts.items()), "", *lines, ""])
