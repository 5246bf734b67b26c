"""The bundled models as commands use them: the right score network for a method, plain errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coup_fast.cli.common import CommandError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from coup_fast import ScoreModel

# Channels, height and width of the images each bundled set takes.
IMAGE_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def score_for(method: str) -> str:
    """Which score network a method runs on: ADP on an NCSN, the others on the VP network."""
    return "ncsn" if method == "adp" else "vp"


def settings_for(method: str, name: str) -> dict[str, Any]:
    """The options chosen for a method on a bundled set; none where there are none."""
    from coup_fast.models.bundled import bundled_settings

    options: dict[str, Any] = bundled_settings(name)["methods"].get(method, {})
    return options


def load(name: str, score: str, device: torch.device) -> tuple[ScoreModel, nn.Module]:
    """Bundled score model and classifier on `device`."""
    from coup_fast.models.bundled import load_bundled

    try:
        return load_bundled(name, score=score, device=device)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
