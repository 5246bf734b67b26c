"""Counts of the study of guidance: from the labels of single images to shares and paired tests.

Run benchmarks/guidance_study.py. Nothing here calls a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coup_fast.evaluation.intervals import Proportion
from coup_fast.evaluation.paired import Paired, count_pairs, holm

Labels = NDArray[np.int64]
Chosen = NDArray[np.bool_]

# Each outcome says of which images it is a share, and what has to happen to one.
OUTCOMES = {
    "flipped": "right labels that flip",
    "flipped_unsure": "right labels of the least confident images that flip",
    "accuracy": "accuracy on clean images",
    "kept": "attacked images that keep the attacker's label",
    "recovered": "attacked images that get their right label back",
    "attacked_accuracy": "accuracy on attacked images",
}


@dataclass(frozen=True)
class Setting:
    """One purification.

    Args:
        t_star: where the chain starts.
        forward_noise: whether the image is diffused to t_star first.
        scale: λ.
        guidance_solver: "explicit" or "stable"; "" for λ = 0, where there is nothing to solve.
    """

    t_star: float
    forward_noise: bool
    scale: float
    guidance_solver: str

    @property
    def unguided(self) -> Setting:
        """The same with λ = 0."""
        return Setting(self.t_star, self.forward_noise, 0.0, "")

    def __str__(self) -> str:
        noise = "noised" if self.forward_noise else "plain"
        guided = f", {self.guidance_solver}" if self.guidance_solver else ""
        return f"t*={self.t_star:g}, {noise}, λ={self.scale:g}{guided}"


def grid(
    t_star: Sequence[float],
    forward_noise: Sequence[bool],
    scales: Sequence[float],
    guidance_solvers: Sequence[str],
) -> list[Setting]:
    """Every combination; λ = 0 once for all solvers."""
    return [
        Setting(float(t), bool(noise), float(scale), solver)
        for t in t_star
        for noise in forward_noise
        for scale in scales
        for solver in (guidance_solvers if scale else [""])
    ]


@dataclass(frozen=True)
class Answers:
    """What the classifier says of each image, in one order.

    Args:
        truth: [N], the labels.
        bare: [N], what the classifier says of the clean image without purification.
        margin: [N], the margin of that answer, which orders images by confidence.
        attacked: [N], what it says of the attacked image without purification.
        clean: what it says of the purified clean images, by setting.
        purified: what it says of the purified attacked images, by setting.
    """

    truth: Labels
    bare: Labels
    margin: NDArray[np.float64]
    attacked: Labels
    clean: dict[Setting, Labels] = field(default_factory=dict)
    purified: dict[Setting, Labels] = field(default_factory=dict)

    @property
    def right(self) -> Chosen:
        """Images that the bare classifier gets right."""
        return self.bare == self.truth

    @property
    def fooled(self) -> Chosen:
        """Those that the attack takes from it."""
        return self.right & (self.attacked != self.truth)

    def unsure(self, lowest: float) -> Chosen:
        """The share `lowest` of right images with the smallest margins, rounded up."""
        numbers = np.flatnonzero(self.right)
        order = numbers[np.argsort(self.margin[numbers], kind="stable")]
        chosen = np.zeros(len(self.truth), dtype=bool)
        chosen[order[: math.ceil(lowest * len(order))]] = True
        return chosen

    def happened(self, outcome: str, setting: Setting, lowest: float) -> list[bool]:
        """Whether an outcome of OUTCOMES happened, for each image that it is about."""
        clean, purified = self.clean[setting], self.purified[setting]
        everything = np.ones(len(self.truth), dtype=bool)
        about, event = {
            "flipped": (self.right, clean != self.truth),
            "flipped_unsure": (self.unsure(lowest), clean != self.truth),
            "accuracy": (everything, clean == self.truth),
            "kept": (self.fooled, purified == self.attacked),
            "recovered": (self.fooled, purified == self.truth),
            "attacked_accuracy": (everything, purified == self.truth),
        }[outcome]
        found: list[bool] = event[about].tolist()
        return found


def count(
    answers: Answers, tested: str, tested_scales: Sequence[float], lowest: float
) -> dict[str, Any]:
    """The counts of a family, for JSON.

    Args:
        answers: of all its images and settings; with every setting, λ = 0 of the same rest.
        tested: the outcome whose comparisons with λ = 0 are tests.
        tested_scales: their λ. Holm's correction is over all of them.
        lowest: the share of right images that counts as the least confident.

    Returns:
        settings: for each its outcomes as shares, and for λ > 0 each outcome beside that of λ = 0:
        `won` images met it with guidance alone, `lost` without guidance alone. `tests` has the
        stated ones with p adjusted.
    """
    rows, tests = [], []
    for setting in answers.clean:
        happened = {name: answers.happened(name, setting, lowest) for name in OUTCOMES}
        row: dict[str, Any] = {
            **asdict(setting),
            "outcomes": {name: share(found).as_dict() for name, found in happened.items()},
        }
        if setting.scale:
            beside = {
                name: count_pairs(found, answers.happened(name, setting.unguided, lowest))
                for name, found in happened.items()
            }
            row["against_unguided"] = {name: pairs.as_dict() for name, pairs in beside.items()}
            if setting.scale in tested_scales:
                tests.append((setting, beside[tested]))
        rows.append(row)
    return {
        "images": len(answers.truth),
        "right": share(answers.right.tolist()).as_dict(),
        "fooled": share(answers.fooled[answers.right].tolist()).as_dict(),
        "settings": rows,
        "tests": _adjusted(tests, tested),
    }


def along(answers: Answers, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares at each step of a run, for JSON.

    Args:
        answers: of the family.
        parts: of its first images, part by part, what `labels_along` found for "clean" and
            "attacked".

    Returns:
        clean: `state` and `denoised`, for each step the share of all images that is right.
        attacked: the same of the fooled images; and in `kept` those with the attacker's label.
    """

    def joined(kind: str, what: str) -> list[Labels]:
        steps = [[part[kind][what][k] for part in parts] for k in range(len(parts[0][kind][what]))]
        return [np.array([label for part in step for label in part]) for step in steps]

    found: dict[str, Any] = {"clean": {}, "attacked": {}, "kept": {}}
    for what in ("state", "denoised") if parts else ():
        clean, attacked = joined("clean", what), joined("attacked", what)
        some = slice(0, len(clean[0]))
        truth, first, fooled = answers.truth[some], answers.attacked[some], answers.fooled[some]
        found["clean"][what] = [_shares(labels == truth) for labels in clean]
        found["attacked"][what] = [_shares((labels == truth)[fooled]) for labels in attacked]
        found["kept"][what] = [_shares((labels == first)[fooled]) for labels in attacked]
    return found


