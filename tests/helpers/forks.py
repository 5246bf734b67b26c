"""What a forked process finds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from coup_fast._torch.locks import ForkLock


def needs_fork(test: Any) -> Any:
    """Marks a test that forks this process, in which other threads run."""
    test = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")(test)


def child_can_take(lock: Callable[[], ForkLock]) -> bool:
    """Whether a child, forked while another thread holds the lock, can take what `lock` gives."""
    held = threading.Event()

    def hold() -> None:
        with lock().current:
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if lock().current.acquire(timeout=0) else 1)
    thread.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
