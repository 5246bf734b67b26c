"""From predictions under several draws to the numbers of the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from coup_fast.evaluation.intervals import Proportion


@dataclass(frozen=True)
class Average:
    """Mean accuracy over the draws: `successes` / `draws` images out of `total`, on average.

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
        """In [0, 1]; nan without images."""
        return self.successes / (self.draws * self.total) if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson's formula (JASA 22, 1927) at this rate."""
        if self.total == 0:
            return 0.0, 1.0
        z, n, p = NormalDist().inv_cdf(0.5 + self.confidence / 2), self.total, self.rate
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def percent(self) -> str:
        """As `Proportion.percent`."""
        low, high = self.interval()
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def as_dict(self) -> dict[str, float | int | None]:
        """As `Proportion.as_dict`; successes is the sum over draws."""
        low, high = self.interval()
        return {
            "successes": self.successes,
            "draws": self.draws,
            "total": self.total,
            "rate": self.rate if self.total else None,
            "low": low,
            "high": high,
            "confidence": self.confidence,
        }


def majority(votes: Sequence[int]) -> int:
    """The class with most votes; of several the lowest, as argmax breaks ties."""
    counts = Counter(votes)
    return min(counts, key=lambda label: (-counts[label], label))


@dataclass(frozen=True)
class Numbers:
    """Accuracy of one row: under one draw, and the average, worst and majority of all draws."""

    one_draw: Proportion
    average: Average
    worst: Proportion
    majority: Proportion

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name).as_dict() for name in NUMBERS}


def worst_of(attacks: Sequence[Sequence[Sequence[int]]], labels: Sequence[int]) -> list[list[int]]:
    """Of several attacks' predictions, each image's under the attack that did it most harm.

    Most harm: right under the fewest draws; of equals the first attack's.
    """
    found = []
    for rows, label in zip(zip(*attacks, strict=True), labels, strict=True):
        found.append(list(min(rows, key=lambda row: sum(guess == label for guess in row))))
    return found


NUMBERS = ("one_draw", "average", "worst", "majority")


def numbers(predictions: Sequence[Sequence[int]], labels: Sequence[int]) -> Numbers:
    """predictions: one row per image, one class per draw (as many for each). labels: one each."""
    pairs = list(zip(predictions, labels, strict=True))
    total = len(pairs)
    draws = len(predictions[0]) if total else 1
    right = [[guess == label for guess in row] for row, label in pairs]
    return Numbers(
        Proportion(sum(row[0] for row in right), total),
        Average(sum(map(sum, right)), draws, total),
        Proportion(sum(map(all, right)), total),
        Proportion(sum(majority(row) == label for row, label in pairs), total),
    )
