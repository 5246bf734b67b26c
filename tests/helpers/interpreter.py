"""Plans run in float64, written from the formulas of the step alone. Not a test.

Independent of `reference` and of the purifier's loop, so that both can be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from coup_fast.plan import ADAPTIVE_COLUMNS, ROW_COLUMNS, START_COLUMNS, AdaptivePlan, Plan

Network = Callable[[Tensor, Tensor], Tensor]


def start(row: np.ndarray, u: Tensor, z: Tensor | None) -> Tensor:
    a = dict(zip(START_COLUMNS, row.tolist(), strict=True))
    x = a["scale"] * u + a["bias"]
    if z is not None:
        x = x + a["std"] * z + a["sign_std"] * torch.copysign(torch.ones_like(z), z)
    return a["out_scale"] * x.clamp(a["lo"], a["hi"]) + a["out_bias"]


def step(
    row: np.ndarray,
    x: Tensor,
    m: Tensor | None = None,
    g: Tensor | None = None,
    r: Tensor | None = None,
    z: Tensor | None = None,
    norm: str = "none",
    margin: Tensor | None = None,
) -> Tensor:
    a = dict(zip(ROW_COLUMNS, row.tolist(), strict=True))
    zero = torch.zeros_like(x)
    g, r, z = (zero if t is None else t for t in (g, r, z))
    m = zero if m is None else m
    v, e, d, c = a["v"], a["e"], a["d"], a["c"]
    if m.shape[1] == 2 * x.shape[1]:
        m, s = m.chunk(2, dim=1)
        low, high = a["log_var_lo"], a["log_var_hi"]
        var = torch.exp((0.5 * (s + 1) * high + 0.5 * (1 - s) * low).clamp(low, high))
        v, e, c = v + a["x_var"] * var, e * var, c * var
        d = torch.sqrt(d**2 * var + a["z_var"] ** 2 * var**2)
    length = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    if norm == "normalised":
        g = torch.where(length == 0, zero, g / length)
    elif norm == "clipped":
        g = torch.where(length > a["g_max"], g * (a["g_max"] / length), g)
    elif margin is not None and a["c"] != 0:  # norm "stable"
        change = margin_change(margin.to(length), a["c"] * length.flatten().square())
        still = length == 0
        step_of = change.view_as(length) / torch.where(still, 1.0, length.square())
        explicit = a["c"] * torch.sigmoid(-margin.to(length)).view_as(length)
        g = g * torch.where(still, explicit, step_of) / a["c"]
    x0 = (a["p"] * x + a["q"] * m).clamp(a["x0_lo"], a["x0_hi"])
    total = a["u"] * x0 + v * x + a["w"] * m + c * g + e * r + d * z
    return a["out_scale"] * total.clamp(a["out_lo"], a["out_hi"]) + a["out_bias"]


def margin_change(margin: Tensor, pull: Tensor) -> Tensor:
    """D with m + D + exp(m + D) = m + exp(m) + pull >= m + exp(m), by bisection."""
    low, high = torch.zeros_like(pull), pull.clone()
    for _ in range(200):
        middle = 0.5 * (low + high)
        beyond = middle + margin.exp() * torch.expm1(middle) > pull
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return 0.5 * (low + high)


def margin_gradient(classifier: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """∇ₓ of the top logit less log-sum-exp of the others, by plain autograd, and that margin."""
    x = x.detach().requires_grad_()
    logits = classifier((x + 1) / 2)
    top, winner = logits.max(1)
    margin = top - logits.scatter(1, winner[:, None], -torch.inf).logsumexp(1)
    return torch.autograd.grad(margin.sum(), x)[0], margin.detach()


def gradient(classifier: Network, x: Tensor) -> Tensor:
    """∇ₓ log max softmax of the classifier at (x+1)/2, by plain autograd."""
    x = x.detach().requires_grad_()
    confidence = classifier((x + 1) / 2).log_softmax(1).amax(1).sum()
    return torch.autograd.grad(confidence, x)[0]


def states(
    plan: Plan,
    u: Tensor,
    network: Network,
    noise: Sequence[Tensor] | None = None,
    classifier: Callable[[Tensor], Tensor] | None = None,
    time_scale: float = 1.0,
) -> list[Tensor]:
    """States after the start and after each row. noise None: drawn from torch's generator."""

    def draw() -> Tensor:
        return next(given).to(u.dtype) if given is not None else torch.randn_like(u)

    given = None if noise is None else iter(noise)
    x = start(plan.start, u, draw() if plan.start_noisy else None)
    result = [x]
    for k, row in enumerate(plan.coeffs):
        m = g = margin = None
        if np.isfinite(plan.times[k]):
            t = torch.full((len(u),), plan.times[k], dtype=torch.float64)
            m = network(x, t * time_scale)
        if plan.guided[k]:
            assert classifier is not None
            if plan.guidance_norm == "stable":
                g, margin = margin_gradient(classifier, x)
            else:
                g = gradient(classifier, x)
        z = draw() if plan.noisy[k] else None
        x = step(row, x, m, g, 2 * u - 1, z, plan.guidance_norm, margin)
        result.append(x)
    return result


def adaptive_step(
    row: np.ndarray, x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ADP, sample by sample."""
    a = dict(zip(ADAPTIVE_COLUMNS, row.tolist(), strict=True))
    out, still, alphas = x.clone(), alive.clone(), []
    for i in range(len(x)):
        gamma = (h[i] * h_ahead[i]).sum() / (h[i] ** 2).sum()
        alpha = (a["numerator"] / (1 - gamma)).clamp(a["alpha_min"], a["alpha_max"])
        alphas.append(alpha)
        still[i] = bool(alive[i]) and bool(alpha > a["tau"])
        if still[i]:
            out[i] = (a["scale"] * (x[i] + alpha * h[i]) + a["bias"]).clamp(a["lo"], a["hi"])
    return out, still, torch.stack(alphas)


def adaptive_states(plan: AdaptivePlan, u: Tensor, network: Network, noise: Tensor) -> list[Tensor]:
    """States of an ADP run after the start and after each step."""
    x = start(plan.start, u, noise.to(u.dtype))
    alive = torch.ones(len(u), dtype=torch.bool)
    t = torch.zeros(len(u), dtype=torch.float64)
    result = [x]
    for row in plan.coeffs:
        h = network(x, t)
        x, alive, _ = adaptive_step(row, x, h, network(x + plan.delta * h, t), alive)
        result.append(x)
    return result
