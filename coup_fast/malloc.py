"""The C library's heap, where it is glibc's: freed memory is kept, and given back now and then.

A network on a CPU allocates and frees its activations in every layer. glibc returns the end of its
heap to the system each time, which then has to clear and map the same pages again. That is a sixth
of the time of a run on the bundled digits (docs/design.md). glibc does not return the holes between
blocks in use, and before version 2.38 an aligned request does not reuse a hole of the same size
(sourceware bug 14581). So the heap of an evaluation grew with every batch until none was left.

So this package's commands keep what they free, and give it all back between batches. A library does
not decide that for its callers: nothing here runs on import.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64 bits
_NEVER = 2**31 - 1


@cache
def _glibc() -> Any:
    """The C library, or None where it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep_freed_memory() -> bool:
    """Keep freed blocks below 32 MB in this process from now on; returns whether that was done.

    It is not done where the environment holds settings for glibc's malloc.
    """
    library = _glibc()
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if library is None or chosen:
        return False
    kept = library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(kept and library.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> None:
    """Return all free pages to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
