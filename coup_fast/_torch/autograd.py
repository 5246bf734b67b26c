"""Gradients of the compiled operators, and the derivatives that they refuse.

Registered when the libraries are loaded, so that a call of `torch.ops.coup_fast.*` loses nothing
that a call of `coup_fast.ops` would refuse to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_kernels: Any = torch.ops.coup_fast


def _needed(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Those of the arguments that need one; arguments left at their default are not counted."""
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grad_perturb(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out = _kernels.perturb_backward.default(grad, *ctx.saved_tensors)
    return _needed(ctx, (out, None, None, None))


def _save_reverse_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.guidance_norm, margin = inputs
    ctx.save_for_backward(*tensors, margin)


def _grad_reverse_step(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, margin = ctx.saved_tensors
    gx, gm, gg, gr, gmargin = _kernels.reverse_step_backward.default(
        grad, *tensors, ctx.guidance_norm, margin
    )
    return _needed(ctx, (gx, gm, None, None, gg, gr, None, None, gmargin))


def _save_adaptive_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1], output[2])


def _grad_adaptive_step(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    out = _kernels.adaptive_step_backward.default(grad, *ctx.saved_tensors)
    return _needed(ctx, (*out, None, None))


def _save_confidence_cotangent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, ctx.quantity = inputs
    ctx.save_for_backward(logits)


def _grad_confidence_cotangent(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    out = _kernels.confidence_cotangent_backward.default(*grads, logits, ctx.quantity)
    return _needed(ctx, (out, None))


def _grad_of_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "the compiled operators of coup_fast are differentiable once; for gradients of gradients "
        "use backend='reference' (coup_fast.reference)"
    )


_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "perturb": (_grad_perturb, _save),
    "perturb_backward": (_grad_of_backward, None),
    "reverse_step": (_grad_reverse_step, _save_reverse_step),
    "reverse_step_backward": (_grad_of_backward, None),
    "adaptive_step": (_grad_adaptive_step, _save_adaptive_step),
    "adaptive_step_backward": (_grad_of_backward, None),
    "confidence_cotangent": (_grad_confidence_cotangent, _save_confidence_cotangent),
    "confidence_cotangent_backward": (_grad_of_backward, None),
}
# Operator -> where its row of coefficients is among the arguments.
_COEFFS = {"perturb": 1, "reverse_step": 2, "adaptive_step": 4}


def _refuse(name: str, args: tuple[Any, ...]) -> None:
    """Raises RuntimeError for derivatives that the autograd layer would not record."""
    # not at import, which would take longer
    from coup_fast._torch.transforms import carries_tangent, refuse_tangents, wrapped

    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # In torch.func.jvp every tensor comes wrapped here, and the tangent itself has to be asked for.
    refuse_tangents(f"coup_fast.ops.{name}", [t for t in tensors if carries_tangent(t)])
    if not torch.is_grad_enabled():
        return
    if any(tensor.requires_grad and wrapped(tensor) for tensor in tensors):
        raise RuntimeError(
            f"coup_fast.ops.{name} cannot be differentiated inside a transform of torch.func; use "
            "torch.autograd.grad, or coup_fast.reference, which is plain PyTorch"
        )
    coeffs = args[_COEFFS[name]] if name in _COEFFS else None
    if isinstance(coeffs, Tensor) and coeffs.requires_grad:
        raise RuntimeError(
            f"coup_fast.ops.{name} does not differentiate its coefficients; detach coeffs, or "
            "use coup_fast.reference, which does"
        )


class _Library(torch.library.Library):
    """Puts the refusals in front of each autograd kernel that is registered through it."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        name = str(op_name).rpartition("::")[2]

        def refusing(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            _refuse(name, args)
            return fn(keyset, *args, **kwargs)

        super().impl(op_name, refusing, dispatch_key, **options)  # type: ignore[no-untyped-call]


def _record_in_place(keyset: Any, *args: Any) -> None:
    """The autograd kernel of reverse_step_, which has no gradient."""
    inputs = (*args[:6], *args[8:])  # noise and norm have no gradient
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
        raise RuntimeError(
            "reverse_step_ is not differentiable, and one of its inputs requires grad: "
            "use reverse_step, or call it under torch.no_grad()"
        )
    below: Any = torch._C._after_autograd_keyset
    _kernels.reverse_step_.default.redispatch(keyset & below, *args)


def _count_in_place(keyset: Any, x: Tensor, *args: Any) -> None:
    """Tells autograd that x is written over, so that a graph that holds it says so."""
    below: Any = torch._C._after_ADInplaceOrView_keyset
    _kernels.reverse_step_.default.redispatch(keyset & below, x, *args)
    torch.autograd.graph.increment_version(x)


_library: _Library | None = None  # what it registers ends with it


def register() -> None:
    global _library
    _library = _Library("coup_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, (backward, save) in _GRADIENTS.items():
        torch.library.register_autograd(
            f"coup_fast::{name}", backward, setup_context=save, lib=_library
        )
    _library.impl("reverse_step_", _record_in_place, "Autograd", with_keyset=True)
    torch.library.Library.impl(  # type: ignore[no-untyped-call]
        _library, "reverse_step_", _count_in_place, "ADInplaceOrView", with_keyset=True
    )
