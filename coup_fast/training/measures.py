"""What a network has learnt, on images that it was not trained on: numbers and a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.training.batches import as_pixels, generator_for
from coup_fast.training.classifier import count_correct
from coup_fast.training.data import TrainingData
from coup_fast.training.dsm import VPNoise, ncsn_error, vp_error
from coup_fast.training.recipes import Recipe

TIMES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)  # where a VP model's error is reported
_MOST = 1000  # images of a report
_STRIP = 8  # pictures in a row of a strip


def levels_of(kind: str, recipe: Recipe) -> list[float]:
    """The noise levels that are reported: times, or for kind "ncsn" standard deviations."""
    if kind == "ncsn":
        return recipe.ncsn.levels()[:: max(1, recipe.ncsn.num_levels // 8)].tolist()
    return [t for t in TIMES if t <= recipe.vp.t_max]


def final_report(
    kind: str, recipe: Recipe, network: nn.Module, data: TrainingData
) -> dict[str, Any]:
    """Accuracy on unseen images, or the error per noise level on training and held-out images.

    It is measured where the network is.
    """
    device = next(network.parameters()).device
    if kind == "classifier":
        unseen, labels = data.held_out.images, data.held_out.labels
        assert labels is not None
        right = count_correct(network, unseen.to(device), labels.to(device))
        return {"split": data.split, "correct": right, "images": len(unseen)}
    levels = levels_of(kind, recipe)
    held_out = as_pixels(data.held_out.images[:_MOST]).to(device)
    seen = as_pixels(data.train.images[: len(held_out)]).to(device)
    return {
        "level": [round(level, 4) for level in levels],
        "train": error_per_level(network, seen, kind, levels),
        "held_out": error_per_level(network, held_out, kind, levels),
    }


def running_report(
    kind: str, recipe: Recipe, network: nn.Module, data: TrainingData, count: int
) -> dict[str, float]:
    """The same on `count` held-out images, by name, for a log."""
    images, labels = data.held_out.images[:count], data.held_out.labels
    device = next(network.parameters()).device
    if kind == "classifier":
        assert labels is not None
        right = count_correct(network, images.to(device), labels[:count].to(device))
        return {"held-out accuracy": right / len(images)}
    levels = levels_of(kind, recipe)
    errors = error_per_level(network, as_pixels(images).to(device), kind, levels)
    name = "sigma" if kind == "ncsn" else "t"
    return {
        f"held-out error, {name}={level:.3g}": error
        for level, error in zip(levels, errors, strict=True)
    }


@torch.no_grad()
def strip(kind: str, recipe: Recipe, network: nn.Module, images: Tensor) -> Tensor:
    """Held-out images, and below them for three noise levels the noisy and the denoised ones.

    images: [N, C, H, W], of which the first eight are shown. Returns pixels [C, 7 H, 8 W] in [0, 1]
    on the CPU. Denoised is E[x0 | x], the estimate after one call of the network.
    """
    device = next(network.parameters()).device
    clean = as_pixels(images[:_STRIP]).to(device)
    levels = levels_of(kind, recipe)
    rows = [clean]
    z = torch.randn(clean.shape, generator=generator_for(0, "strip", 0)).to(device)
    for level in (levels[len(levels) // 4], levels[len(levels) // 2], levels[-1]):
        if kind == "ncsn":
            noisy = clean + level * z
            denoised = noisy + level * network(noisy, torch.zeros(len(clean), device=device))
        else:
            noise = recipe.vp
            t = torch.full((len(clean),), level, dtype=torch.float64, device=device)
            alpha_bar = float(noise.alpha_bar(t[0]))
            signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            x = signal * (2 * clean - 1) + sigma * z
            out = network(x, (t * noise.time_scale).float()).float()
            eps = out if kind == "eps" else -sigma * out
            noisy, denoised = (x / signal + 1) / 2, ((x - sigma * eps) / signal + 1) / 2
        rows += [noisy, denoised]
    pictures = torch.stack([row.float().clamp(0, 1) for row in rows])  # [7, N, C, H, W]
    return pictures.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).cpu()


@torch.no_grad()
def error_per_level(
    network: nn.Module, images: Tensor, kind: str, levels: list[float], batch: int = 250
) -> list[float]:
    """Mean squared error of the noise at each level, with fixed noise.

    images: [N, C, H, W] float32 in [0, 1]. levels: times t, or for kind "ncsn" standard deviations
    in pixel space.
    """
    z = torch.randn(images.shape, generator=generator_for(0, "report", 0)).to(images.device)
    noise, errors = VPNoise(), []
    for level in levels:
        total = 0.0
        for x, normal in zip(torch.split(images, batch), torch.split(z, batch), strict=True):
            at = torch.full((len(x),), level, dtype=torch.float64, device=x.device)
            if kind == "ncsn":
                total += float(ncsn_error(network, x, at, normal).sum())
            else:
                total += float(vp_error(network, x, at, normal, noise, kind).sum())
        errors.append(round(total / len(images), 5))
    return errors
