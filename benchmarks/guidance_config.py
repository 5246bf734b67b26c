"""The configuration of the study of guidance; guidance_study.toml says what each entry means."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from guidance_counts import Setting, grid


@dataclass(frozen=True)
class Family:
    """A pair of models and the images that it is asked about.

    Args:
        name: in the report, and of the folder.
        models: "cifar10" for the bundled ones, or "FILE.py:function".
        images: "validation" or "test".
        first: the first image.
        count: how many, at most.
    """

    name: str
    models: str
    images: str
    first: int
    count: int


@dataclass(frozen=True)
class Study:
    """The configuration; guidance_study.toml says what each entry means."""

    seed: int
    steps: int
    solver: str
    precision: str
    t_star: list[float]
    forward_noise: list[bool]
    scales: list[float]
    guidance_solvers: list[str]
    lowest: float
    part: int
    stiff_images: int
    attack: dict[str, Any]
    tests: dict[str, Any]
    states: dict[str, Any]
    check: dict[str, Any]
    family: list[dict[str, Any]]

    @property
    def settings(self) -> list[Setting]:
        """Every purification."""
        return grid(self.t_star, self.forward_noise, self.scales, self.guidance_solvers)

    @property
    def rules(self) -> dict[str, Any]:
        """The configuration without its families."""
        return {name: value for name, value in asdict(self).items() if name != "family"}

    @property
    def numbers(self) -> dict[str, Any]:
        """What the answers to one image under one setting follow from, its models left out."""
        names = ("seed", "steps", "solver", "precision", "attack", "stiff_images")
        return {name: self.rules[name] for name in names}


def chosen(table: dict[str, Any]) -> list[Setting]:
    """The settings that a table of the configuration is about."""
    names = ("t_star", "forward_noise", "scales", "guidance_solvers")
    return grid(*(table[name] for name in names))
