"""The published methods in float64, transcribed from papers and released code. Not a test.

They share nothing with the package: each is a loop over images in PyTorch's own operations, given
the noise tensors in order of need and every option by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Options = dict[str, Any]


@dataclass
class Model:
    """A score network and a classifier, with what has to be known of them.

    beta: (beta_min, beta_max) of the continuous process, and betas: of the chain. indexed: the
    network is told indices of the chain, else times. Every time it is told is noted in `told`.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    classifier: Callable[[Tensor], Tensor]
    kind: str
    beta: tuple[float, float]
    betas: np.ndarray
    indexed: bool
    told: list[float] = field(default_factory=list)

    def alpha_bar(self, t: float) -> float:
        low, high = self.beta
        return math.exp(-0.5 * (high - low) * t * t - low * t)

    def chain(self, index: float) -> float:
        """ᾱ of the chain, its logarithm linear between indices; 1 at index -1."""
        logs = np.concatenate([[0.0], np.cumsum(np.log1p(-self.betas))])
        return math.exp(np.interp(index + 1, np.arange(len(logs)), logs))

    def output(self, x: Tensor, time: float) -> Tensor:
        self.told.append(time)
        return self.network(x, torch.full((len(x),), time, dtype=torch.float64))

    def at_time(self, x: Tensor, t: float) -> Tensor:
        if not self.indexed:
            return self.output(x, 999 * t)
        return self.output(x, min(math.floor(len(self.betas) * t + 1e-6), len(self.betas) - 1))

    def at_index(self, x: Tensor, index: int) -> Tensor:
        return self.output(x, index if self.indexed else 0.999 * (index + 1))

    def eps(self, out: Tensor, x: Tensor, alpha_bar: float) -> Tensor:
        sigma = math.sqrt(1 - alpha_bar)
        if self.kind == "x0":
            return (x - math.sqrt(alpha_bar) * out) / sigma
        return -sigma * out if self.kind == "score" else out

    def guidance(self, x: Tensor, o: Options) -> Tensor:
        """λ ∇ₓ log max_y p(y | x), normalised or clipped per image."""
        if o["guidance_scale"] == 0:
            return torch.zeros_like(x)
        leaf = x.detach().requires_grad_()
        confidence = torch.log_softmax(self.classifier((leaf + 1) / 2), 1).max(1).values.sum()
        (g,) = torch.autograd.grad(confidence, leaf)
        norm = g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        if o["guidance_norm"] == "normalised":
            g = g / norm
        elif o["guidance_norm"] == "clipped":
            g = g * (o["guidance_max_norm"] / norm).clamp(max=1)
        return o["guidance_scale"] * g


def diffuse(x: Tensor, alpha_bar: float, z: Tensor) -> Tensor:
    return math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * z


def pixels(x: Tensor, clamp: bool) -> Tensor:
    return ((x.clamp(-1, 1) if clamp else x) + 1) / 2


def reverse_sde(u: Tensor, noise: Sequence[Tensor], model: Model, o: Options, ode: bool) -> Tensor:
    """COUP, DiffPure (diffpure_sde.py: t* to 1e-5, next_t = min(t + dt, end)) and its ODE."""
    z, x, t = iter(noise), 2 * u - 1, o["t_star"]
    if o["forward_noise"]:
        x = diffuse(x, model.chain(t * len(model.betas) - 1), next(z))
    while t > 1e-5:
        after = t - o["step_size"] if t - o["step_size"] > 1e-5 + 1e-12 else 1e-5
        h, alpha_bar, later = t - after, model.alpha_bar(t), model.alpha_bar(after)
        sigma, low, high = math.sqrt(1 - alpha_bar), *model.beta
        beta = low + (high - low) * t
        eps = model.eps(model.at_time(x, t), x, alpha_bar)
        x0 = (x - sigma * eps) / math.sqrt(alpha_bar)
        if o["clip_denoised"]:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(alpha_bar) * x0) / sigma
        score = -eps / sigma + model.guidance(x, o)
        x0 = (x + sigma**2 * score) / math.sqrt(alpha_bar)
        if o["solver"] == "euler" and ode:
            x = x + h * (0.5 * beta * x + 0.5 * beta * score)
        elif o["solver"] == "euler":
            x = x + h * (0.5 * beta * x + beta * score) + math.sqrt(beta * h) * next(z)
        elif ode:  # the score held: DDIM
            x = math.sqrt(later) * x0 - math.sqrt(1 - later) * sigma * score
        else:  # x̂0 held: q(x' | x, x̂0)
            x = posterior_mean(x, x0, alpha_bar, later)
            x = x + math.sqrt(posterior_variance(alpha_bar, later)) * next(z)
        t = after
    assert next(z, None) is None
    return pixels(x, o["clamp_output"])


def ldsde(u: Tensor, noise: Sequence[Tensor], model: Model, o: Options) -> Tensor:
    """diffpure_ldsde.py: drift -½λ(-s + (x - x_init)/σ²) with the score at 0.01, diffusion η√λ."""
    z, reference = iter(noise), 2 * u - 1
    x, t, alpha_bar = reference, o["t_star"], model.alpha_bar(0.01)
    while t > 1e-5:
        after = t - o["step_size"] if t - o["step_size"] > 1e-5 + 1e-12 else 1e-5
        eps = model.eps(model.at_time(x, 0.01), x, alpha_bar)
        score = -eps / math.sqrt(1 - alpha_bar) + model.guidance(x, o)
        drift = -0.5 * o["lambda_ld"] * (-score + (x - reference) / o["sigma2"])
        x = x + (t - after) * drift
        x = x + o["eta"] * math.sqrt(o["lambda_ld"] * (t - after)) * next(z)
        t = after
    return pixels(x, o["clamp_output"])


