"""Attention that can be differentiated twice.

PyTorch's fused attention kernels have a first derivative and no second one; the kernel that it
calls "math" has all. Which of them `F.scaled_dot_product_attention` takes is decided by flags of
the process, and those belong to the user and to every thread. So nothing is set here: a mode of
this thread hands the calls to the math kernel, while it is entered. Knows torch only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_math: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_attention_math
_heads_takes = inspect.signature(F.multi_head_attention_forward)


class TwiceDifferentiableAttention(TorchFunctionMode):
    """Within it, attention has second derivatives: in this thread, for calls from Python.

    It covers `F.scaled_dot_product_attention`, and `nn.MultiheadAttention` and the transformer
    layers, which call it out of a mode's sight unless they are asked for their weights. Scripted
    modules and kernels of other packages are not covered.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            return _heads(function, args, kwargs)
        return function(*args, **kwargs)


def _heads(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`F.multi_head_attention_forward`, by way of its weights: that way is plain products."""
    call = _heads_takes.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if given["need_weights"]:
        return function(*args, **kwargs)
    if given["is_causal"] and given["key_padding_mask"] is None:  # the kernel's own mask then
        size = len(given["query"]), len(given["key"])
        blocked = torch.ones(size, dtype=torch.bool, device=given["query"].device)
        given["attn_mask"] = blocked.triu(1)
    given["need_weights"] = True
    return function(*call.args, **call.kwargs)[0], None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the math kernel, in autocast's dtype as that one is."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    with torch.autocast(device, enabled=False):
        out, _ = _math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return out
