"""Locks of the module's own state that a forked process does not find held for ever."""

from __future__ import annotations

import os
import threading


def lock_across_forks() -> threading.Lock:
    """A lock, for the life of the process, that is free in a child forked while others use it."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
    return lock
