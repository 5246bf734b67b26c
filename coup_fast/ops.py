"""The compiled operators: typed calls of `torch.ops.coup_fast.*`, their shapes and their gradients.

Same names, argument order and meaning as `coup_fast.reference`, which defines them. Tensors of a
call live on one device, the CPU or CUDA. Unless a docstring says otherwise:

- a state is [B, C, ...] with two dimensions or more; images, model outputs, guidance, references
  and noise are float32, float16 or bfloat16 in any mix, contiguous, channels_last, or a view that
  steps evenly through the pixels of a channel (`out[:, :C]`), and are read in place; any other
  view is copied once. Arithmetic is float32, rounded once to the type of the result;
- outputs have the shape of the state and are contiguous, or channels_last where it is that;
- coeffs is one row of coefficients, a float32 tensor on the device (columns: `coup_fast.plan`), so
  that a new step is neither a recompilation nor a host synchronisation. A term whose coefficient
  is exactly 0 contributes nothing, whatever its input. Coefficients that require grad are refused;
- keys are int64 [B, 2] rows of `coup_fast.noise.step_keys`. A sample's noise depends on its key and
  the logical index alone: not on device, layout, batch or threads, bit for bit;
- wrong dtypes, shapes and devices raise RuntimeError with argument, given and expected.

Gradients are first order and by reverse mode: differentiating a gradient again, tangents of forward
mode and gradients inside torch.func raise RuntimeError; use `coup_fast.reference`. `torch.vmap`
works, one sample after another, except in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from coup_fast import _extension
from coup_fast._torch.transforms import FORWARD_MODE, refuse_tangents, wrapped


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
_perturb_backward = _operator("perturb_backward")
_reverse_step = _operator("reverse_step")
_reverse_step_ = _operator("reverse_step_")
_reverse_step_backward = _operator("reverse_step_backward")
_adaptive_step = _operator("adaptive_step")
_adaptive_step_backward = _operator("adaptive_step_backward")
_confidence_cotangent = _operator("confidence_cotangent")
_confidence_cotangent_backward = _operator("confidence_cotangent_backward")

_below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", nullcontext
)


def _apply(
    name: str, operator: Callable[..., Any], tensors: tuple[Tensor | None, ...], *args: Any
) -> Any:
    """The operator of args, past the autograd layer where it would record nothing.

    That layer is Python, and asking it costs 8 us a call, more than a small kernel takes. What it
    would do is the same: call the kernel with autograd's keys excluded. tensors: those of args that
    may require grad.
    """
    if torch.compiler.is_compiling():
        return operator(*args)
    if FORWARD_MODE._current_level >= 0:
        refuse_tangents(f"coup_fast.ops.{name}", tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        _refuse_unrecorded(name, tensors)
        return operator(*args)
    with _below_autograd():
        return operator(*args)


def _refuse_unrecorded(name: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Raises RuntimeError for derivatives that the autograd layer would not record."""
    if any(tensor is not None and wrapped(tensor) for tensor in tensors):
        raise RuntimeError(
            f"coup_fast.ops.{name} cannot be differentiated inside a transform of torch.func; use "
            "torch.autograd.grad, or coup_fast.reference, which is plain PyTorch"
        )
    for tensor in tensors:
        if tensor is not None and tensor.ndim == 1 and tensor.requires_grad:  # only coeffs is 1-D
            raise RuntimeError(
                f"coup_fast.ops.{name} does not differentiate its coefficients; detach coeffs, or "
                "use coup_fast.reference, which does"
            )


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 [B, ...] contiguous; sample i is drawn under keys[i].

    keys: int64 [B, 2]. shape: sizes, shape[0] == B. Philox4x32-10 and Box-Muller, within 2 ulp of
    the exact value for the same words. Not differentiable.
    """
    out: Tensor = _normal(keys, shape)
    return out


def perturb(
    images: Tensor, coeffs: Tensor, keys: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """Pixel map and forward diffusion:
    out_scale * clamp(scale u + bias + std z + sign_std sign(z), lo, hi) + out_bias.

    images: u, [B, C, ...]. coeffs: [8] = scale, bias, std, sign_std, lo, hi, out_scale, out_bias.
    z is noise if given, else drawn under keys, else absent with its terms; sign(0) = 1. Returns
    float32. Differentiable with respect to images.
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
) -> Tensor:
    """One step of any method: a row of the coefficient table applied to the state.

    x̂0 = clamp(p x + q m, x0_lo, x0_hi);
    x' = out_scale * clamp(u x̂0 + v x + w m + c_i G + e r + d z, out_lo, out_hi) + out_bias.

    x: float32 state. model_out: m [B, C, ...], or [B, 2C, ...] with the variance channels s last;
    None is m = 0. coeffs: [19]. guidance: G, reference: r, noise: z, each shaped as x. z is drawn
    under keys where noise is None, and 0 where both are. guidance_norm: c_i is the row's c
    ("none"), c / ||G_i|| ("normalised") or c min(1, g_max / ||G_i||) ("clipped"), one Euclidean
    norm per sample; a zero norm gives 0.

    Learned variance: V = exp(clip(½(s+1) log_var_hi + ½(1-s) log_var_lo)); then v + x_var V, c_i V,
    e V and sqrt(d² V + z_var² V²) replace v, c_i, e and d (Nichol and Dhariwal 2021, eq. 15).

    Differentiable with respect to x, model_out, guidance and reference.
    """
    tensors = (x, model_out, coeffs, guidance, reference, noise)
    rest = (keys, guidance, reference, noise, guidance_norm)
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
) -> None:
    """`reverse_step` written over x, a dense float32 tensor. Not differentiable.

    Other inputs may be x itself, but may not share its memory otherwise: they would be read after
    it is written.

    Raises RuntimeError if gradients are on and an input requires them.
    """
    tensors = (x, model_out, coeffs, guidance, reference)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "reverse_step_ is not differentiable, and one of its inputs requires grad: "
            "use reverse_step, or call it under torch.no_grad()"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and FORWARD_MODE._current_level >= 0:
        refuse_tangents("coup_fast.ops.reverse_step_", (*tensors, noise))
    _reverse_step_(x, model_out, coeffs, keys, guidance, reference, noise, guidance_norm)
    if not compiling and not x.is_inference():
        torch.autograd.graph.increment_version(x)


