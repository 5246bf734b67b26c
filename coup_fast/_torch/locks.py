"""Locks that a forked process does not find held for ever.

Data loaders fork workers while other threads may be purifying. A run holds its lock for long, so a
fork cannot wait for it: the child gets new locks instead.
"""

from __future__ import annotations

import os
import threading
import weakref


class ForkLock:
    """Its `current` is a `threading.Lock`, and a new one in a child forked meanwhile."""

    def __init__(self) -> None:
        self.current = threading.Lock()
        _all.add(self)


_all: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _renew() -> None:
    for lock in _all:
        lock.current = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
