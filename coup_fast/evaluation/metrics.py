"""From predictions under several draws to the numbers of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coup_fast.evaluation.intervals import Average, Proportion


def wins_vote(votes: Sequence[int], label: int) -> bool:
    """Whether a class has more votes than every other; a tie is lost, whatever classes it is of."""
    counts = Counter(votes)
    own = counts.pop(label, 0)
    return own > max(counts.values(), default=0)


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


def worst_curve(predictions: Sequence[Sequence[int]], labels: Sequence[int]) -> list[Proportion]:
    """Right under all of the first k draws, for k = 1 … K; predictions and labels as `numbers`."""
    pairs = list(zip(predictions, labels, strict=True))
    draws = len(predictions[0]) if pairs else 0
    return [
        Proportion(sum(all(g == label for g in row[:k]) for row, label in pairs), len(pairs))
        for k in range(1, draws + 1)
    ]


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
        Proportion(sum(wins_vote(row, label) for row, label in pairs), total),
    )
