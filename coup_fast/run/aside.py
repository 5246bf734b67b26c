"""Calls of models that no result is made of: looks at them, measurements, comparisons.

A run, its gradient included, is a certain number of calls, whatever memory there was and whatever
was looked at for the first time. Whoever counts calls leaves out those that are made aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from coup_fast._torch.differentiated import in_backward

_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """Within it, models are called for another purpose than the result."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def counts() -> bool:
    """Whether a call made now is one of those that a run consists of.

    Those of a backward pass are not: they compute again what the forward pass has computed.
    """
    return not (_aside.get() or in_backward())