def adaptive_step(
    x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ADP: step sizes from the change of the score along itself, with a sticky stop.

    1-γ_i = <h, h - h_ahead>_i / <h, h>_i; α_i = clip(numerator / (1-γ_i), alpha_min, alpha_max);
    alive'_i = alive_i and α_i > tau; x'_i = clamp(scale (x_i + α_i h_i) + bias, lo, hi) if alive'_i
    else x_i, bit for bit. A NaN α stops its sample.

    x: float32. h = S(x), h_ahead = S(x + δh), shaped as x. alive: bool [B]. coeffs: [8] =
    numerator, alpha_min, alpha_max, tau, scale, bias, lo, hi. Returns (x', alive' bool [B],
    α float32 [B]). x' is differentiable with respect to x, h and h_ahead, through α where it is not
    clipped; alive' and α are not. Source: Yoon, Hwang, Lee 2021, section 3.2.
    """
    tensors = (x, h, h_ahead, coeffs)
    out: tuple[Tensor, Tensor, Tensor] = _apply(
        "adaptive_step", _adaptive_step, tensors, x, h, h_ahead, alive, coeffs
    )
    return out


def confidence_cotangent(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log max softmax of each row, and its gradient with respect to the logits.

    logits: [B, K] float32, float16 or bfloat16. Returns (log_confidence float32 [B], cotangent
    [B, K] in the dtype of logits). The first index wins ties. Both are differentiable.
    """
    out: tuple[Tensor, Tensor] = _apply(
        "confidence_cotangent", _confidence_cotangent, (logits,), logits
    )
    return out


# --- gradients ------------------------------------------------------------------------------------


def _needed(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Those of the arguments that need one; arguments left at their default are not counted."""
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))


def _save_perturb(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grad_perturb(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _needed(ctx, (_perturb_backward(grad, *ctx.saved_tensors), None, None, None))


def _save_reverse_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.guidance_norm = inputs
    ctx.save_for_backward(*tensors)


def _grad_reverse_step(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gx, gm, gg, gr = _reverse_step_backward(grad, *ctx.saved_tensors, ctx.guidance_norm)
    return _needed(ctx, (gx, gm, None, None, gg, gr, None, None))


def _save_adaptive_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1], output[2])


def _grad_adaptive_step(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _needed(ctx, (*_adaptive_step_backward(grad, *ctx.saved_tensors), None, None))


def _save_confidence_cotangent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grad_confidence_cotangent(ctx: Any, *grads: Tensor) -> Tensor:
    out: Tensor = _confidence_cotangent_backward(*grads, *ctx.saved_tensors)
    return out


def _grad_of_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "the compiled operators of coup_fast are differentiable once; for gradients of gradients "
        "use backend='reference' (coup_fast.reference)"
    )


_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "perturb": (_grad_perturb, _save_perturb),
    "perturb_backward": (_grad_of_backward, None),
    "reverse_step": (_grad_reverse_step, _save_reverse_step),
    "reverse_step_backward": (_grad_of_backward, None),
    "adaptive_step": (_grad_adaptive_step, _save_adaptive_step),
    "adaptive_step_backward": (_grad_of_backward, None),
    "confidence_cotangent": (_grad_confidence_cotangent, _save_confidence_cotangent),
    "confidence_cotangent_backward": (_grad_of_backward, None),
}

if _extension.available():
    for _name, (_backward, _save) in _GRADIENTS.items():
        torch.library.register_autograd(f"coup_fast::{_name}", _backward, setup_context=_save)
