"""The purification loops that other people run, written for one set of models.

Methods of DiffPure (Nie et al., ICML 2022) and COUP (Zhang et al., arXiv 2408.05900): the reverse
VP-SDE by Euler, from t* = steps/1000 in steps of 1e-3 to 1e-5. `plain_loop` is what a PyTorch user
writes; `torchsde_loop` hands the SDE to torchsde, in as few operators as that takes or with the
habits of the released code; `diffusers_loop` is DDPM's chain. All start from the unnoised image and
return pixels. torchsde and diffusers are the `bench` extra and are imported where they are used.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import methods
from coup_fast.benchmarking.case import VariantUnavailable
from coup_fast.benchmarking.networks import Models
from coup_fast.plan import C, D, V, W
from coup_fast.schedules import VPSchedule

Loop = Callable[[Tensor], Tensor]
Guide = Callable[[Tensor], Tensor]

STEP, T_END = 1e-3, 1e-5


def confidence_guide(classifier: Callable[[Tensor], Tensor]) -> Guide:
    """Gradient of log max softmax with respect to the state, by autograd."""

    def guide(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            confidence = classifier(0.5 * leaf + 0.5).log_softmax(dim=1).max(dim=1).values
            (gradient,) = torch.autograd.grad(confidence.sum(), leaf)
        return gradient

    return guide


def released_guide(classifier: Callable[[Tensor], Tensor]) -> Guide:
    """The same as COUP's code takes it: `backward`, which also fills trainable weights' .grad."""

    def guide(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            probability = classifier((leaf + 1) * 0.5).softmax(dim=1).max(dim=1).values
            confidence = probability.log()
            ones = torch.ones_like(confidence)
            torch.autograd.backward(confidence, ones, retain_graph=True)
        assert leaf.grad is not None
        return leaf.grad

    return guide


def guide_of(
    models: Models, guided: bool, constant: Tensor, released: bool = False
) -> Guide | None:
    """The guidance of a loop: none, `constant` for models without cost, or the classifier's."""
    if not guided:
        return None
    if models.classifier is None:
        return lambda x: constant[: len(x)]
    return (released_guide if released else confidence_guide)(models.classifier)


def plain_loop(
    models: Models,
    steps: int,
    guide: Guide | None,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
    record: bool = False,
) -> Loop:
    """Euler's steps in PyTorch, coefficients worked out beforehand as Python floats.

    record: let autograd record the run, to differentiate it.
    """
    plan = methods.coup(VPSchedule(), "eps", t_star=steps * STEP)
    numbers = [[float(row[i]) for i in (V, W, C, D)] for row in plan.coeffs]
    times = [999.0 * float(t) for t in plan.times]

    def run(images: Tensor) -> Tensor:
        with contextlib.nullcontext() if record else torch.no_grad():
            x = 2.0 * images - 1.0
            for (a, b, c, d), time in zip(numbers, times, strict=True):
                eps = models.network(x, torch.full((len(x),), time, device=x.device))
                moved = a * x + b * eps
                if guide is not None:
                    moved = moved + c * guide(x)
                x = moved + d * draw(x)
            return 0.5 * x + 0.5

    return run


class ReverseSDE(nn.Module):
    """torchsde's form: s = 1 - t runs upwards, states are flat. As few operators as it takes."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, models: Models, guide: Guide | None) -> None:
        super().__init__()
        self.network = models.network
        self.classifier = models.classifier
        self.shape = models.shape
        self.guide = guide

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift ½βx + β(score + g), with score = -eps/σ."""
        t = 1.0 - s
        beta = 0.1 + 19.9 * t
        x = y.view(-1, *self.shape)
        sigma = torch.sqrt(-torch.expm1(-9.95 * t**2 - 0.1 * t))
        score = -self.network(x, (999.0 * t).expand(len(x))) / sigma
        if self.guide is not None:
            score = score + self.guide(x)
        return (beta * (0.5 * x + score)).flatten(1)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """Diffusion √β."""
        return torch.sqrt(0.1 + 19.9 * (1.0 - s)).expand_as(y)


