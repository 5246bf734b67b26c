"""The compiled operators: typed calls of `torch.ops.coup_fast.*`.

They have the names, argument order and meaning of `coup_fast.reference`, which defines them. All
tensors of a call are on one device, the CPU or CUDA. Unless a docstring says otherwise:

- A state is [B, C, ...] with two dimensions or more. Images, model outputs, guidance, references
  and noise may be float32, float16 or bfloat16 in any mix. Tensors that are contiguous,
  channels_last, or a view that steps evenly through the pixels of a channel (`out[:, :C]`) are read
  in place; any other view is copied once. Arithmetic is float32, rounded once to the type of the
  result.
- Outputs have the shape of the state. They are channels_last where the state is, else contiguous.
- coeffs is one row of coefficients, a float32 tensor on the device (columns: `coup_fast.plan`), so
  that a new step needs neither a recompilation nor a host synchronisation. A term whose coefficient
  is exactly 0 contributes nothing, whatever its input. Coefficients that require grad are refused.
- keys are int64 [B, 2] rows of `coup_fast.noise.step_keys`. A sample's noise depends only on its
  key and the logical index: device, layout, batch and threads change no bit of it.
- Wrong dtypes, shapes and devices raise RuntimeError with the argument, what was given and what was
  expected.

Gradients are first order and by reverse mode. Differentiating a gradient again, tangents of forward
mode, and gradients inside torch.func raise RuntimeError; use `coup_fast.reference` for them.
`torch.vmap` works, one sample after another, except in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from coup_fast import _extension
from coup_fast._torch.transforms import FORWARD_MODE, refuse_tangents


def _operator(name: str) -> Callable[..., Any]:
    """torch.ops.coup_fast.<name>.default, which torch.compile knows, or what says it is missing."""
    if not _extension.available():
        return _missing
    operator: Callable[..., Any] = getattr(torch.ops.coup_fast, name).default
    return operator


def _missing(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "the compiled operators of coup_fast are not loaded (coup_fast.build_info() says why); "
        "use coup_fast.reference, or rebuild with `pip install --no-build-isolation .`"
    )


_normal = _operator("normal")
_perturb = _operator("perturb")
_reverse_step = _operator("reverse_step")
_reverse_step_ = _operator("reverse_step_")
_adaptive_step = _operator("adaptive_step")
_confidence_cotangent = _operator("confidence_cotangent")

_below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowADInplaceOrView", nullcontext
)


def _has_gradient(name: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the autograd layer has something to record or to refuse.

    Tangents are refused here: in torch.func.jvp that layer cannot tell which inputs carry one.
    """
    if FORWARD_MODE._current_level >= 0:
        refuse_tangents(f"coup_fast.ops.{name}", tensors)
    try:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    except AttributeError:  # what is no tensor is the operator's to refuse, by its name
        return False


