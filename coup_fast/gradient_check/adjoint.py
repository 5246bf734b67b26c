"""The stochastic adjoint of torchsde on our plans, to compare the exact gradient with.

DiffPure takes its gradients with `torchsde.sdeint_adjoint` (Li et al., "Scalable gradients for
stochastic differential equations", AISTATS 2020): the backward pass integrates another SDE, from
the last state alone, so it is exact only as the step length goes to 0. Here the reverse VP-SDE of a
plan is written for torchsde, and a Brownian path of torchsde's is turned into the plan's noise, so
that both run the same computation forwards.

torchsde is an extra and is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_fast._torch.frozen import frozen_parameters
from coup_fast.plan import OUT_BIAS, OUT_HI, OUT_LO, OUT_SCALE, C, D, Plan, U, V, W
from coup_fast.purifier import Purifier
from coup_fast.run.backends import choose_ops
from coup_fast.run.guidance import confidence_gradient
from coup_fast.schedules import VPSchedule


def why_not(purifier: Purifier) -> str | None:
    """Why torchsde's adjoint cannot be run on this purifier; None if it can."""
    plan, model = purifier.plan, purifier.score_model
    if plan.look_ahead is not None:
        return f"{plan.method} is not an SDE"
    if not isinstance(model.schedule, VPSchedule) or model.kind not in ("eps", "score"):
        return "needs a continuous VP schedule and a network that predicts eps or score"
    if _step_lengths(plan, model.schedule) is None:
        return f"{plan.method} with these options is not Euler-Maruyama on the reverse VP-SDE"
    if plan.guidance_norm != "none":
        return "guidance that is normalised per sample, or stable, is not written as an SDE here"
    if importlib.util.find_spec("torchsde") is None:
        return "torchsde is not installed (pip install coup-fast[bench])"
    return None


def _step_lengths(plan: Plan, schedule: VPSchedule) -> np.ndarray[Any, Any] | None:
    """Step lengths read off rows that are (1 + ½βh) x - βh ε/σ + √(βh) z; None if they are not."""
    if plan.uses_attacked or plan.learned_variance or not np.isfinite(plan.times).all():
        return None
    beta = schedule.beta(plan.times)
    lengths = 2 * (plan.coeffs[:, V] - 1) / beta
    if np.any(plan.coeffs[:, U] != 0) or np.any(lengths <= 0) or not plan.noisy.all():
        return None
    noise = plan.coeffs[:, D] ** 2  # the diffusion has to be √β: leaves out ODEs and Langevin
    regular = np.allclose(noise, beta * lengths) and np.allclose(lengths[:-1], lengths[0])
    pulls = np.all(plan.coeffs[:, W] != 0)
    steps = np.allclose(plan.times[:-1] - plan.times[1:], lengths[:-1])
    return lengths if regular and pulls and steps else None


class ReverseSDE(nn.Module):
    """The reverse VP-SDE in torchsde's form: s = 1 - t runs upwards, states are flat [B, n]."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(
        self,
        purifier: Purifier,
        schedule: VPSchedule,
        images: Tensor,
        guidance_scale: float,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.score_model = purifier.score_model
        self.classifier = purifier.classifier
        self.full_guidance = purifier.guidance_gradient == "full"
        self.guidance_scale = guidance_scale
        self.shape = images.shape[1:]
        self.ops = choose_ops(purifier.backend, images)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift ½βx + β(score + λg)."""
        schedule, t = self.schedule, 1.0 - float(s)
        beta = float(schedule.beta(t))
        x = y.unflatten(1, self.shape)  # type: ignore[no-untyped-call]
        time = torch.full((1,), t, dtype=torch.float64, device=y.device).expand(len(y))
        out = self.score_model(x, time)[:, : self.shape[0]].to(y.dtype)
        score = -out / float(schedule.sigma(t)) if self.score_model.kind == "eps" else out
        if self.guidance_scale:
            assert self.classifier is not None
            graph = self.full_guidance and torch.is_grad_enabled() and x.requires_grad
            guidance = confidence_gradient(self.classifier, x, self.ops, graph=graph)
            score = score + self.guidance_scale * guidance
        drift: Tensor = (0.5 * beta * x + beta * score).flatten(1)
        return drift

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """Diffusion √β."""
        beta = float(self.schedule.beta(1.0 - float(s)))
        return torch.full_like(y, beta**0.5)


