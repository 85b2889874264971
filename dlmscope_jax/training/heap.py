"""The C library's heap while training on a CPU.

A step takes some hundreds of megabytes for what lies between its inputs and outputs and gives them back at its end. glibc returns blocks
of that size to the system each time, and the system hands out zeroed pages each time, one fault for every 4 kB: at 2048 rows and 16,384
latents that alone costs a tenth of a step.
"""

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Lets the process keep memory that was freed, for its next step; whether the C library knows how (glibc does).

    It holds for the whole process and cannot be taken back. Peak memory stays what it was, memory between steps is as large as in them.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
