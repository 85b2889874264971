"""The C library's heap while training on a CPU.

A step takes memory for what lies between its inputs and outputs and gives it back at its end. glibc returns blocks of that size to
the system each time, and the system hands out zeroed pages each time, one fault for every 4 kB.
Compiling, on the other hand, leaves behind some hundred megabytes that nobody needs again.
"""

import ctypes
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Lets the process keep memory that was freed, for its next step; whether the C library knows how (glibc does).

    Call it before jax starts its threads, which otherwise have heaps of their own that cannot hold large blocks. It holds for the whole
    process. Numbers and peak memory stay what they are; memory between steps is as large as in them.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def release_freed_memory() -> bool:
    """Gives all memory that is free at the moment back to the system, after a compilation say; whether the C library knows how."""
    trim = _function("malloc_trim")
    return trim is not None and bool(trim(0))


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library, None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
