"""What PyTorch's transforms do to tensors, recognised: tangents, torch.func wrappers, tracing.

The operators and the purifier have reverse-mode derivatives. What they cannot carry through they
refuse by name, because PyTorch would drop it (a tangent) or fail elsewhere (a wrapper). Knows
tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_functorch: Any = getattr(torch._C, "_functorch", None)
_is_wrapped: Callable[[Tensor], bool] = getattr(
    _functorch, "is_functorch_wrapped_tensor", lambda tensor: False
)
_innermost: Callable[[], Any] = getattr(_functorch, "peek_interpreter_stack", lambda: None)
_unpack_dual: Callable[..., Any] = forward_ad.unpack_dual
# `_current_level` is that of the innermost dual_level, torch.func's included, and negative outside:
# what to look at where a call of unpack_dual takes too long. Without it, there is no telling.
FORWARD_MODE: Any = (
    forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
)
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def wrapped(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a transform of torch.func: grad, vjp, jvp, vmap, ...

    The compiler cannot look; it has its own understanding of torch.func.
    """
    return not torch.compiler.is_compiling() and _is_wrapped(tensor)


def any_wrapped(tensors: Iterable[Tensor]) -> bool:
    """`wrapped` of many; looks at none outside torch.func."""
    if torch.compiler.is_compiling() or _innermost() is None:
        return False
    return any(map(wrapped, tensors))


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows the tensor (or, inside torch.func, may)."""
    if FORWARD_MODE._current_level < 0 or not tensor.is_floating_point():
        return False
    return wrapped(tensor) or _unpack_dual(tensor).tangent is not None


def carries_tangent(tensor: Tensor) -> bool:
    """`has_tangent` for an autograd kernel, where PyTorch has wrapped what has none too."""
    if FORWARD_MODE._current_level < 0 or not tensor.is_floating_point():
        return False
    return _unpack_dual(tensor).tangent is not None


def refuse_tangents(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises RuntimeError if any of the tensors carries a tangent that `name` would drop."""
    if any(tensor is not None and has_tangent(tensor) for tensor in tensors):
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.autograd.forward_ad, torch.func.jvp and "
            "jacfwd), and an input carries a tangent, which would be lost; use reverse mode "
            "(torch.autograd.grad), or coup_fast.reference"
        )


def inside_torch_func() -> bool:
    """Whether a transform of torch.func is at work, on whatever tensors."""
    return not torch.compiler.is_compiling() and _innermost() is not None


def refuse_scripting(module: Any) -> NoReturn:
    """Raises RuntimeError for a module of ours that torch.jit.script was given."""
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(module).__name__}: its loop, noise and exact "
        "gradient are Python; script the network and the classifier, and build it with those"
    )


def refuse_transforms(images: Tensor) -> None:
    """Raises RuntimeError where a purifier cannot follow a transform.

    These are images with a tangent, calls inside a torch.func transform, and runs that
    torch.jit.trace or torch.export record: a run's noise is computed on the host from sample ids,
    and its exact gradient by steps that are run again, neither of which a recording would hold.
    """
    if _is_tracing() or torch.compiler.is_exporting():
        raise RuntimeError(
            "a purifier cannot be recorded by torch.jit.trace or torch.export: noise and exact "
            "gradient are computed at each call; export the networks, and run the purifier's loop "
            "in Python"
        )
    if has_tangent(images):
        raise RuntimeError(
            "a purifier has no forward-mode derivative (torch.autograd.forward_ad, torch.func.jvp "
            "and jacfwd), and the images carry a tangent, which would be lost; use reverse mode "
            "(torch.autograd.grad), or torch.autograd.functional.jvp of a purifier with "
            "backend='reference', gradient='autograd'"
        )
    if wrapped(images) or inside_torch_func():
        raise RuntimeError(
            "a purifier cannot run inside a transform of torch.func (grad, vjp, jacrev, vmap, "
            "...); differentiate it with torch.autograd (grad, functional.jacobian), and give it a "
            "batch in place of vmap: of images, sample ids or draws, each [B]"
        )
