"""A defence inside another model, driven from outside.

A model that is attacked may hold a `Purifier` or a `PurifiedClassifier` and call it with nothing
but images. The attack then says which images they are and which draws they get: for the length of
a call it gives the defence a `Driver`, and the defence's calls in this thread go by it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coup_fast import checks
from coup_fast._torch.differentiated import in_backward
from coup_fast._torch.locks import ForkLock
from coup_fast._torch.transforms import refuse_scripting

_AGAIN = 0  # in the place of a thread: whichever one a backward pass runs in
_lock = ForkLock()  # of every `_drivers`


class Driver:
    """What stands in for a defence during one call of the model around it.

    model: called in its place, with (images, sample_ids, draw, …). sample_ids: int64 [B] of the
    images that the model was called with. first: the draw that takes the place of draw 0. fresh:
    each call goes on where the one before ended, as `fresh_draws` has it. votes: draws of a call.

    used: how many draws from `first` on the calls have taken so far.
    """

    def __init__(
        self, model: Any, sample_ids: Tensor, first: int, votes: int = 1, fresh: bool = False
    ) -> None:
        self.model, self.sample_ids, self.first = model, sample_ids, first
        self.votes, self.fresh = votes, fresh
        self.used = 0

    def noise_of(self, images: Tensor, sample_ids: Any, draw: Any) -> tuple[Any, Any]:
        """Sample ids and draw of a call that was made with these. Raises ValueError."""
        if sample_ids is None:
            sample_ids = self.sample_ids
            if len(images) != len(sample_ids):
                raise ValueError(
                    f"a purifier inside the attacked model was called with {len(images)} images "
                    f"where the model has {len(sample_ids)}, so nobody knows whose noise each "
                    "gets: let the model pass sample_ids on, as in defended(images, sample_ids), "
                    "or attack the PurifiedClassifier itself"
                )
        draw = checks.draw("draw", draw, len(images), images.device)
        if in_backward():
            if self.fresh:
                raise CalledAgainError
            return sample_ids, draw + self.first
        highest = int(draw.max()) if isinstance(draw, Tensor) and len(images) else draw
        assert isinstance(highest, int)
        offset = self.used if self.fresh else 0
        self.used = max(self.used, offset + highest + self.votes)
        return sample_ids, draw + (self.first + offset)


class CalledAgainError(RuntimeError):
    """A defence with fresh draws was asked for values that it has given before."""

    def __init__(self) -> None:
        super().__init__(
            "a defence with fresh draws was called within a backward pass, as "
            "torch.utils.checkpoint does to compute values again: it would take other draws than "
            "the forward pass, and the gradient would be of other noise; leave it out of the "
            "checkpoint (its exact gradient needs little memory), or use fresh_draws=False and "
            "give each call its draw"
        )


class Drivable:
    """What a defence inherits to be driven."""

    _drivers: Mapping[int, Driver] = {}  # by thread; replaced, never changed: copies share it
    __prepare_scriptable__ = refuse_scripting  # torch.jit.script asks it of every module

    @property
    def driver(self) -> Driver | None:
        """Who drives the calls of this thread; None: their arguments."""
        if not self._drivers:
            return None
        driver = self._drivers.get(threading.get_ident())
        if driver is None and _AGAIN in self._drivers and in_backward():
            driver = self._drivers[_AGAIN]
        return driver


@contextmanager
def driven(drivers: Mapping[nn.Module, Driver], *, again: bool = False) -> Iterator[None]:
    """Let these drive the defences for which they stand, in this thread, within the context.

    again: what backward passes call once more instead (`torch.utils.checkpoint`), in any thread.
    """
    thread = _AGAIN if again else threading.get_ident()
    before = {}
    with _lock.current:
        for module, driver in drivers.items():
            assert isinstance(module, Drivable)
            before[module] = module._drivers.get(thread)
            module._drivers = {**module._drivers, thread: driver}
    try:
        yield
    finally:
        with _lock.current:
            for module, driver_before in before.items():
                assert isinstance(module, Drivable)
                others = {t: d for t, d in module._drivers.items() if t != thread}
                module._drivers = (
                    others if driver_before is None else {**others, thread: driver_before}
                )