class AdjointRun:
    """A purifier's run by torchsde, differentiable by its adjoint, and the same run's noise.

    Args:
        purifier: one that `why_not` has nothing against.
        images: [B, C, H, W]; their shape, dtype and device are used.
        seed: of the Brownian path and of the forward noise.
        trainable: leave the network's parameters trainable, as DiffPure does: the adjoint then
            integrates their gradients too, which nobody asked for.

    Raises ValueError where `why_not` says why.
    """

    def __init__(
        self, purifier: Purifier, images: Tensor, seed: int = 0, *, trainable: bool = False
    ) -> None:
        reason = why_not(purifier)
        if reason is not None:
            raise ValueError(reason)
        import torchsde

        plan = purifier.plan
        schedule = purifier.score_model.schedule
        assert isinstance(plan, Plan)
        assert isinstance(schedule, VPSchedule)
        lengths = _step_lengths(plan, schedule)
        assert lengths is not None
        self.purifier, self.plan, self.trainable = purifier, plan, trainable
        self.step_length = float(lengths[0])
        grid = [1.0 - float(plan.times[0])]  # summed as torchsde does
        for _ in lengths[:-1]:
            grid.append(grid[-1] + self.step_length)
        grid.append(grid[-1] + float(lengths[-1]))
        self.grid = grid
        scale = float(plan.coeffs[0, C] / (schedule.beta(plan.times[0]) * self.step_length))
        self.sde = ReverseSDE(purifier, schedule, images, scale if plan.guided.any() else 0.0)
        dtype = torch.promote_types(images.dtype, torch.float32)
        self.path = torchsde.BrownianInterval(
            grid[0],
            grid[-1],
            size=(len(images), images[0].numel()),
            dtype=dtype,
            device=images.device,
            entropy=seed,
        )
        generator = torch.Generator(images.device).manual_seed(seed)
        noise = []
        if plan.start_noisy:
            noise.append(
                torch.randn(images.shape, generator=generator, dtype=dtype, device=images.device)
            )
        for a, b in itertools.pairwise(grid):
            noise.append((self.path(a, b) / (b - a) ** 0.5).reshape(images.shape))
        self.noise = torch.stack(noise)  # what `Purifier(...)(images, noise=…)` takes

    def __call__(self, images: Tensor) -> Tensor:
        """Purified images; their backward pass is the adjoint SDE."""
        import torchsde

        run = self.purifier.prepare(images, noise=self.noise)
        start = run.start(images)[0]
        parameters = tuple(self.sde.score_model.parameters()) if self.trainable else ()
        times = torch.tensor([self.grid[0], self.grid[-1]], dtype=torch.float64)
        path = torchsde.sdeint_adjoint(
            self.sde,
            start.flatten(1),
            times,
            bm=self.path,
            method="euler",
            dt=self.step_length,
            adjoint_params=parameters,
        )
        row = run.tables.rows[-1]
        end = torch.clamp(path[-1].view_as(start), row[OUT_LO], row[OUT_HI])
        purified: Tensor = (row[OUT_SCALE] * end + row[OUT_BIAS]).to(images.dtype)
        return purified

    def gradient(self, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """(purified images, gradient of <purified, cotangent> with respect to the images)."""
        models = (self.sde.classifier,) if self.trainable else (self.sde, self.sde.classifier)
        with frozen_parameters(*models), torch.enable_grad():
            leaf = images.detach().requires_grad_()
            purified = self(leaf)
            (gradient,) = torch.autograd.grad(purified, leaf, cotangent)
        return purified.detach(), gradient
