"""Models and images of the gradient benchmarks.

"bundled": the models that come with the package. "digits": no trained score network, but the exact
score of a Gaussian mixture fitted to real digits, one component per class, with a classifier
trained for half a minute. "random": a U-Net with random weights, for memory and time alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coup_fast import ScoreModel, load_bundled
from coup_fast.models import Classifier, UNet
from coup_fast.schedules import VPSchedule

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


class DigitsScore(nn.Module):
    """ε(x, 999 t) of the mixture Σ_k ⅒ N(μ_k, Σ_k) under the VP process, x = 2u - 1 of digits u.

    Σ_k is a class's covariance plus `width`² I. s = -Σ_k w_k(x) (ᾱΣ_k + σ²)⁻¹ (x - √ᾱ μ_k) and
    ε = -σ s, in eigenvectors of Σ_k.
    """

    def __init__(self, images: Tensor, labels: Tensor, width: float = 0.1) -> None:
        super().__init__()
        self.schedule = VPSchedule()
        classes = [2.0 * images[labels == k].flatten(1).double() - 1.0 for k in range(10)]
        values, vectors = torch.linalg.eigh(torch.stack([torch.cov(x.T) for x in classes]))
        self.register_buffer("means", torch.stack([x.mean(0) for x in classes]).float())
        self.register_buffer("values", (values.clamp_min(0.0) + width**2).float())
        self.register_buffer("vectors", vectors.float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, 1, 28, 28], t: [B], the same for all."""
        alpha_bar = float(self.schedule.alpha_bar(float(t[0]) / 999.0))
        variances = alpha_bar * self.values + (1.0 - alpha_bar)  # [10, n]
        gaps = x.flatten(1) - alpha_bar**0.5 * self.means[:, None]  # [10, B, n]
        along = torch.bmm(gaps, self.vectors)
        pull = along / variances[:, None]
        log_weight = -0.5 * ((along * pull).sum(2) + variances.log().sum(1, keepdim=True))
        weights = torch.softmax(log_weight, dim=0)[..., None]
        score = -(weights * torch.bmm(pull, self.vectors.mT)).sum(0)
        return (-((1.0 - alpha_bar) ** 0.5) * score).view_as(x)


def digits_models(batch: int) -> Models:
    """The mixture's score, a classifier of real digits, and digits that neither has seen."""
    from coup_fast.data.digits import demo_digits

    torch.manual_seed(0)
    images, labels = demo_digits(2500, split="validation")
    classifier = Classifier(1, 10, width=8, hidden=64)
    optimiser = torch.optim.Adam(classifier.parameters(), 2e-3)
    for step in range(400):
        rows = torch.randint(len(images), (64,))
        noisy = images[rows] + 0.2 * torch.rand(1) * torch.randn(images[rows].shape)
        loss = nn.functional.cross_entropy(classifier(noisy), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        optimiser.step()
    score_model = ScoreModel(DigitsScore(images, labels))
    return score_model.eval(), classifier.eval(), demo_digits(batch)[0]


MODELS: dict[str, Callable[[int], Models]] = {
    "bundled": bundled_models,
    "digits": digits_models,
    "random": random_models,
}


def parser(description: str | None, batch: int, models: str) -> argparse.ArgumentParser:
    """The options that both benchmarks share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--models", choices=MODELS, default=models)
    result.add_argument("--batch", type=int, default=batch, help="images")
    result.add_argument("--threads", type=int, default=1)
    return result
