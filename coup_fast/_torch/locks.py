"""Locks that a forked process does not find held for ever.

Data loaders fork workers while other threads may be purifying. A run holds its lock for long, so a
fork cannot wait for it: the child gets new locks instead.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


class ForkLock:
    """Its `current` is a lock of `threading`, and a new one in a child forked meanwhile."""

    def __init__(self, *, reentrant: bool = False) -> None:
        self._new = threading.RLock if reentrant else threading.Lock
        self.renew()
        _all.add(self)

    def renew(self) -> None:
        self.current: Any = self._new()


_all: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _renew() -> None:
    for lock in _all:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
