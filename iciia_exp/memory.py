"""How the process keeps memory that it has freed: what computing on a processor wants."""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["keep_freed_memory"]

_MIB = 1 << 20
#: glibc's names of what is set, its numbers for them (malloc.h), and the values in bytes
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 256 * _MIB),
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 * _MIB),
    "MALLOC_TOP_PAD_": (-2, 64 * _MIB),
}


def keep_freed_memory() -> None:
    """Let up to half a gigabyte of freed memory stay with the process, and those it starts; a user's settings stay.

    Else glibc gives the megabytes of an intermediate result back to the system and gets them again for the next one,
    zeroed page by page, which takes about as long as computing what is in them (benchmarks/bench_iciia.py).
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has its own ways
        mallopt = ctypes.CDLL(None).mallopt
        for name, (number, value) in _SETTINGS.items():
            mallopt(number, value)
            os.environ[name] = str(value)
