"""How the C library treats large blocks of memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

LARGE_BYTES = 4 * 1024 * 1024
"""Only clips need such blocks, some at a time."""


def return_large_blocks() -> None:
    """Give large blocks back to the system as soon as they are free.

    Otherwise glibc keeps and splits blocks of up to 32 MiB once the first one was freed: four clips then took
    100 MB more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc, which others leave out
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BYTES)  # as glibc itself would have it
