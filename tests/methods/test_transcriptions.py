"""COUP and ADP against their algorithms written out directly in float64, with the same noise.

The loops below are those of docs/methods.md, COUP and ADP, in PyTorch's own operations; they share
nothing with the package.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor

from coup_fast import Purifier, ScoreModel, _extension

BACKENDS = [
    "float64",
    pytest.param(
        "compiled", marks=pytest.mark.skipif(not _extension.available(), reason="not compiled")
    ),
    "reference",
]


def coup_by_hand(u: Tensor, noise: Tensor, network, classifier, scale: float) -> Tensor:
    x, t, end, h = (2 * u - 1).clamp(-1, 1), 0.1, 1e-5, 1e-3
    for z in noise:
        step = min(h, t - end)
        beta, sigma = 0.1 + 19.9 * t, math.sqrt(1 - math.exp(-9.95 * t**2 - 0.1 * t))
        with torch.no_grad():
            score = -network(x, torch.full((len(x),), 999 * t, dtype=x.dtype)) / sigma
        leaf = x.clone().requires_grad_()
        confidence = torch.log_softmax(classifier((leaf + 1) / 2), dim=1).max(dim=1).values
        (g,) = torch.autograd.grad(confidence.sum(), leaf)
        x = x + step * (0.5 * beta * x + beta * (score + scale * g)) + math.sqrt(beta * step) * z
        t -= step
    assert abs(t - end) < 1e-12
    return (x.clamp(-1, 1) + 1) / 2


def adp_by_hand(u: Tensor, noise: Tensor, network) -> tuple[Tensor, Tensor]:
    x = (u + 0.25 * noise[0]).clamp(0, 1) * 255 / 256 + 1 / 512
    results, alive_steps = [], torch.zeros(len(u), dtype=torch.long)
    for i in range(len(u)):  # one image at a time: its loop ends when it is no longer alive
        y, zero = x[i : i + 1], torch.zeros(1)
        for _ in range(10):
            with torch.no_grad():
                h = network(y, zero)
                ahead = network(y + 1e-3 * h, zero)
            gamma = (h * ahead).sum() / (h * h).sum()
            alpha = (0.05 * 1e-3 / (1 - gamma)).clamp(1e-5, 1e-1)
            if not alpha > 1e-3:
                break
            y = ((y + alpha * h) * 256 / 255 - 1 / 510).clamp(0, 1)
            alive_steps[i] += 1
        results.append(y)
    return torch.cat(results), alive_steps


def agree(got: Tensor, want: Tensor, backend: str, tolerance: float) -> None:
    tolerance = 1e-12 if backend == "float64" else tolerance
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_coup(backend: str, scale: float) -> None:
    network, classifier = TinyNetwork().double(), TinyClassifier().double()
    u, noise = images().double(), torch.randn(100, 3, 3, 8, 8).double()
    want = coup_by_hand(u, noise, network, classifier, scale)
    if backend == "float64":
        clean = Purifier(ScoreModel(network), classifier, guidance_scale=scale)
    else:
        clean = Purifier(
            ScoreModel(TinyNetwork()), TinyClassifier(), guidance_scale=scale, backend=backend
        )
        u, noise = u.float(), noise.float()
    agree(clean(u, noise=noise), want, backend, 1e-5)


class Stiffening(TinyNetwork):
    """Pulls so hard near the centre that images stop there, one after the other."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        offset = 0.5 - x
        spread = offset.square().flatten(1).mean(1).reshape(-1, 1, 1, 1)
        return super().forward(x, t) + torch.where(spread < 0.06, 60.0, 0.0) * offset


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network_type", [TinyNetwork, Stiffening])
def test_adp(backend: str, network_type: type) -> None:
    network = network_type(pull=6.0).double()
    u = images(6).double()
    u = 0.5 + (u - 0.5) * torch.linspace(0.2, 1.0, 6).double().reshape(-1, 1, 1, 1)
    noise = torch.randn(1, 6, 3, 8, 8).double()
    want, alive_steps = adp_by_hand(u, noise, network)
    if network_type is Stiffening:
        assert alive_steps.min() < alive_steps.max()
    else:
        assert alive_steps.min() == 10
    model = ScoreModel(network, kind="ncsn")
    if backend == "float64":
        clean = Purifier(model, method="adp")
    else:
        clean = Purifier(ScoreModel(network.float(), kind="ncsn"), method="adp", backend=backend)
        u, noise = u.float(), noise.float()
    # α divides a difference of nearly equal scores, which costs float32 three digits.
    agree(clean(u, noise=noise), want, backend, 2e-4)
