"""Two defences compared image by image: how many images each wins, by how much, and by what chance.

All rows of an evaluation are about the same images under the same draws, so two defences differ by
the images that only one of them gets right. The intervals of single rows say nothing about that:
they treat rows as if their images differed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coup_fast.evaluation.config import EvalConfig, Row, met
from coup_fast.evaluation.defences import UNDEFENDED
from coup_fast.evaluation.intervals import Proportion
from coup_fast.evaluation.lines import marks, radius
from coup_fast.evaluation.metrics import worst_of
from coup_fast.evaluation.tables import Style, render_table

COLUMNS = ("difference", "won : lost, p")
HEADERS = ("a", "b", "attack", "a right", "b right", *COLUMNS, "p (Holm)")


@dataclass(frozen=True)
class Paired:
    """How often a and b were right on the same images.

    Args:
        both: images that both got right.
        won: images that only a got right.
        lost: images that only b got right.
        neither: the others.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: a count is negative, or confidence is out of range.
    """

    both: int
    won: int
    lost: int
    neither: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if min(self.both, self.won, self.lost, self.neither) < 0:
            raise ValueError(f"the counts of {self} must not be negative")
        Proportion(0, 0, self.confidence)

    @property
    def total(self) -> int:
        """How many images were compared."""
        return self.both + self.won + self.lost + self.neither

    @property
    def a(self) -> Proportion:
        """Images that a got right."""
        return Proportion(self.both + self.won, self.total, self.confidence)

    @property
    def b(self) -> Proportion:
        """Images that b got right."""
        return Proportion(self.both + self.lost, self.total, self.confidence)

    @property
    def difference(self) -> float:
        """The accuracy of a less that of b, in [-1, 1]; nan without images."""
        return (self.won - self.lost) / self.total if self.total else math.nan

    @property
    def p(self) -> float:
        """The exact test of McNemar (Psychometrika 12, 1947): two-sided, in (0, 1].

        How probable a split of the images that differ is which is at least as uneven as this one,
        if each of them may go to either side with probability ½.
        """
        differ = self.won + self.lost
        tail = sum(math.comb(differ, i) for i in range(min(self.won, self.lost) + 1))
        return min(1.0, 2 * tail / (1 << differ))

    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the difference's interval; [-1, 1] without images.

        R. G. Newcombe, "Improved confidence intervals for the difference between binomial
        proportions based on paired data", Statistics in Medicine 17 (1998) 2635, method 10: the
        Wilson intervals of the two proportions joined, with their correlation.
        """
        if self.total == 0:
            return -1.0, 1.0
        (low_a, high_a), (low_b, high_b) = self.a.interval(), self.b.interval()
        rate_a, rate_b, phi = self.a.rate, self.b.rate, self._correlation()

        def joined(one: float, other: float) -> float:
            return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

        return (
            self.difference - joined(rate_a - low_a, high_b - rate_b),
            self.difference + joined(high_a - rate_a, rate_b - low_b),
        )

    def _correlation(self) -> float:
        """φ of the four counts, its numerator corrected for continuity where it is positive."""
        right_a, right_b, total = self.a.successes, self.b.successes, self.total
        product = right_a * (total - right_a) * right_b * (total - right_b)
        if product == 0:
            return 0.0
        numerator = float(self.both * self.neither - self.won * self.lost)
        if numerator > 0:
            numerator = max(numerator - total / 2, 0.0)
        return numerator / math.sqrt(product)

    def cells(self) -> list[str]:
        """The two rates, and what stands under `COLUMNS`."""
        low, high = self.interval()
        difference = f"{100 * self.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        test = f"{self.won} : {self.lost}, p = {_p(self.p)}"
        return [*(f"{100 * part.rate:.1f} %" for part in (self.a, self.b)), difference, test]

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON reports; an unknown difference is null."""
        low, high = self.interval()
        return {
            "both": self.both,
            "won": self.won,
            "lost": self.lost,
            "neither": self.neither,
            "total": self.total,
            "difference": self.difference if self.total else None,
            "low": low,
            "high": high,
            "confidence": self.confidence,
            "p": self.p,
        }


def count_pairs(
    right_a: Sequence[bool], right_b: Sequence[bool], confidence: float = 0.95
) -> Paired:
    """Count images on which a and b were right.

    Args:
        right_a: whether a was right, image by image.
        right_b: the same of b, in the same order.
        confidence: of the interval of their difference, in (0, 1).

    Raises:
        ValueError: they are not about as many images, or confidence is out of range.
    """
    if len(right_a) != len(right_b):
        raise ValueError(
            f"right_a and right_b must be about the same images, got {len(right_a)} and "
            f"{len(right_b)}"
        )
    pairs = [(bool(one), bool(other)) for one, other in zip(right_a, right_b, strict=True)]
    return Paired(
        both=pairs.count((True, True)),
        won=pairs.count((True, False)),
        lost=pairs.count((False, True)),
        neither=pairs.count((False, False)),
        confidence=confidence,
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given (S. Holm, Scand. J. Stat. 6, 1979).

    Rejecting where these are at most α rejects a true hypothesis with probability at most α,
    however the tests depend on each other.
    """
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """What a stated comparison of two defences came to, on clean images or under one attack.

    Attributes:
        a: name of a defence.
        b: name of the other.
        attack: in words; "none" for clean images.
        counts: on how many images each was right, under draw 0.
        p_holm: p, adjusted for all comparisons of the report.
    """

    a: str
    b: str
    attack: str
    counts: Paired
    p_holm: float

    def cells(self) -> list[str]:
        """Under `HEADERS`."""
        return [self.a, self.b, self.attack, *self.counts.cells(), _p(self.p_holm)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON reports."""
        names = {"a": self.a, "b": self.b, "attack": self.attack}
        return {**names, **self.counts.as_dict(), "p_holm": self.p_holm}


def _p(p: float) -> str:
    """Three decimals, or the order of magnitude of a small one."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


Predictions = Callable[[int], tuple[list[list[int]], list[int]]]


def comparisons(config: EvalConfig, predictions: Predictions) -> list[Comparison]:
    """Every stated comparison, on clean images and under each attack that both defences met.

    Where both met several attacks of a ball, a further one is under the worst attack on each image.
    predictions: classes [images, draws] and labels [images], by the number of the row.
    """
    found: list[tuple[str, str, str, Paired]] = []
    for a, b in config.compare:
        pairs = [
            (i, j)
            for i, row in enumerate(config.rows)
            for j, other in enumerate(config.rows)
            if row.defence.name == a and other.defence.name == b and met(row, other)
        ]
        rows = [(config.rows[i], config.rows[j]) for i, j in pairs]
        told = marks([_attack(*both) for both in rows], [row.attack for row, _ in rows])
        for (i, j), both, mark in zip(pairs, rows, told, strict=True):
            counts = count_pairs(_right(*predictions(i)), _right(*predictions(j)))
            found.append((a, b, _attack(*both, mark), counts))
        worst_a, worst_b = (_worst(config, name, predictions) for name in (a, b))
        for ball in (ball for ball in worst_a if ball in worst_b):
            (right_a, of_a), (right_b, of_b) = worst_a[ball], worst_b[ball]
            unlike = "" if of_a == of_b else f", of {of_a} and {of_b} attacks"
            label = f"the worst on each image{unlike}, {ball}"
            found.append((a, b, label, count_pairs(right_a, right_b)))
    adjusted = holm([counts.p for *_, counts in found])
    return [Comparison(*one, p) for one, p in zip(found, adjusted, strict=True)]


def _right(predictions: Sequence[Sequence[int]], labels: Sequence[int]) -> list[bool]:
    """Whether each image is right under draw 0."""
    return [draws[0] == label for draws, label in zip(predictions, labels, strict=True)]


def _worst(
    config: EvalConfig, name: str, predictions: Predictions
) -> dict[str, tuple[list[bool], int]]:
    """By ball: whether each image is right under the worst of several attacks, and of how many."""
    balls: dict[str, list[int]] = {}
    for i, row in enumerate(config.rows):
        if row.defence.name == name and row.attack is not None:
            balls.setdefault(radius(row.attack), []).append(i)
    found = {}
    for ball, rows in balls.items():
        if len(rows) > 1:
            labels = predictions(rows[0])[1]
            joined = worst_of([predictions(i)[0] for i in rows], labels)
            found[ball] = _right(joined, labels), len(rows)
    return found


def _attack(row: Row, other: Row, mark: str = "") -> str:
    """The attack of two rows in words; what it does on one of them only is left out.

    mark: what tells it from another attack in the same words, of `marks`.
    """
    attack = row.attack
    if attack is None:
        return "none"
    alike = attack == other.attack and row.defence.method != UNDEFENDED
    return f"{attack.name if alike else attack.kind}{mark}, {radius(attack)}"


def comparison_table(rows: Sequence[Comparison], style: Style = "terminal") -> str:
    """One line for each comparison."""
    align: list[Literal["left", "right", "center"]] = ["left"] * 3
    align += ["right"] * (len(HEADERS) - 3)
    return render_table(HEADERS, [row.cells() for row in rows], style, align)