def _apply(
    name: str, operator: Callable[..., Any], tensors: tuple[Tensor | None, ...], *args: Any
) -> Any:
    """The operator of args, past the autograd layer (`coup_fast._torch`) where it has no part.

    That layer is Python, and asking it costs 8 us a call, more than a small kernel takes. What it
    would do is the same: call the kernel with autograd's keys excluded. tensors: those of args that
    may require grad.
    """
    if torch.compiler.is_compiling() or _has_gradient(name, tensors):
        return operator(*args)
    with _below_autograd():
        return operator(*args)


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 [B, ...] contiguous; sample i is drawn under keys[i].

    The normals come from Philox4x32-10 and Box-Muller, and are within 2 ulp of the exact value for
    the same words. Not differentiable.

    Args:
        keys: int64 [B, 2].
        shape: sizes, with shape[0] == B.
    """
    out: Tensor = _normal(keys, shape)
    return out


def perturb(
    images: Tensor, coeffs: Tensor, keys: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """Pixel map and forward diffusion.

        out_scale * clamp(scale u + bias + std z + sign_std sign(z), lo, hi) + out_bias

    sign(0) is 1. Differentiable with respect to images.

    Args:
        images: u, [B, C, ...].
        coeffs: [8] = scale, bias, std, sign_std, lo, hi, out_scale, out_bias.
        keys: int64 [B, 2], under which z is drawn where noise is None. Without both, the terms of z
            are left out.
        noise: z, shaped as images.

    Returns:
        float32, shaped as images.
    """
    tensors = (images, coeffs, noise)
    out: Tensor = _apply("perturb", _perturb, tensors, images, coeffs, keys, noise)
    return out


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
    and d, where (Nichol and Dhariwal 2021, eq. 15)

        V = exp(clip(½(s+1) log_var_hi + ½(1-s) log_var_lo))

    Differentiable with respect to x, model_out, guidance, reference and margin.

    Args:
        x: the state, float32 [B, C, ...].
        model_out: m, [B, C, ...], or [B, 2C, ...] with the variance channels s last; None is m = 0.
        coeffs: [19], the columns of `coup_fast.plan`.
        keys: int64 [B, 2], under which z is drawn where noise is None; without both, z is 0.
        guidance: G, shaped as x.
        reference: r, shaped as x.
        noise: z, shaped as x.
        guidance_norm: c_i is the row's c ("none"), c / ‖G_i‖ ("normalised") or
            c min(1, g_max / ‖G_i‖) ("clipped"), with one Euclidean norm per sample; a zero norm
            gives 0. Or it is D / ‖G_i‖² ("stable"), with G the gradient of the margin m and D the
            root of m + D + exp(m + D) = m + exp(m) + c ‖G_i‖² (docs/guidance.md); a zero norm then
            gives c / (1 + exp(m)), the limit.
        margin: m, float32 [B], with "stable" and guidance, and only there.

    Returns:
        x', float32, shaped as x.
    """
    tensors = (x, model_out, coeffs, guidance, reference, noise, margin)
    rest = (keys, guidance, reference, noise, guidance_norm, margin)
    out: Tensor = _apply("reverse_step", _reverse_step, tensors, x, model_out, coeffs, *rest)
    return out


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
    """`reverse_step` written over x, a dense float32 tensor. Not differentiable.

    Another input may be x itself, but it may not share x's memory in any other way, because it
    would be read after x is written.

    Raises:
        RuntimeError: gradients are on and an input requires them.
    """
    tensors = (x, model_out, coeffs, guidance, reference, margin)
    rest = (keys, guidance, reference, noise, guidance_norm, margin)
    if torch.compiler.is_compiling() or _has_gradient("reverse_step_", tensors):
        _reverse_step_(x, model_out, coeffs, *rest)
        return
    with _below_autograd():
        _reverse_step_(x, model_out, coeffs, *rest)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def adaptive_step(
    x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ADP: step sizes from the change of the score along itself, with a sticky stop.

        1-γ_i    = ⟨h, h - h_ahead⟩_i / ⟨h, h⟩_i
        α_i      = clip(numerator / (1-γ_i), alpha_min, alpha_max)
        alive'_i = alive_i and α_i > tau
        x'_i     = clamp(scale (x_i + α_i h_i) + bias, lo, hi) if alive'_i, else x_i bit for bit

    A NaN α stops its sample. x' is differentiable with respect to x, h and h_ahead, through α where
    it is not clipped; alive' and α are not. The source is Yoon, Hwang, Lee 2021, section 3.2.

    Args:
        x: the state, float32 [B, C, ...].
        h: S(x), shaped as x.
        h_ahead: S(x + δh), shaped as x.
        alive: bool [B].
        coeffs: [8] = numerator (λδ), alpha_min, alpha_max, tau, scale, bias, lo, hi.

    Returns:
        (x', alive' bool [B], α float32 [B]).
    """
    tensors = (x, h, h_ahead, coeffs)
    out: tuple[Tensor, Tensor, Tensor] = _apply(
        "adaptive_step", _adaptive_step, tensors, x, h, h_ahead, alive, coeffs
    )
    return out


def confidence_cotangent(logits: Tensor, quantity: str = "log_confidence") -> tuple[Tensor, Tensor]:
    """log max softmax of each row, or its margin, and the gradient with respect to the logits.

    The margin is the largest logit less log-sum-exp of the others: log max softmax is
    -log(1 + exp(-margin)). The first index wins ties. Both results are differentiable.

    Args:
        logits: [B, K] float32, float16 or bfloat16; K >= 2 for the margin.
        quantity: "log_confidence" or "margin".

    Returns:
        (value float32 [B], cotangent [B, K] in the dtype of logits).
    """
    out: tuple[Tensor, Tensor] = _apply(
        "confidence_cotangent", _confidence_cotangent, (logits,), logits, quantity
    )
    return out
