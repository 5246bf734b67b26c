"""A defence measured on labelled images: accuracy, speed, and the operators' share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from coup_fast import PurifiedClassifier, Purifier
from coup_fast._torch.frozen import frozen_parameters
from coup_fast.evaluation.intervals import Proportion, accuracy
from coup_fast.run.backends import Operators
from coup_fast.run.loop import final_state


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock reading means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Score:
    """Accuracy on a set of images and the seconds it took."""

    accuracy: Proportion
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"accuracy": self.accuracy.as_dict(), "seconds": self.seconds}


def score(
    model: Callable[..., Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    with_ids: bool,
) -> Score:
    """Top-1 accuracy of `model` on images [B, C, H, W] and labels [B], batch by batch.

    with_ids: the model takes `sample_ids` (a `PurifiedClassifier` does); they are positions, so
    that the result does not depend on `batch_size`.
    """
    predicted = []
    synchronise(images.device)
    start = time.perf_counter()
    with torch.no_grad():
        positions = torch.arange(len(images))
        for batch, ids in zip(
            torch.split(images, batch_size), torch.split(positions, batch_size), strict=True
        ):
            options = {"sample_ids": ids} if with_ids else {}
            predicted.append(model(batch, **options).argmax(dim=1))
    synchronise(images.device)
    seconds = time.perf_counter() - start
    return Score(accuracy(torch.cat(predicted), labels), seconds)


class OperatorClock:
    """Stands in for `coup_fast.ops` (or `reference`) and adds up the time inside its operators."""

    def __init__(self, operators: Operators, device: torch.device) -> None:
        self._operators = operators
        self._device = device
        self.seconds = 0.0
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(self._operators, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise(self._device)
            start = time.perf_counter()
            result = operator(*args, **kwargs)
            synchronise(self._device)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        return timed


@dataclass(frozen=True)
class OperatorShare:
    """Time inside coup_fast's operators within whole purification runs."""

    operator_seconds: float
    total_seconds: float
    calls: int
    images: int

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.operator_seconds / self.total_seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "share": self.share,
            "operator_seconds": self.operator_seconds,
            "total_seconds": self.total_seconds,
            "operator_calls": self.calls,
            "images": self.images,
        }


def operator_share(purifier: Purifier, images: Tensor) -> OperatorShare:
    """Purify `images` once with a clock around every operator call.

    A run of its own, because the clock has to wait for the device before and after each operator.
    The run is the one that `purifier(images)` performs; one untimed step warms it up.
    """
    run = purifier.prepare(images)
    with frozen_parameters(*run.models), torch.no_grad():
        run.step(0, run.start(images), run.attacked(images))
        clock = OperatorClock(run.ops, images.device)
        run.ops = cast("Operators", clock)
        synchronise(images.device)
        start = time.perf_counter()
        final_state(run, images, run.step_)
        synchronise(images.device)
        total = time.perf_counter() - start
    return OperatorShare(clock.seconds, total, clock.calls, len(images))


@dataclass(frozen=True)
class DefenceResult:
    """What one defence achieved on clean and on attacked images."""

    name: str
    num_draws: int
    clean: Score
    attacked: Score
    operators: OperatorShare | None

    @property
    def images_per_second(self) -> float:
        """Images classified per second, all draws of an image together counting as one."""
        images = self.clean.accuracy.total + self.attacked.accuracy.total
        return images / (self.clean.seconds + self.attacked.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "num_draws": self.num_draws,
            "clean": self.clean.as_dict(),
            "attacked": self.attacked.as_dict(),
            "images_per_second": self.images_per_second,
            "operators": None if self.operators is None else self.operators.as_dict(),
        }


def measure_defence(
    name: str,
    defended: PurifiedClassifier,
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    batch_size: int,
    clocked_images: int,
) -> DefenceResult:
    """Accuracy and speed of `defended` on both sets, then the share of its operators."""
    on_clean = score(defended, clean, labels, batch_size, True)
    on_attacked = score(defended, attacked, labels, batch_size, True)
    share = operator_share(defended.purifier, attacked[:clocked_images])
    return DefenceResult(name, defended.num_draws, on_clean, on_attacked, share)
