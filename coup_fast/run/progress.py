"""How far a call is, told after each step to whoever asked: a function, or a bar of tqdm."""

from __future__ import annotations

import importlib.util
import inspect
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

StepCallback = Callable[[int, int], object]  # (finished steps, all steps)
ProgressOption = bool | StepCallback | None  # what a call takes
Tell = Callable[[int], None]  # receives the number of finished steps of one part of the batch


def checked(progress: Any) -> ProgressOption:
    """`progress` as a call takes it, before any work.

    Raises TypeError for what is neither a flag nor a function of two arguments, and ImportError for
    True where tqdm is not installed.
    """
    if progress is True and importlib.util.find_spec("tqdm") is None:
        raise ImportError(
            "progress=True shows a bar of tqdm, which is not installed: pip install tqdm, or give "
            "a function progress(step, num_steps)"
        )
    if progress is None or isinstance(progress, bool):
        return progress
    expected = "progress must be True, False or a function progress(step, num_steps)"
    if not callable(progress):
        raise TypeError(f"{expected}, got {reprlib.repr(progress)}")
    try:
        inspect.signature(progress).bind(1, 1)
    except ValueError:  # of a function in C, which does not tell
        pass
    except TypeError as error:
        raise TypeError(f"{expected}, and {reprlib.repr(progress)} cannot: {error}") from None
    called: StepCallback = progress
    return called


class Watch:
    """Counts the steps of a batch that is run in parts, and tells of each that is finished."""

    def __init__(
        self, callback: StepCallback, steps: int, parts: int, device: torch.device
    ) -> None:
        self.callback, self.steps, self.device = callback, steps, device
        self.total = steps * parts

    def part(self, number: int) -> Tell:
        """Receives how many steps of this part are finished."""
        return lambda done: self._tell(number * self.steps + done)

    def _tell(self, step: int) -> None:
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).synchronize()  # only enqueued is not finished
        self.callback(step, self.total)


@contextmanager
def watching(
    progress: ProgressOption, steps: int, parts: int, device: torch.device, label: str
) -> Iterator[Watch | None]:
    """The `Watch` of a call, or None where nobody asked; a bar is gone afterwards."""
    if progress is None or progress is False:
        yield None
    elif progress is not True:
        yield Watch(progress, steps, parts, device)
    else:
        from tqdm.auto import tqdm

        # A log gets no half-drawn bars; a notebook's streams are no terminal either.
        hidden = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        with tqdm(total=steps * parts, desc=label, unit="step", leave=False, disable=hidden) as bar:
            yield Watch(lambda step, _: bar.update(step - bar.n), steps, parts, device)
