"""What all readers of schedules share: files, actions, and errors that name the row and the cell.

Rows and cells are counted from 0 in every message, so that a row is a device.
"""

import os
import re
from pathlib import Path
from typing import NoReturn

from jaxpipe.documents import MAX_BYTES
from jaxpipe.errors import ScheduleError
from jaxpipe.schedule.ir import Action

_ACTION = re.compile(r"(?:0|[1-9][0-9]{0,8})[FBIW](?:0|[1-9][0-9]{0,8})")


def read_action(word: str, row: int, column: int) -> Action:
    """Reads one cell; an error names the row and the cell."""
    word = word.strip()
    if _ACTION.fullmatch(word) is None:
        rule = "must read STAGE, one of F B I W, MICROBATCH and nothing else, such as 0F0"
        begins = _ACTION.match(word)
        if begins is not None:
            rule += f"; {word[begins.end() :]!r} after {begins.group()} is too much"
        elif re.match(r"\d+(SEND|RECV|UNSHARD|RESHARD|REDUCE)", word):
            rule += "; export the compute-only form, without communication"
        fail(row, column, repr(word), rule)
    return Action.parse(word)


def content_of(source: str | os.PathLike[str], kind: str) -> tuple[str, str]:
    """The text of a path, or of a source that is the text itself, and a name for it."""
    if isinstance(source, str):
        whole = source.strip()
        is_text = "\n" in source or "," in whole or not whole or whole[0] == "{" or _ACTION.fullmatch(whole)
        if is_text and not _is_file(source):
            return source, kind
    path = Path(source)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ScheduleError(f"{kind} file {str(source)!r} is longer than {MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig").replace("\r\n", "\n"), path.stem
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ScheduleError(f"{kind} file {str(source)!r} cannot be read: {reason}") from error


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # longer than a path may be, or with a null character
        return False


def fail(row: int, column: int, cell: str, rule: str) -> NoReturn:
    """Raises what is wrong with a cell."""
    raise ScheduleError(f"row {row}, cell {column} {cell}: {rule}")