def posterior_mean(x: Tensor, x0: Tensor, now: float, then: float) -> Tensor:
    beta = 1 - now / then
    return (math.sqrt(then) * beta * x0 + math.sqrt(1 - beta) * (1 - then) * x) / (1 - now)


def posterior_variance(now: float, then: float) -> float:
    return (1 - now / then) * (1 - then) / (1 - now)


def down(
    x: Tensor,
    z: Iterator[Tensor],
    model: Model,
    o: Options,
    used: Sequence[int],
    reference: Tensor | None = None,
) -> Tensor:
    """The chain from used[-1] down: guided-diffusion's p_sample and ddim_sample, GDMP's denoise.

    With "eta" among the options DDIM, else ancestral; GDMP with a reference.
    """
    bars = [1.0, *(model.chain(i) for i in used)]
    for k in range(len(used), 0, -1):
        now, then = bars[k], bars[k - 1]
        sigma, out, shift = math.sqrt(1 - now), model.at_index(x, used[k - 1]), None
        if o.get("variance") == "learned":
            out, shift = out.chunk(2, dim=1)
        eps = model.eps(out, x, now)
        x0 = (x - sigma * eps) / math.sqrt(now)
        if o["clip_denoised"]:
            x0 = x0.clamp(-1, 1)
        g = model.guidance(x, o)
        if "eta" in o:
            eps, x0 = eps - sigma * g, x0 + sigma**2 / math.sqrt(now) * g
            std = o["eta"] * math.sqrt(posterior_variance(now, then))
            x = math.sqrt(then) * x0 + math.sqrt(max(1 - then - std**2, 0)) * eps
            x = x + std * next(z) if std > 0 else x
            continue
        # log_variance[0] = log(posterior_variance[1])
        low = posterior_variance(bars[2], bars[1]) if k == 1 else posterior_variance(now, then)
        if shift is not None:
            span = math.log(1 - now / then), math.log(low)
            log = 0.5 * (shift + 1) * span[0] + 0.5 * (1 - shift) * span[1]
            variance = log.clamp(min(span), max(span)).exp()
        elif o["variance"] == "fixed-large":
            variance = torch.tensor(low if k == 1 else 1 - now / then, dtype=x.dtype)
        else:
            variance = torch.tensor(posterior_variance(now, then), dtype=x.dtype)
        x, before = posterior_mean(x, x0, now, then) + variance * g, x
        spread = variance * (k > 1)
        if reference is not None:  # ∇MSE against √ᾱ r + √(1-ᾱ) z₂; both noises as one
            scale = sigma / math.sqrt(now) / (o["ptb"] * 2 / 255 / 3 / o["mse_scale"])
            pull = variance * scale * 2 / (100 * math.prod(o["image_shape"]))
            x = x - pull * (before - math.sqrt(now) * reference)
            spread = spread + (pull * sigma) ** 2
        x = x + spread.sqrt() * next(z) if bool((spread != 0).any()) else x
    return x


def rounds(
    u: Tensor,
    noise: Sequence[Tensor],
    model: Model,
    o: Options,
    levels: Sequence[int | None],
    used: Sequence[Sequence[int]],
    guided: bool = False,
) -> Tensor:
    """Diffuse to a level (None: not at all) and come down, again and again."""
    z, x = iter(noise), 2 * u - 1
    for level, indices in zip(levels, used, strict=True):
        if level is not None:
            x = diffuse(x, model.chain(level), next(z))
        x = down(x, z, model, o, indices, 2 * u - 1 if guided else None)
    assert next(z, None) is None
    return pixels(x, o["clamp_output"])


def one_shot(u: Tensor, noise: Sequence[Tensor], model: Model, o: Options) -> Tensor:
    """Carlini et al.: noise to where √((1-ᾱ)/ᾱ) is twice σ, then x̂0."""
    target = 1 / (1 + (2 * o["sigma"]) ** 2)
    if model.indexed:
        index = next(i for i in range(len(model.betas)) if model.chain(i) <= target)
        alpha_bar = model.chain(index)
    else:
        low, high = 0.0, 1.0
        for _ in range(100):  # bisection
            middle = (low + high) / 2
            low, high = (middle, high) if model.alpha_bar(middle) > target else (low, middle)
        alpha_bar = model.alpha_bar(low)
    x = diffuse(2 * u - 1, alpha_bar, noise[0])
    out = model.at_index(x, index) if model.indexed else model.at_time(x, low)
    x0 = (x - math.sqrt(1 - alpha_bar) * model.eps(out, x, alpha_bar)) / math.sqrt(alpha_bar)
    x0 = x0.clamp(-1, 1) if o["clip_denoised"] else x0
    x0 = x0 + (1 - alpha_bar) / math.sqrt(alpha_bar) * model.guidance(x, o)
    return pixels(x0, o["clip_denoised"])
