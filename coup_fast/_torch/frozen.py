"""Parameters that do not require grad for a while, and do again afterwards exactly as before.

Purification differentiates with respect to images, never to parameters: leaving those trainable
fills their .grad and makes the backward pass of DiffPure ten times as expensive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coup_fast._torch.locks import ForkLock
from coup_fast._torch.reachable import modules_behind
from coup_fast._torch.transforms import any_wrapped

_lock = ForkLock()
_held: dict[int, tuple[Tensor, int]] = {}  # id -> parameter that required grad, number of holders


def _parameters(functions: tuple[Any, ...]) -> Iterator[nn.Parameter]:
    """Those of the modules behind the callables, no module visited twice (a run asks each time)."""
    visited: set[nn.Module] = set()
    for function in functions:
        for module in modules_behind(function):
            for _, part in module.named_modules(visited):
                yield from (p for p in part._parameters.values() if p is not None)


@contextmanager
def frozen_parameters(*functions: Any) -> Iterator[None]:
    """requires_grad off for every parameter of these modules within the context.

    Of callables that are no modules, for those of `modules_behind` them. Parameters made under
    torch.inference_mode are passed over: their flags cannot be put back. Flags are as found
    afterwards, whatever is raised inside; contexts may nest and overlap in several threads, and
    the last to leave restores.

    Raises ValueError for a parameter that is itself the result of a differentiable computation.
    """
    unique = {id(parameter): parameter for parameter in _parameters(functions)}
    if not all(p.is_leaf for p in unique.values()) or any_wrapped(unique.values()):
        raise ValueError(
            "a model has parameters computed from other tensors (functional_call?): purification "
            "does not differentiate parameters; detach them first"
        )
    held: list[nn.Parameter] = []
    try:
        with _lock.current:
            for key, parameter in unique.items():
                if key in _held or (parameter.requires_grad and not parameter.is_inference()):
                    _held[key] = (parameter, _held.get(key, (parameter, 0))[1] + 1)
                    held.append(parameter)
                    parameter.requires_grad_(False)
        yield
    finally:
        with _lock.current:
            for parameter in held:
                count = _held.pop(id(parameter))[1] - 1
                if count:
                    _held[id(parameter)] = (parameter, count)
                else:
                    parameter.requires_grad_(True)
