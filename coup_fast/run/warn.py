"""Warnings that name the line of the user's program, however deep in here they arise."""

from __future__ import annotations

import sys
import warnings

_OURS = ("coup_fast", "torch")  # a module's call passes through torch


def warn(message: str) -> None:
    """Warn at the nearest line that is neither this package's nor PyTorch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        if frame.f_back is None:  # all of it is ours: where it was said, then
            level = 2
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
