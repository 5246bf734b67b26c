"""Proportions with Wilson score intervals (E. B. Wilson, JASA 22, 1927)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Proportion:
    """`successes` out of `total` with its Wilson interval at `confidence`.

    `total` = 0 gives the rate nan and the interval [0, 1]: nothing is known.
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
        """The observed proportion in [0, 1], or nan without observations."""
        return self.successes / self.total if self.total else float("nan")

    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the Wilson interval, both in [0, 1]."""
        if self.total == 0:
            return 0.0, 1.0
        from scipy.stats import binomtest

        ends = binomtest(self.successes, self.total).proportion_ci(
            confidence_level=self.confidence, method="wilson"
        )
        return float(ends.low), float(ends.high)

    def percent(self) -> str:
        """For tables: `97.5 % [94.3, 98.9]`."""
        low, high = self.interval()
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON reports; an unknown rate is null."""
        low, high = self.interval()
        return {
            "successes": self.successes,
            "total": self.total,
            "rate": self.rate if self.total else None,
            "low": low,
            "high": high,
            "confidence": self.confidence,
        }


def accuracy(logits: torch.Tensor, labels: torch.Tensor, confidence: float = 0.95) -> Proportion:
    """Top-1 accuracy of `logits` [B,K] (or labels already predicted, int64 [B]) on `labels` [B]."""
    predicted = logits.argmax(dim=1) if logits.ndim == 2 else logits
    if predicted.shape != labels.shape:
        raise ValueError(
            f"{tuple(predicted.shape)} predictions do not fit {tuple(labels.shape)} labels"
        )
    correct = int((predicted == labels.to(predicted.device)).sum())
    return Proportion(correct, labels.numel(), confidence)