def agreement(
    bare: Sequence[dict[str, Any]], fast: Sequence[int], exact: Sequence[int]
) -> dict[str, Any]:
    """How labels in a fast precision compare with those in fp32, for JSON.

    Args:
        bare: `truth` and `bare` of the images, part by part.
        fast: labels of the purified clean images in the fast precision.
        exact: the same in fp32.

    Returns:
        same: the share of equal labels; flipped: of the images that the bare classifier gets right,
        how many flip in both, in the fast precision only (`won`), in fp32 only (`lost`).
    """
    truth = [label for part in bare for label in part["truth"]]
    right = [a == b for part in bare for a, b in zip(part["truth"], part["bare"], strict=True)]
    flips = [
        [label != true for label, true, its in zip(labels, truth, right, strict=True) if its]
        for labels in (fast, exact)
    ]
    same = [a == b for a, b in zip(fast, exact, strict=True)]
    return {"same": share(same).as_dict(), "flipped": count_pairs(*flips).as_dict()}


def _shares(event: Chosen) -> dict[str, Any]:
    return share(event.tolist()).as_dict()


def share(found: Sequence[bool]) -> Proportion:
    """How many of them are true."""
    return Proportion(sum(found), len(found))


def _adjusted(tests: Sequence[tuple[Setting, Paired]], outcome: str) -> list[dict[str, Any]]:
    adjusted = holm([pairs.p for _, pairs in tests])
    return [
        {**asdict(setting), "outcome": outcome, **pairs.as_dict(), "p_holm": p}
        for (setting, pairs), p in zip(tests, adjusted, strict=True)
    ]
