"""Models and images of the gradient benchmarks: the bundled digits, or random smooth networks."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coup_fast import ScoreModel, load_bundled
from coup_fast.models import Classifier, UNet

Models = tuple[ScoreModel, nn.Module, Tensor]


class Sharpened(nn.Module):
    """A classifier whose logits are multiplied by a constant: 1 leaves it as it is."""

    def __init__(self, classifier: nn.Module, sharpness: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.sharpness = sharpness

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits: Tensor = self.sharpness * self.classifier(images)
        return logits


def random_models(batch: int) -> Models:
    """A U-Net and a classifier of 3x32x32 with random weights, and smooth random images."""
    torch.manual_seed(0)
    network = UNet(3, (16, 32, 32))
    for parameter in network.parameters():
        if (
            parameter.ndim > 1
        ):  # the published initialisation has zeros; these networks do something
            nn.init.orthogonal_(parameter, gain=1.0)
    classifier = Classifier(3, 10, size=32, width=16)
    images = torch.nn.functional.interpolate(
        torch.rand(batch, 3, 8, 8), size=32, mode="bilinear", align_corners=False
    )
    return ScoreModel(network).eval(), classifier.eval(), images


def bundled_models(batch: int) -> Models:
    """The bundled MNIST models and held-out digits."""
    from coup_fast.data.digits import demo_digits

    score_model, classifier = load_bundled("mnist")
    images, _ = demo_digits(batch)
    return score_model.eval(), classifier.eval(), images


MODELS: dict[str, Callable[[int], Models]] = {"random": random_models, "bundled": bundled_models}


def parser(description: str | None, batch: int) -> argparse.ArgumentParser:
    """The options that both benchmarks share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--models", choices=MODELS, default="bundled")
    result.add_argument("--batch", type=int, default=batch, help="images")
    result.add_argument("--threads", type=int, default=1)
    return result
