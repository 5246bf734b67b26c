"""What a callable says of itself where it is a module: parameters, dtype, channels."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def module_of(function: Any) -> nn.Module | None:
    """The module behind a callable: itself, or the one whose bound method it is, or None."""
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def mode_of(function: Any) -> bool:
    """Whether the module behind a callable is in training mode, for the flag of what wraps it.

    A new module is in training mode. A wrapper that kept that flag would report a training mode
    that its network is not in, and hand it on where it is copied.
    """
    module = module_of(function)
    return module is not None and module.training


def name_of(function: Any) -> str:
    """A callable in a few words: a module's class, a function's name."""
    if isinstance(function, nn.Module):
        return type(function).__name__
    return str(getattr(function, "__qualname__", None) or reprlib.repr(function))


def described(function: Any) -> str:
    """A callable in one line: its name, and where it is a module, its parameters."""
    module = module_of(function)
    if module is None:
        name = name_of(function)
        return name if name.startswith("<") else f"<{name}>"
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters if not is_lazy(p))
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    places = {str(p.device) for p in parameters}
    facts = [f"{count:,} parameters" if parameters else "no parameters", *sorted(dtypes)]
    return f"<{name_of(function)}: {', '.join([*facts, *sorted(places)])}>"


def first_parameter(function: Any) -> Tensor | None:
    """The first floating-point parameter or buffer behind a callable, or None.

    Its dtype and device are the ones the callable wants its input in.
    """
    module = module_of(function)
    if module is None:
        return None
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor
    return None


def dtype_of(function: Any) -> torch.dtype | None:
    """The dtype of the callable's parameters, or None where it has none.

    float32 for a module of quantised layers, which take no other and hide their parameters.
    """
    parameter = first_parameter(function)
    if parameter is not None:
        return parameter.dtype
    module = module_of(function)
    parts = () if module is None else module.modules()
    quantised = any(type(part).__module__.startswith("torch.ao.nn.") for part in parts)
    return torch.float32 if quantised else None


def in_dtype(dtype: torch.dtype | None, x: Tensor) -> Tensor:
    """x in this dtype; x itself for None."""
    return x if dtype is None or dtype == x.dtype else x.to(dtype)


def in_dtype_of(function: Any, x: Tensor) -> Tensor:
    """x in the dtype of the callable's parameters; x itself where it has none."""
    return in_dtype(dtype_of(function), x)


def no_wider(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a network returned for a state of `dtype`: rounded to it where it alone is float64.

    Half types stay: the operators read those in place, but no float64.
    """
    return x.to(dtype) if x.dtype == torch.float64 != dtype else x


def grad_leaf(x: Tensor) -> Tensor:
    """x's values as a leaf that requires grad, whatever mode x was made in.

    A tensor made under `torch.inference_mode` can never require grad, so that one is copied; any
    other shares its memory. Call it with inference mode off.
    """
    leaf = x.clone() if x.is_inference() else x.detach()
    return leaf.requires_grad_()


def recordable(value: Any) -> Any:
    """A tensor, or a copy of one that was made in inference mode, which no graph can keep.

    Call it with inference mode off; what is no tensor is returned as it is.
    """
    made_there = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if made_there else value


def declared_channels(function: Any) -> int | None:
    """The image channels a network says it takes, or None where it says nothing.

    Read from `in_channels` or `config["in_channels"]`, of the network or, for a Sequential, of its
    first module. Where nothing is declared, the network's own error has to do.
    """
    while isinstance(function, nn.Sequential) and len(function) > 0:
        function = function[0]
    config = getattr(function, "config", None)
    # The configuration first: diffusers warns of the attribute.
    channels = (
        config.get("in_channels")
        if isinstance(config, Mapping)
        else getattr(config, "in_channels", None)
    )
    if channels is None:
        channels = getattr(function, "in_channels", None)
    return channels if isinstance(channels, int) and not isinstance(channels, bool) else None
