"""Shares of images with Wilson score intervals (E. B. Wilson, JASA 22, 1927)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Share(ABC):
    """A share of `total` images and its interval at `confidence`; its fields are its counts.

    `total` = 0 gives the rate nan and the interval [0, 1]: nothing is known.
    """

    total: int
    confidence: float

    @property
    @abstractmethod
    def rate(self) -> float:
        """In [0, 1]; nan without images."""

    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the Wilson interval, both in [0, 1]."""
        if self.total == 0:
            return 0.0, 1.0
        z, n, p = NormalDist().inv_cdf(0.5 + self.confidence / 2), self.total, self.rate
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half

    def percent(self) -> str:
        """For tables: `97.5 % [94.3, 98.9]`."""
        low, high = self.interval()
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON reports; an unknown rate is null."""
        counts: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        confidence = counts.pop("confidence")
        low, high = self.interval()
        rate = self.rate if self.total else None
        return {**counts, "rate": rate, "low": low, "high": high, "confidence": confidence}


@dataclass(frozen=True)
class Proportion(Share):
    """`successes` out of `total`, with its Wilson interval.

    Args:
        successes: how many, in [0, total].
        total: of how many; 0 gives the rate nan and the interval [0, 1].
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: the counts are no proportion, or confidence is out of range.
    """

    successes: int
    total: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.total:
            raise ValueError(f"{self.successes} successes out of {self.total} is not a proportion")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}")

    @property
    def rate(self) -> float:
        """The observed proportion."""
        return self.successes / self.total if self.total else math.nan


@dataclass(frozen=True)
class Average(Share):
    """Mean accuracy over draws: `successes` / `draws` images out of `total`, on average.

    Its interval is Wilson's for `total` images. Draws of one image are not independent, so they do
    not count as more images; a mean over draws varies less than one draw, so the interval is wide
    rather than narrow.
    """

    successes: int
    draws: int
    total: int
    confidence: float = 0.95

    @property
    def rate(self) -> float:
        """The mean proportion."""
        return self.successes / (self.draws * self.total) if self.total else math.nan


def accuracy(logits: torch.Tensor, labels: torch.Tensor, confidence: float = 0.95) -> Proportion:
    """Top-1 accuracy.

    Args:
        logits: [B, K], or int64 [B] for labels that are predicted already.
        labels: int64 [B].
        confidence: of the interval.

    Raises:
        ValueError: there are not as many predictions as labels.
    """
    predicted = logits.argmax(dim=1) if logits.ndim == 2 else logits
    if predicted.shape != labels.shape:
        raise ValueError(
            f"{tuple(predicted.shape)} predictions do not fit {tuple(labels.shape)} labels"
        )
    correct = int((predicted == labels.to(predicted.device)).sum())
    return Proportion(correct, labels.numel(), confidence)
