"""The operators in plain PyTorch: what the kernels are tested against, and the fallback.

They have the names, argument order and rows of coefficients of `coup_fast.ops`. They run on any
device, in float32 or float64 as the state's dtype says, and autograd differentiates them twice.
Noise words and uniforms are exact. Everything else agrees with the kernels to rounding, because
plain PyTorch has no fused multiply-add.

A term whose coefficient is exactly 0 contributes nothing, whatever its input (inf and NaN too).
Coefficients stay on the device, and nothing here waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from coup_fast import checks

from . import noise as _noise

GuidanceNorm = Literal["none", "normalised", "clipped"]
GUIDANCE_NORMS = get_args(GuidanceNorm)
Quantity = Literal["log_confidence", "margin"]

_NEWTON = 24  # iterations, of which a stable step needs about ten in float64
_MOST_GROWTH = 2.0**126  # of exp(margin) in a stable step, as in the kernels


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 [B, ...] contiguous; sample i is drawn under keys[i].

    Box-Muller on the words of each block, (0, 1) and (2, 3), evaluated in float64 and rounded once
    to float32.

    Args:
        keys: int64 [B, 2] (`noise.step_keys`).
        shape: sizes, with shape[0] == B.
    """
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 [B, 2], got {keys.dtype} {list(keys.shape)}")
    if len(shape) == 0 or shape[0] != keys.shape[0]:
        raise ValueError(f"shape must start with the {keys.shape[0]} rows of keys, got {shape}")
    if min(shape) < 0 or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(
            "sizes must not be negative, with a product below 2^60 (a size of 0 counted as 1), got "
            f"shape {list(shape)}"
        )
    numel = math.prod(shape[1:])
    words = _noise.words(keys, (numel + 3) // 4 * 4).reshape(len(keys), (numel + 3) // 4 * 2, 2)
    radius_uniform, angle_uniform = _noise.uniform(words).to(torch.float64).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
    quarters = torch.round(4.0 * angle_uniform)  # angles reduced in turns, exactly
    angle = (4.0 * angle_uniform - quarters) * (math.pi / 2)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    odd = quarters.remainder(2) == 1
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    half_turn = quarters.remainder(4) >= 2
    radius = torch.where(half_turn, -radius, radius)
    pairs = torch.stack((radius * cosine, radius * sine), dim=-1)
    return pairs.to(torch.float32).flatten(1)[:, :numel].reshape(tuple(shape)).contiguous()


def _noise_like(x: Tensor, keys: Tensor | None, noise: Tensor | None) -> Tensor | None:
    if noise is not None:
        return noise.detach().to(x.dtype)
    return None if keys is None else normal(keys, x.shape).to(x.dtype)


def _term(coefficient: Tensor, value: Tensor) -> Tensor:
    """coefficient * value, and 0 where the coefficient is 0 even if the value is not finite."""
    return torch.where(coefficient != 0, coefficient * value, 0.0)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """NaN propagates; the gradient passes where low <= x <= high."""
    return torch.clamp(x, low, high)


def _in_layout_of(out: Tensor, x: Tensor) -> Tensor:
    like = torch.empty_like(x, dtype=out.dtype)
    return out if out.stride() == like.stride() else like.copy_(out)


def _per_sample(value: Tensor, ndim: int) -> Tensor:
    return value.reshape(value.shape[0], *[1] * (ndim - 1))


def perturb(
    images: Tensor, coeffs: Tensor, keys: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """Pixel map and forward diffusion.

        out_scale * clamp(scale u + bias + std z + sign_std sign(z), lo, hi) + out_bias

    sign(0) is 1.

    Args:
        images: u, [B, ...] floating.
        coeffs: [8] = scale, bias, std, sign_std, lo, hi, out_scale, out_bias.
        keys: int64 [B, 2], under which z is drawn where noise is None. Without both, z is 0 and
            there is no sign term.
        noise: z, [B, ...].

    Returns:
        float32 (float64 for float64 images) in the layout of images.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    scale, bias, std, sign_std, low, high, out_scale, out_bias = coeffs.to(dtype).unbind()
    u = images.to(dtype)
    total = _term(scale, u) + bias
    z = _noise_like(u, keys, noise)
    if z is not None:
        sign = torch.where(z < 0, -1.0, 1.0).to(dtype)
        total = total + _term(std, z) + _term(sign_std, sign)
    return _in_layout_of(out_scale * _clamp(total, low, high) + out_bias, images)


def _guidance_scale(c: Tensor, g_max: Tensor, guidance: Tensor, guidance_norm: str) -> Tensor:
    """c_i: the row's c, scaled per sample; 0 for a sample whose guidance is all zero."""
    if guidance_norm == "none":
        return c
    square = _per_sample(guidance.flatten(1).square().sum(1), guidance.ndim)
    safe = torch.where(square == 0, 1.0, square)  # keeps the gradient of the root finite
    inverse_norm = torch.where(square == 0, 0.0, torch.rsqrt(safe))
    if guidance_norm == "normalised":
        return c * inverse_norm
    # A norm within the bound has no part in the factor, nor in its gradient; inf bounds any number.
    within = (g_max * inverse_norm >= 1) | ((g_max == math.inf) & (square <= math.inf))
    outside = g_max * torch.rsqrt(torch.where(within, 1.0, safe))
    return torch.where(square == 0, 0.0, c * torch.where(within, 1.0, outside))


def _stable_change(pull: Tensor, margin: Tensor) -> Tensor:
    """D >= 0 with m + D + exp(m + D) = m + exp(m) + pull, twice differentiable in both.

    Newton's method on σ(-m) (D - pull) + σ(m) expm1(D) = 0 without a graph, from above, where it
    falls until rounding ends it (csrc/math/stable_guidance.h). Two more iterations with the graph
    then have the right first and second derivatives, because each doubles their order.
    """
    doubt, trust = torch.sigmoid(-margin), torch.sigmoid(margin)

    def better(change: Tensor, doubt: Tensor, trust: Tensor, pull: Tensor) -> Tensor:
        grown = trust * torch.expm1(change)
        return change - (doubt * (change - pull) + grown) / (doubt + (trust + grown))

    with torch.no_grad():
        bound = torch.log1p((pull * torch.exp(-margin)).clamp(max=_MOST_GROWTH))
        change = torch.where(pull > 0, torch.minimum(doubt * pull, bound), doubt * pull)
        for _ in range(_NEWTON):
            following = better(change, doubt, trust, pull)
            change = torch.where(following < change, following, change)
    return better(better(change, doubt, trust, pull), doubt, trust, pull)


def _stable_scale(c: Tensor, guidance: Tensor, margin: Tensor) -> Tensor:
    """c_i of a stable step, D / ‖G_i‖², [B, 1, ...]: its limit c σ(-m) where the norm is 0."""
    square = guidance.flatten(1).square().sum(1)
    still = square == 0
    safe = torch.where(still, 1.0, square)
    pull = (c * safe).clamp(max=_MOST_GROWTH)
    scale = torch.where(still, c * torch.sigmoid(-margin), _stable_change(pull, margin) / safe)
    return _per_sample(scale, guidance.ndim)


def reverse_step(
    x: Tensor,
    model_out: Tensor | None,
    coeffs: Tensor,
    keys: Tensor | None = None,
    guidance: Tensor | None = None,
    reference: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_norm: str = "none",
    margin: Tensor | None = None,
) -> Tensor:
    """One step of any method: a row of the coefficient table applied to the state.

        x̂0 = clamp(p x + q m, x0_lo, x0_hi)
        x' = out_scale * clamp(u x̂0 + v x + w m + c_i G + e r + d z, out_lo, out_hi) + out_bias

    With a learned variance, v + x_var V, c_i V, e V and sqrt(d² V + z_var² V²) replace v, c_i, e
    and d, where s are the last C channels of m and

        V = exp(clip(½(s+1) log_var_hi + ½(1-s) log_var_lo))

    Args:
        x: the state, [B, C, ...] float32 or float64.
        model_out: m, [B, C, ...], or [B, 2C, ...] with the variance channels last; None is m = 0.
        coeffs: [19], the columns of `coup_fast.plan`.
        keys: int64 [B, 2], under which z is drawn where noise is None; without both, z is 0.
        guidance: G, shaped as x.
        reference: r, shaped as x.
        noise: z, shaped as x; it is not differentiated.
        guidance_norm: "none", "normalised" (c / ‖G_i‖) or "clipped" (c min(1, g_max / ‖G_i‖)), with
            one norm per sample; or "stable", D / ‖G_i‖² with G the gradient of the margin m and D
            the root of m + D + exp(m + D) = m + exp(m) + c ‖G_i‖², for c >= 0.
        margin: m, [B], with "stable" and guidance, and only there.

    Returns:
        x' in x's dtype, shape and layout.
    """
    checks.choice("guidance_norm", guidance_norm, (*GUIDANCE_NORMS, "stable"))
    if (guidance_norm == "stable" and guidance is not None) != (margin is not None):
        raise ValueError(
            "margin must be given where guidance is and guidance_norm is stable, and only there, "
            f"got guidance_norm {guidance_norm!r}, {'no ' if guidance is None else ''}guidance and "
            f"{'no' if margin is None else 'a'} margin"
        )
    row = coeffs.to(x.dtype).unbind()
    p, q, x0_lo, x0_hi, u, v, w, c, e, d, out_lo, out_hi, out_scale, out_bias = row[:14]
    g_max, log_var_lo, log_var_hi, x_var, z_var = row[14:]

    variance: Tensor | None = None
    m = None if model_out is None else model_out.to(x.dtype)
    if m is not None and m.shape[1] == 2 * x.shape[1]:
        m, s = m.tensor_split(2, dim=1)
        log_var = 0.5 * (s + 1) * log_var_hi + 0.5 * (1 - s) * log_var_lo
        variance = torch.exp(_clamp(log_var, log_var_lo, log_var_hi))
        v = v + _term(x_var, variance)
        e = _term(e, variance)
        variance_scale = _term(c, variance)
        noise_variance = _term(d * d, variance) + _term(z_var * z_var, variance.square())
        silent = noise_variance == 0
        d = torch.where(silent, 0.0, torch.sqrt(torch.where(silent, 1.0, noise_variance)))
    else:
        variance_scale = c

    x0 = _term(p, x) if m is None else _term(p, x) + _term(q, m)
    total = _term(u, _clamp(x0, x0_lo, x0_hi)) + _term(v, x)
    if m is not None:
        total = total + _term(w, m)
    if guidance is not None:
        g = guidance.to(x.dtype)
        if margin is not None:
            # the variance, where it is learned, multiplies what the sample's c gives
            stable = _stable_scale(c, g, margin.to(x.dtype))
            scaled = stable if variance is None else stable * variance
        else:
            scaled = _guidance_scale(variance_scale, g_max, g, guidance_norm)
        total = total + torch.where(c != 0, scaled * g, 0.0)
    if reference is not None:
        total = total + _term(e, reference.to(x.dtype))
    z = _noise_like(x, keys, noise)
    if z is not None:
        total = total + _term(d, z)
    return _in_layout_of(out_scale * _clamp(total, out_lo, out_hi) + out_bias, x)


def reverse_step_(
    x: Tensor,
    model_out: Tensor | None,
    coeffs: Tensor,
    keys: Tensor | None = None,
    guidance: Tensor | None = None,
    reference: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_norm: str = "none",
    margin: Tensor | None = None,
) -> None:
    """`reverse_step` written over x."""
    rest = (keys, guidance, reference, noise, guidance_norm, margin)
    x.copy_(reverse_step(x, model_out, coeffs, *rest))


def adaptive_step(
    x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ADP: step sizes from the change of the score along itself, with a sticky stop.

        1-γ_i    = ⟨h, h - h_ahead⟩_i / ⟨h, h⟩_i
        α_i      = clip(numerator / (1-γ_i), alpha_min, alpha_max)
        alive'_i = alive_i and α_i > tau
        x'_i     = clamp(scale (x_i + α_i h_i) + bias, lo, hi) if alive'_i, else x_i bit for bit

    The published loop ends before the update once nothing is alive. Doing so per sample keeps an
    image's result independent of its batch. A NaN α stops its sample. Gradients reach h and h_ahead
    through x' and, where α is not clipped, through α; alive' and the returned α carry none.

    Args:
        x: the state, [B, ...] float32 or float64.
        h: S(x), shaped as x.
        h_ahead: S(x + δh), shaped as x.
        alive: bool [B].
        coeffs: [8] = numerator (λδ), alpha_min, alpha_max, tau, scale, bias, lo, hi.

    Returns:
        (x', alive', α [B]).
    """
    numerator, alpha_min, alpha_max, tau, scale, bias, low, high = coeffs.to(x.dtype).unbind()
    h, h_ahead = h.to(x.dtype), h_ahead.to(x.dtype)

    def one_minus_gamma(h: Tensor, h_ahead: Tensor, where: Tensor) -> Tensor:
        change = (h * (h - h_ahead)).flatten(1).sum(1)
        square = h.square().flatten(1).sum(1)
        return torch.where(where, change, 1.0) / torch.where(where, square, 1.0)

    with torch.no_grad():
        raw = numerator / one_minus_gamma(h, h_ahead, torch.ones_like(alive))
        alpha = torch.clamp(raw, alpha_min, alpha_max)
        alive_next = alive & (alpha > tau)
        smooth = alive_next & (raw >= alpha_min) & (raw <= alpha_max)
    moving = _per_sample(alive_next, x.ndim)
    h, h_ahead = torch.where(moving, h, 0.0), torch.where(moving, h_ahead, 0.0)
    step = torch.where(smooth, numerator / one_minus_gamma(h, h_ahead, smooth), alpha)
    moved = x + torch.where(moving, _per_sample(step, x.ndim) * h, 0.0)
    out = torch.where(moving, _clamp(_term(scale, moved) + bias, low, high), x)
    return _in_layout_of(out, x), alive_next, alpha


def confidence_cotangent(logits: Tensor, quantity: str = "log_confidence") -> tuple[Tensor, Tensor]:
    """log max softmax of each row, or its margin, and the gradient with respect to the logits.

    The first index wins ties. With S the sum of exp(l_j - l_max) over the other classes the two are
    -log1p(S) and, for the winner, S / (1 + S): both keep their relative precision when the
    classifier is all but certain. NaN, or an infinite largest logit, makes the row NaN.

    The margin is the largest logit less log-sum-exp of the others. Its gradient is 1 for the winner
    and minus the softmax among the others; an infinite largest one of these makes the row NaN too.

    Args:
        logits: [B, K] floating; K >= 2 for the margin.
        quantity: "log_confidence" or "margin".

    Returns:
        (value [B], float32 or float64 for float64 logits; cotangent [B, K] in the dtype of
            logits).
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = logits.to(dtype)
    winner = values.detach().argmax(dim=1, keepdim=True)
    largest = values.gather(1, winner)
    if checks.choice("quantity", quantity, get_args(Quantity)) == "margin":
        return _margin_cotangent(values, winner, logits.dtype)
    relative = torch.exp(values - largest).scatter(1, winner, 0.0)
    others = relative.sum(dim=1, keepdim=True) + (largest - largest)  # NaN if largest is infinite
    cotangent = (-relative / (1 + others)).scatter(1, winner, others / (1 + others))
    return -torch.log1p(others).squeeze(1), cotangent.to(logits.dtype)


def _margin_cotangent(values: Tensor, winner: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`confidence_cotangent` of the margin; winner: [B, 1]."""
    if values.shape[1] < 2:
        raise ValueError(
            f"logits must have at least two classes for the margin, got {list(values.shape)}"
        )
    others = values.scatter(1, winner, -math.inf)
    second = others.detach().argmax(dim=1, keepdim=True)
    largest, runner_up = values.gather(1, winner), others.gather(1, second)
    relative = torch.exp(values - runner_up).scatter(1, winner, 0.0)
    total = relative.sum(dim=1, keepdim=True) + (largest - largest) + (runner_up - runner_up)
    cotangent = (-relative / total).scatter(1, winner, total / total)
    margin = (largest - runner_up) - torch.log(total)
    return margin.squeeze(1), cotangent.to(dtype)
