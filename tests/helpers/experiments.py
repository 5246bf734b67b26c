"""Experiments of the page on tiny networks. Not a test."""

from __future__ import annotations

from typing import Any

import torch

from coup_fast.app.bench import Bench
from coup_fast.app.experiment import Choices, Progress, Result, experiment
from coup_fast.app.pictures import Chosen
from helpers import tiny


def tiny_bench(*kinds: str, classifier: bool = True, **options: Any) -> Bench:
    """A bench of tiny networks for pictures of 3x8x8."""
    return Bench(
        score_models=[tiny.score_model(kind) for kind in kinds or ("eps",)],
        classifier=tiny.TinyClassifier() if classifier else None,
        channels=3,
        size=(8, 8),
        name="tiny",
        device=torch.device("cpu"),
        **options,
    )


PICTURE = Chosen("a picture", tiny.images(1)[0])


def run(bench: Bench, choices: Choices, chosen: Chosen = PICTURE) -> tuple[list[Progress], Result]:
    *progress, result = experiment(bench, chosen, choices)
    assert isinstance(result, Result)
    assert all(isinstance(item, Progress) for item in progress)
    return progress, result  # type: ignore[return-value]
