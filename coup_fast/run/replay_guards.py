"""What the exact gradient relies on, checked: models that repeat themselves and do not change.

The backward pass computes the steps of a run again. That is the same computation only if the models
are functions of their inputs alone, with the same parameters as in the forward pass; here is what
looks, before, between and during, and says why where it is not so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from coup_fast._torch.modules import first_parameter
from coup_fast.run.assumptions import named_modules
from coup_fast.run.steps import Run, State
from coup_fast.run.warn import warn


class Fingerprint:
    """The versions of all parameters and buffers, as autograd guards the tensors it saves.

    Sees in-place changes (optimiser steps, load_state_dict) and replaced tensors, not writes
    through `.data`; of plain callables nothing is known.
    """

    def __init__(self, models: tuple[Any, ...], noise: Tensor | None = None) -> None:
        self.models = models
        self.noise = noise
        self.versions = self._now()

    def _now(self) -> dict[str, tuple[int, int]]:
        tensors: dict[str, Tensor] = {} if self.noise is None else {"the given noise": self.noise}
        for name, module in named_modules(self.models):
            for kind in (module._parameters, module._buffers):
                for key, tensor in kind.items():
                    if tensor is not None:
                        tensors[f"{name}.{key}"] = tensor
        return {
            name: (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for name, tensor in tensors.items()
        }

    def check(self, when: str, consequence: str) -> None:
        """Raises RuntimeError naming the tensors that are not as they were."""
        now = self._now()
        changed = [name for name in self.versions | now if now.get(name) != self.versions.get(name)]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise RuntimeError(
                f"tensors of the models were changed {when} ({', '.join(changed[:3])}{more}): "
                f"{consequence}"
            )


def same_autocast(device_type: str) -> Callable[[], AbstractContextManager[None]]:
    """A context with the autocast settings of now, for a backward pass that runs outside them."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def context() -> Iterator[None]:
        with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache):
            yield

    return context


def _same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def _likely_reason(run: Run) -> str:
    training = [
        name
        for name, module in named_modules(run.models)
        if module.training and module is not run.calls.score_model  # it does nothing by itself
    ]
    if training:
        return f"modules in training mode ({training[0]}) may be random: call .eval()"
    return (
        "a model draws random numbers, keeps state between calls, was changed through .data, or "
        "uses nondeterministic operations (torch.use_deterministic_algorithms(True) names those)"
    )


def check_replay(
    run: Run,
    k: int,
    state: State,
    attacked: Tensor | None,
    replayed: Tensor,
    stored: Tensor,
    *,
    strict: bool,
) -> None:
    """Compare step k as computed again with its graph (`replayed`) to the state that was stored.

    Some operators (SiLU's derivative, attention) round differently where gradients are recorded,
    so a difference is settled by computing the step once more as the forward pass did. If that
    has other bits, RuntimeError; unless strict, only if it differs by more than rounding, and a
    warning otherwise.
    """
    if _same_bits(replayed, stored):
        return
    with torch.no_grad():
        again = run.step(k, state, attacked)[0]
    parameter = first_parameter(run.calls.score_model)
    dtype = stored.dtype if parameter is None else parameter.dtype
    if torch.is_autocast_enabled(stored.device.type):
        dtype = torch.get_autocast_dtype(stored.device.type)
    dtype = run.calls.autocast or dtype
    rounding = 256 * max(torch.finfo(dtype).eps, torch.finfo(stored.dtype).eps)

    def difference(value: Tensor) -> float:
        gap = (value - stored).abs().max() / stored.abs().max().clamp_min(1e-30)
        return float(gap.nan_to_num(0.0))  # stored NaN has been reported already

    where = f"{run.plan.method}: step {k + 1} of {run.num_steps}, computed again,"
    gap = difference(again)
    if not _same_bits(again, stored):
        message = (
            f"{where} differs from the forward pass by {gap:.1e} of the state's largest value, so "
            f"its gradient is not that of the run; likely reason: {_likely_reason(run)}"
        )
        if strict or gap > rounding:
            raise RuntimeError(message)
        warn(message)
    if (recorded := difference(replayed)) > rounding:
        raise RuntimeError(
            f"{where} differs by {recorded:.1e} of the state's largest value where gradients are "
            "recorded: a model computes something else when it is differentiated"
        )
