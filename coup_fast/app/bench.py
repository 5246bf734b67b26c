"""The networks that the page runs on, the methods that they can run, and where each starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from coup_fast import Purifier, ScoreModel, methods
from coup_fast.plan import AnyPlan

MAX_STEPS = 1500  # of one run (langevin), so that a slip of the keyboard does not block the page
MAX_VALUES = 2**26  # of all states that one run keeps: 256 MiB


@dataclass(frozen=True)
class Bench:
    """What a page runs on.

    score_models: of several kinds where there are; a method takes the first that suits it.
    classifier: pixels [B, C, H, W] -> logits [B, K], or None: no guidance, attack or probabilities.
    channels: of the pictures that the networks take. size: their height and width; None: any.
    name: of the networks, for the heading. settings: options chosen for these networks, by method.
    epsilon: radius of the attack that the page begins with, as the user would write it.
    classes: names of the classifier's classes; others are called by their number.
    """

    score_models: Sequence[ScoreModel]
    classifier: nn.Module | None
    channels: int
    size: tuple[int, int] | None
    name: str
    device: torch.device
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epsilon: str = "8/255"
    classes: Sequence[str] = ()

    @cached_property
    def methods(self) -> dict[str, ScoreModel]:
        """The methods that these networks can run, each with its score model."""
        found = {}
        for name in methods.METHODS:
            for model in self.score_models:
                try:
                    methods.plan(name, model.schedule, model.kind, **self.start(name, model))
                except (ValueError, TypeError):
                    continue  # a method for networks of another kind
                found[name] = model
                break
        return found

    def start(self, method: str, model: ScoreModel | None = None) -> dict[str, Any]:
        """The options that a method starts with: those chosen for these networks, or published.

        A published t* beyond what the network was trained for starts at the latest time that it
        was trained for, and λ is 0 where there is no classifier.
        """
        model = model or self.methods[method]
        published = methods.options(method)
        options = dict(self.settings.get(method, {}))
        t_star = options.get("t_star", published.get("t_star"))
        if t_star is not None and t_star > (model.t_max or 1.0):
            options["t_star"] = model.t_max
        if "image_shape" in published and self.size is not None:
            options["image_shape"] = (self.channels, *self.size)
        if "guidance_scale" in published and self.classifier is None:
            options["guidance_scale"] = 0.0
        return options

    def shown_options(self, method: str) -> dict[str, Any]:
        """What the page lets one change, with the values it starts from: t*, steps, λ, solver.

        Only those that the method has; steps are counted where it has no number by default.
        """
        published = methods.options(method)
        options = published | self.start(method)
        if "num_steps" in options:
            options["num_steps"] = self._plan(method, self.start(method)).num_steps
        if self.classifier is None:
            options.pop("guidance_scale", None)
        if options.get("t_star") is None:
            options.pop("t_star", None)
        names = ("t_star", "num_steps", "guidance_scale", "solver")
        return {name: options[name] for name in names if name in options}

    def purifier(
        self, method: str, options: Mapping[str, Any], seed: int, shape: Sequence[int]
    ) -> Purifier:
        """The purifier of a run on a picture [C, H, W].

        Raises ValueError or TypeError as `Purifier` does, and ValueError for a run that is longer
        than the page allows.
        """
        missing = [name for name, value in {**options, "seed": seed}.items() if value is None]
        if missing:
            raise ValueError(f"{missing[0]} is empty: it needs a number")
        if method not in self.methods:
            raise ValueError(
                f"these networks do not run {method!r}; they run {', '.join(self.methods)}"
            )
        all_options = self.start(method) | dict(options)
        if "image_shape" in methods.options(method):
            all_options["image_shape"] = tuple(shape)
        purifier = Purifier(
            self.methods[method], self.classifier, method=method, seed=seed, **all_options
        )
        check_length(purifier.plan, shape)
        return purifier

    def class_name(self, number: int) -> str:
        """What a class is called."""
        return self.classes[number] if number < len(self.classes) else f"class {number}"

    def _plan(self, method: str, options: Mapping[str, Any]) -> AnyPlan:
        model = self.methods[method]
        return methods.plan(method, model.schedule, model.kind, **options)


def check_length(plan: AnyPlan, shape: Sequence[int]) -> None:
    """Raises ValueError for a run of more steps than the page allows for a picture [C, H, W]."""
    channels, height, width = shape
    most = min(MAX_STEPS, MAX_VALUES // (channels * height * width))
    if plan.num_steps > most:
        raise ValueError(
            f"the run has {plan.num_steps:,} steps, and the page keeps the picture after each: at "
            f"most {most:,} at {height} × {width} pixels"
        )
