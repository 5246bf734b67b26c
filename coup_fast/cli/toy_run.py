"""The simulations behind `coup-fast toy`: images of one pixel through the ordinary `Purifier`.

A pixel u in [0, 1] is the position x = 2u - 1 in [-1, 1]; the class boundary is x = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coup_fast import Purifier, ScoreModel
from coup_fast.evaluation.intervals import Proportion
from coup_fast.models.analytic import (
    GaussianMixture,
    MixtureClassifier,
    MixtureNetwork,
    two_gaussians,
)

NEAR = 0.25  # start points this close to the boundary are "near"
CHUNK = 65536
RUNS = 6  # of a flow: two from each set of start points, two for the curve


@dataclass(frozen=True)
class Toy:
    """Both flows of one setting. done: called after each run of a flow."""

    guidance_scale: float
    t_star: float
    seed: int
    done: Callable[[], object] = lambda: None

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The data: one Gaussian per class."""
        return two_gaussians()

    @property
    def mean(self) -> float:
        """Distance of each mode from the boundary."""
        return float(self.mixture.means.abs().max())

    @property
    def std(self) -> float:
        """Standard deviation of each mode."""
        return float(self.mixture.stds.max())

    def purifier(self, guidance_scale: float) -> Purifier:
        """COUP on the mixture's exact score and classifier."""
        return Purifier(
            ScoreModel(MixtureNetwork(self.mixture), "eps", time_scale=1.0),
            MixtureClassifier(self.mixture),
            method="coup",
            seed=self.seed,
            t_star=self.t_star,
            guidance_scale=guidance_scale,
        )

    @cached_property
    def flows(self) -> tuple[Purifier, Purifier]:
        """Score flow alone, guided flow."""
        return self.purifier(0.0), self.purifier(self.guidance_scale)

    def ends(self, x: Tensor) -> list[Tensor]:
        """End points [N] of both flows from start points [N]."""
        found = []
        for flow in self.flows:
            found.append(run_flow(flow, x))
            self.done()
        return found

    def describe(self) -> str:
        """The setting in words."""
        steps = self.flows[0].plan.num_steps
        return (
            f"means -{self.mean:g} and {self.mean:g}, standard deviation {self.std:g}; "
            f"t* {self.t_star:g}, {steps} steps, lambda {self.guidance_scale:g}, seed {self.seed}"
        )


def to_images(x: Tensor) -> Tensor:
    """Positions [N] in [-1, 1] as images [N, 1, 1, 1] in [0, 1]."""
    return (0.5 * x + 0.5)[:, None, None, None]


def to_positions(images: Tensor) -> Tensor:
    """The way back, [N, 1, 1, 1] -> [N]."""
    return 2.0 * images.flatten() - 1.0


def side(x: Tensor) -> Tensor:
    """The label of a position under the exact classifier: which side of the boundary."""
    return x > 0


def run_flow(purifier: Purifier, x: Tensor) -> Tensor:
    """End points [N] of start points [N]; sample ids are positions in x."""
    ends = []
    for start in range(0, len(x), CHUNK):
        part = to_images(x[start : start + CHUNK])
        ids = torch.arange(start, start + len(part))
        ends.append(to_positions(purifier(part, sample_ids=ids)))
    return torch.cat(ends)


@dataclass(frozen=True)
class Shift:
    """Label shift of both flows from one set of start points, and where their end points lie.

    modes: for each flow the shares of end points on the left and on the right that lie within
    three standard deviations of that side's mean.
    """

    starts: str
    alone: Proportion
    guided: Proportion
    modes: tuple[tuple[float, float], tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "starts": self.starts,
            "score_flow_alone": self.alone.as_dict(),
            "guided_flow": self.guided.as_dict(),
            "share_at_left_and_right_mode": {
                "score_flow_alone": self.modes[0],
                "guided_flow": self.modes[1],
            },
        }


def start_points(toy: Toy, samples: int) -> dict[str, Tensor]:
    """Start points [samples] by name: the data itself, and uniform near the boundary."""
    generator = np.random.default_rng(toy.seed)
    data = generator.choice([-1.0, 1.0], samples) * toy.mean
    data += toy.std * generator.standard_normal(samples)
    near = generator.uniform(-NEAR, NEAR, samples)
    return {
        "drawn from the data": torch.from_numpy(data.clip(-1, 1)).float(),
        f"within {NEAR:g} of the boundary": torch.from_numpy(near).float(),
    }


def _modes(toy: Toy, x: Tensor) -> tuple[float, float]:
    distance = (x.abs() - toy.mean).abs() <= 3 * toy.std
    return float((distance & ~side(x)).float().mean()), float((distance & side(x)).float().mean())


def label_shifts(toy: Toy, samples: int) -> list[Shift]:
    """Both flows from every set of start points, with the same noise."""
    result = []
    for name, x in start_points(toy, samples).items():
        ends = toy.ends(x)
        alone, guided = (Proportion(int((side(e) != side(x)).sum()), samples) for e in ends)
        modes = (_modes(toy, ends[0]), _modes(toy, ends[1]))
        result.append(Shift(name, alone, guided, modes))
    return result


def mode_sentence(shift: Shift) -> str:
    """What became of the two modes, in words."""
    (left0, right0), (left1, right1) = shift.modes
    return (
        f"Points {shift.starts} end at the left / right mode (within three standard deviations): "
        f"{100 * left0:.1f} % / {100 * right0:.1f} % by the score flow without guidance, "
        f"{100 * left1:.1f} % / {100 * right1:.1f} % by the guided flow."
    )


def shift_curve(toy: Toy, points: int, samples: int) -> tuple[Tensor, list[list[Proportion]]]:
    """Label shift against the start: positions [points], and per flow one proportion for each."""
    grid = torch.linspace(-0.95, 0.95, points)
    each = max(1, samples // points)
    x = grid.repeat_interleave(each)
    curves = []
    for ends in toy.ends(x):
        shifted = (side(ends) != side(x)).reshape(points, each).sum(1)
        curves.append([Proportion(int(count), each) for count in shifted])
    return grid, curves


def paths(toy: Toy, starts: Tensor) -> Iterator[Tensor]:
    """For each flow the positions [steps + 1, N] on the way from `starts` [N]."""
    for flow in toy.flows:
        states = [to_positions(state) for _, state in flow.trajectory(to_images(starts))]
        yield torch.stack(states)
