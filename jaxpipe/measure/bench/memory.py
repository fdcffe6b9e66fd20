"""Memory that a benchmark's processes keep, as the allocators of accelerators do."""

import ctypes
import sys

_OPTIONS = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
"""glibc's malloc.h: numbers of options, and what keeps freed memory in the process."""


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    A step's temporaries are one allocation of tens of megabytes per device. By default glibc gives it back to the
    kernel after every step, which then clears it page by page for the next one: about a tenth of a step on CPUs, and
    nothing that a GPU does.

    Returns:
        Whether it was possible.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) == 1 for option in _OPTIONS.values())
