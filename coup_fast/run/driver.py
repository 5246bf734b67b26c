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
from coup_fast._torch.locks import ForkLock

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
        highest = int(draw.max()) if isinstance(draw, Tensor) and len(images) else draw
        assert isinstance(highest, int)
        offset = self.used if self.fresh else 0
        self.used = max(self.used, offset + highest + self.votes)
        return sample_ids, draw + (self.first + offset)


class Drivable:
    """What a defence inherits to be driven."""

    _drivers: Mapping[int, Driver] = {}  # by thread; replaced, never changed: copies share it

    @property
    def driver(self) -> Driver | None:
        """Who drives the calls of this thread; None: their arguments."""
        return self._drivers.get(threading.get_ident()) if self._drivers else None


@contextmanager
def driven(drivers: Mapping[nn.Module, Driver]) -> Iterator[None]:
    """Let these drive the defences for which they stand, in this thread, within the context."""
    thread = threading.get_ident()
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
