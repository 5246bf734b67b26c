"""The operators as a PyTorch user would write them, eagerly and through torch.compile.

Formulas: Zhang et al., arXiv 2408.05900 (COUP step); Yoon et al., arXiv 2106.06041 (ADP step).
These are the fair baseline: fewest operators, coefficients as Python floats where that is quickest,
torch's own normals. `coup_fast.reference`, which computes the kernels' Philox noise in plain
PyTorch, is a yardstick for correctness, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guided_step(
    x: Tensor, eps: Tensor, guidance: Tensor, a: float, b: float, c: float, d: float
) -> Tensor:
    """COUP's update a x + b eps + c G + d z with fresh z; all tensors [B, C, H, W] float32."""
    return a * x + b * eps + c * guidance + d * torch.randn_like(x)


def guided_step_arithmetic(
    x: Tensor, eps: Tensor, guidance: Tensor, z: Tensor, a: float, b: float, c: float, d: float
) -> Tensor:
    """The same with z given: what is left of the step without its noise."""
    return a * x + b * eps + c * guidance + d * z


def guided_step_of_row(x: Tensor, eps: Tensor, guidance: Tensor, row: Tensor) -> Tensor:
    """COUP's update with its four coefficients in a tensor [4], as torch.compile wants them.

    Python floats would be compiled into the code and recompiled at every step of a run.
    """
    a, b, c, d = row.unbind()
    return a * x + b * eps + c * guidance + d * torch.randn_like(x)


def guided_step_arithmetic_of_row(
    x: Tensor, eps: Tensor, guidance: Tensor, z: Tensor, row: Tensor
) -> Tensor:
    """`guided_step_arithmetic` with its coefficients in a tensor [4]."""
    a, b, c, d = row.unbind()
    return a * x + b * eps + c * guidance + d * z


def adaptive_step(
    x: Tensor,
    h: Tensor,
    h_ahead: Tensor,
    alive: Tensor,
    numerator: float,
    alpha_min: float,
    alpha_max: float,
    tau: float,
    scale: float,
    bias: float,
) -> tuple[Tensor, Tensor]:
    """ADP's update: step size per sample from two scores, sticky stop, pixel map, clamp to [0, 1].

    x, h, h_ahead: [B, C, H, W] float32; alive: bool [B]. Returns the next x and alive.
    """
    gamma = (h * h_ahead).flatten(1).sum(1) / (h * h).flatten(1).sum(1)
    alpha = (numerator / (1.0 - gamma)).clamp(alpha_min, alpha_max)
    alive = alive & (alpha > tau)
    move = torch.where(alive, alpha, 0.0)[:, None, None, None]
    return (scale * (x + move * h) + bias).clamp(0.0, 1.0), alive


def confidence_cotangent(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log max softmax [B] and its gradient with respect to logits [B, K], by autograd."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        log_confidence = logits.log_softmax(dim=1).max(dim=1).values
        (cotangent,) = torch.autograd.grad(log_confidence.sum(), logits)
    return log_confidence.detach(), cotangent


def confidence_cotangent_closed_form(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same without autograd (one-hot of the largest minus softmax), for torch.compile."""
    log_probability = logits.log_softmax(dim=1)
    log_confidence, label = log_probability.max(dim=1)
    one_hot = torch.nn.functional.one_hot(label, logits.shape[1])
    return log_confidence, one_hot - log_probability.exp()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of one function for one shape, apart from every other compiled function.

    torch counts recompilations per code object and gives up after a few, so this one is a copy.
    """

    def separate(*args: Any) -> Any:
        return function(*args)

    separate.__code__ = separate.__code__.replace()
    result: Callable[..., Any] = torch.compile(separate, fullgraph=True, dynamic=False)
    return result