class ReleasedSDE(ReverseSDE):
    """The same as DiffPure's and COUP's code computes it: per sample and from scratch each step.

    The schedule's thousand-entry tables, the marginal's mean and the forward drift are made anew in
    every call, as there.
    """

    def _schedule(self, device: torch.device) -> Tensor:
        betas = torch.linspace(0.1 / 1000, 20.0 / 1000, 1000)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        torch.sqrt(alphas_cumprod), torch.sqrt(1.0 - alphas_cumprod)
        return betas

    def _score(self, x: Tensor, t: Tensor) -> Tensor:
        self._schedule(x.device)
        eps = self.network(x, t * 999)
        log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        torch.exp(log_mean[:, None, None, None]) * torch.zeros_like(x)
        sigma = torch.sqrt(1.0 - torch.exp(2.0 * log_mean))
        return (-eps / sigma[:, None, None, None]).flatten(1)

    def _forward_sde(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        beta = 0.1 + t * 19.9
        return -0.5 * beta[:, None] * y, torch.sqrt(beta)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """As in `ReverseSDE`."""
        t = 1 - s.expand(y.shape[0])
        drift, diffusion = self._forward_sde(t, y)
        x = y.view(-1, *self.shape)
        guidance = None if self.guide is None else self.guide(x)
        score = self._score(x, t)
        if guidance is not None:
            score = score + 1.0 * guidance.flatten(1)
        return -(drift - diffusion[:, None] ** 2 * score)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """As in `ReverseSDE`; the forward drift is computed and thrown away."""
        _, diffusion = self._forward_sde(1 - s.expand(y.shape[0]), y)
        return diffusion[:, None].expand(y.shape)


class Replay:
    """A Brownian path for torchsde whose k-th increment is √h times the k-th given noise."""

    levy_area_approximation = "none"

    def __init__(self, noise: Sequence[Tensor]) -> None:
        self.remaining: Iterator[Tensor] = iter([z.flatten(1) for z in noise])
        self.shape = noise[0].flatten(1).shape

    def __call__(self, ta: Any, tb: Any, **_: Any) -> Tensor:
        return torch.sqrt(torch.as_tensor(tb - ta)) * next(self.remaining)


def torchsde_loop(
    models: Models,
    steps: int,
    guided: bool,
    constant: Tensor,
    *,
    released: bool = False,
    trainable: bool = False,
    path: Replay | None = None,
) -> Loop:
    """torchsde's Euler. `released`: through `sdeint_adjoint`, with the SDE of the released code.

    trainable: the parameters of a copy of both networks require gradients, as DiffPure's and COUP's
    do. Raises VariantUnavailable without torchsde.
    """
    try:
        import torchsde
    except ImportError as error:
        raise VariantUnavailable(
            "torchsde is not installed: pip install coup-fast[bench]"
        ) from error
    if trainable:
        models = copy.deepcopy(models)
        for module in (models.network, models.classifier):
            if isinstance(module, nn.Module):
                module.requires_grad_()
    guide = guide_of(models, guided, constant, released)
    sde = (ReleasedSDE if released else ReverseSDE)(models, guide)
    solve = torchsde.sdeint_adjoint if released else torchsde.sdeint
    mode = contextlib.nullcontext if released else torch.no_grad

    def run(images: Tensor) -> Tensor:
        with mode():
            x = 2.0 * images - 1.0
            ends = torch.linspace(1.0 - steps * STEP, 1.0 - T_END, 2, device=x.device)
            states = solve(sde, x.flatten(1), ends, bm=path, method="euler", dt=STEP)
            end: Tensor = 0.5 * states[-1].view_as(x) + 0.5
        return end

    return run


def diffusers_loop(models: Models, steps: int, generator: torch.Generator | None = None) -> Loop:
    """DDPM's last `steps` of 1000 steps by `DDPMScheduler.step`, x̂0 not clipped.

    Raises VariantUnavailable without diffusers.
    """
    try:
        import diffusers
    except ImportError as error:
        raise VariantUnavailable(
            "diffusers is not installed: pip install coup-fast[bench]"
        ) from error
    make: Any = diffusers.DDPMScheduler
    scheduler = make(beta_schedule="linear", clip_sample=False)

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        x = 2.0 * images - 1.0
        for index in range(steps - 1, -1, -1):
            time = torch.full((len(x),), float(index), device=x.device)
            x = scheduler.step(models.network(x, time), index, x, generator=generator).prev_sample
        return 0.5 * x + 0.5

    return run
