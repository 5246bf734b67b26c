"""The picture of `coup-fast toy`: trajectories of both flows, and label shift against the start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from coup_fast.cli import toy_run
from coup_fast.files import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALONE, GUIDED = "#c4342d", "#1b6ca8"
_LEFT, _RIGHT, _CROSSED = "#6a9fd4", "#7fb77e", "#c4342d"
_PATHS = 32


def draw(toy: toy_run.Toy, samples: int, path: Path) -> None:
    """Simulate paths and the shift curve and save the figure (.png or .svg)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9.6, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
    upper = [figure.add_subplot(grid[0, 0])]
    upper.append(figure.add_subplot(grid[0, 1], sharey=upper[0]))
    starts = torch.linspace(-0.6, 0.6, _PATHS)
    titles = ("score flow without guidance", f"guided flow, λ = {toy.guidance_scale:g}")
    for axis, title, positions in zip(upper, titles, toy_run.paths(toy, starts), strict=True):
        _trajectories(axis, toy, positions)
        axis.set_title(title)
    upper[0].set_ylabel("position x")
    _shift_curve(figure.add_subplot(grid[1, :]), toy, samples)
    write_figure(path, figure, dpi=160)
    plt.close(figure)


def _trajectories(axis: Axes, toy: toy_run.Toy, positions: torch.Tensor) -> None:
    """Paths [steps + 1, N] against diffusion time, those that cross drawn on top."""
    steps = positions.shape[0] - 1
    time = np.linspace(toy.t_star, 0.0, steps + 1)
    crossed = toy_run.side(positions[0]) != toy_run.side(positions[-1])
    right = toy_run.side(positions[0])
    for i in torch.argsort(crossed.int()).tolist():
        colour = _CROSSED if crossed[i] else _RIGHT if right[i] else _LEFT
        axis.plot(time, positions[:, i], color=colour, lw=1.1 if crossed[i] else 0.8, alpha=0.9)
    for colour, label in ((_RIGHT, "starts right"), (_LEFT, "starts left"), (_CROSSED, "crosses")):
        axis.plot([], [], color=colour, lw=2, label=label)
    mean, std = toy.mean, toy.std
    for sign in (-1, 1):
        axis.axhspan(sign * mean - std, sign * mean + std, color="black", alpha=0.06, lw=0)
    axis.axhline(0, color="black", lw=0.8, ls="--")
    axis.set_xlim(toy.t_star, 0)
    axis.set_ylim(-1.1, 1.1)
    axis.set_xlabel("diffusion time t")
    axis.text(
        0.015 * toy.t_star,
        0.0,
        f"{int(crossed.sum())} of {positions.shape[1]} cross",
        ha="right",
        va="bottom",
        fontsize=9,
        color=_CROSSED,
        bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
    )
    axis.legend(loc="lower left", fontsize=8, framealpha=0.9, ncols=3)
    axis.spines[["top", "right"]].set_visible(False)


def _shift_curve(axis: Axes, toy: toy_run.Toy, samples: int) -> None:
    """Label shift rate against the start position, with 95 % bands, over the data's density."""
    grid, curves = toy_run.shift_curve(toy, 76, 3 * samples)
    x = grid.numpy()
    for curve, colour, label in zip(
        curves, (ALONE, GUIDED), ("score flow without guidance", "guided flow"), strict=True
    ):
        low, high = np.array([point.interval() for point in curve]).T
        axis.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.2, lw=0)
        axis.plot(x, [100 * point.rate for point in curve], color=colour, lw=1.8, label=label)
    density = sum(np.exp(-0.5 * ((x - sign * toy.mean) / toy.std) ** 2) for sign in (-1, 1))
    top = axis.get_ylim()[1]
    axis.fill_between(
        x,
        0,
        0.35 * top * density / np.max(density),
        color="black",
        alpha=0.08,
        lw=0,
        label="data density (arbitrary scale)",
    )
    axis.axvline(0, color="black", lw=0.8, ls="--")
    axis.set_xlim(float(x[0]), float(x[-1]))
    axis.set_ylim(0, top)
    axis.set_xlabel("start position x")
    axis.set_ylabel("label shift (%)")
    axis.set_title("share of points that end on the other side, by where they start")
    axis.legend(loc="upper right", fontsize=9, framealpha=0.9)
    axis.spines[["top", "right"]].set_visible(False)
