"""The guidance of COUP: G = ∇ₓ log max_y p(y | x), from the classifier that is defended.

Or, for the stable step (docs/guidance.md), the margin m and its gradient.

Zhang et al., arXiv 2408.05900: the gradient is unlabelled, taken on the raw noisy state in
diffusion space, x = 2u - 1, so it carries the factor ½ of the pixel map. One classifier forward,
one fused kernel for log max softmax and its cotangent, one vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coup_fast._torch.attention import TwiceDifferentiableAttention
from coup_fast._torch.differentiated import explain
from coup_fast._torch.modules import grad_leaf, in_dtype_of, no_wider
from coup_fast.run.assumptions import check_logits
from coup_fast.run.backends import Operators

Guidance = tuple[Tensor, Tensor | None]  # the gradient, and of a stable step the margin [B]

_CUT = (
    "the classifier's logits carry no gradient with respect to the image, and guidance is that "
    "gradient; compute them with torch operations and without torch.no_grad() or quantised layers, "
    "or give the classifier that was there before its quantisation"
)


def _logits(classifier: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[B, K] logits at the pixels of the state x, with their graph."""
    logits = check_logits(classifier(in_dtype_of(classifier, 0.5 * x + 0.5)), x)
    if not logits.requires_grad:
        raise RuntimeError(_CUT)
    return no_wider(logits, x.dtype)


def confidence_gradient(
    classifier: Callable[[Tensor], Tensor], x: Tensor, ops: Operators, *, graph: bool = False
) -> Tensor:
    """∇ₓ log max_y softmax(classifier((x+1)/2))_y, in the shape and dtype of x.

    Arguments and errors are those of `guidance_of`.
    """
    return guidance_of(classifier, x, ops, "log_confidence", graph=graph)[0]


def guidance_of(
    classifier: Callable[[Tensor], Tensor],
    x: Tensor,
    ops: Operators,
    quantity: str,
    *,
    graph: bool = False,
) -> Guidance:
    """The gradient of the log-confidence at x; or that of the margin, and the margin itself.

    Args:
        classifier: module or callable, pixels [B, C, H, W] in [0, 1] (beyond where the state is)
            -> logits [B, K]. Each sample's logits must depend on that sample alone.
        x: state [B, C, H, W] in diffusion space.
        ops: `coup_fast.ops` or `coup_fast.reference`.
        quantity: "log_confidence" or "margin", as in `confidence_cotangent`.
        graph: differentiate through the guidance, to second order; needs an x that requires grad.
            Without it the result is detached ("stopped"), also under `no_grad` and
            `inference_mode`.

    Returns:
        (gradient in the shape and dtype of x, margin [B] in float32 or x's wider dtype, or None for
        the log-confidence).

    Raises ValueError or TypeError for other than logits [B, K >= 2], and RuntimeError for logits
    without a graph or, with `graph`, for a classifier that cannot be differentiated twice.
    """
    try:
        gradient, value = _gradient(classifier, x, ops, quantity, graph)
    except RuntimeError as error:
        explain(error, "the classifier")
        raise
    if gradient is None:
        raise RuntimeError(_CUT)
    return gradient, value if quantity == "margin" else None


def _gradient(
    classifier: Callable[[Tensor], Tensor], x: Tensor, ops: Operators, quantity: str, graph: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradient and value of the quantity; no gradient for logits that x has no part in."""
    gradient: Tensor | None
    if graph:
        with torch.enable_grad(), TwiceDifferentiableAttention():
            logits = _logits(classifier, x)
            value, cotangent = ops.confidence_cotangent(logits, quantity)
            try:
                (gradient,) = torch.autograd.grad(
                    logits, x, cotangent, create_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                if type(error) is not RuntimeError:  # out of memory and the like
                    raise
                explain(error, "the classifier")
                raise RuntimeError(
                    "the gradient through the guidance needs a classifier that can be "
                    "differentiated twice, and this one cannot (torch.compile'd modules, for "
                    "example); give its plain module, or guidance_gradient='stopped'. "
                    f"PyTorch says: {error}"
                ) from error
        return gradient, value
    with torch.inference_mode(False), torch.enable_grad():
        point = grad_leaf(x)
        logits = _logits(classifier, point)
        value, cotangent = ops.confidence_cotangent(logits.detach(), quantity)
        (gradient,) = torch.autograd.grad(logits, point, cotangent, allow_unused=True)
    return gradient, value
