"""Memory that was freed, given back to the system between batches.

glibc keeps freed blocks for later. An evaluation alternates between large activations and small
results that stay, and these come to lie between those: before glibc 2.38 an aligned request does
not reuse a freed block of its own size (sourceware bug 14581), so the heap grew with every batch,
to 24 GB in 350 of them, of which 113 MB were in use.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return function


def give_back_freed_memory() -> None:
    """Return free pages to the system; with another C library than glibc, nothing happens."""
    trim = _trim()
    if trim is not None:
        trim(0)
