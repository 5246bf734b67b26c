"""A request to stop (Ctrl-C, SIGTERM) that waits for the end of a step.

A step that is broken off leaves weights, optimiser and average at different steps, and nothing can
go on from there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_stop() -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM only make the function that it gives return True.

    The second Ctrl-C interrupts as ever. Signals are those of the main thread: in another thread
    nothing is changed, and the function returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked:
            signal.default_int_handler(number, frame)
        asked.add(number)

    before: dict[Any, Any] = {one: signal.signal(one, note) for one in SIGNALS}
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
