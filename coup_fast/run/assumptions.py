"""What a run assumes of its networks and classifiers, and what looks whether it is so.

A model is a function of its input alone: it does not write to its input, changes no state of its
own, does not depend on the other images of a batch, and returns real finite numbers of the right
shape on its input's device. What is differentiated lets gradients through. `docs/assumptions.md`
says this to users, and who checks what:

- modes are looked at whenever a run is prepared (`refuse_training_mode`);
- the kind of each answer, and whether the input was written to, at each call (`check_answer`,
  `version_of`): attributes of tensors, which no device has to be asked for;
- everything that needs numbers, once for each kind of run, after the first run of that kind
  (`coup_fast.run.first_look`). What is wrong is an error, what is doubtful a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from coup_fast._torch.calls import logits_of
from coup_fast._torch.reachable import modules_behind


def named_modules(models: tuple[Any, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Every module behind the models, once, and its name."""
    visited: set[nn.Module] = set()
    for model in models:
        for module in modules_behind(model):
            for name, part in module.named_modules(visited):
                yield f"{type(module).__name__}.{name}" if name else type(module).__name__, part


def _is_random(module: nn.Module) -> bool:
    """Whether the module, as it stands, draws random numbers of its own."""
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, nn.RReLU)


def refuse_training_mode(*models: Any) -> None:
    """Raises ValueError if a model has batch norm that normalises by the batch, or active dropout.

    Batch statistics make an image's result depend on its neighbours, and each call changes the
    running ones. Dropout makes it depend on more than the seed, and draws new masks when a step is
    computed again.
    """
    for name, module in named_modules(models):
        if isinstance(module, _BatchNorm):
            if module.training:
                raise ValueError(
                    f"batch norm in training mode ({name}): an image's result would depend on the "
                    "others in its batch, and every call would change the model; call .eval() on "
                    "the models"
                )
            if module.running_mean is None:
                raise ValueError(
                    f"batch norm without running statistics ({name}): an image's result, and its "
                    "gradient, would depend on the others in its batch; use a model that has them"
                )
        if _is_random(module):
            raise ValueError(
                f"active dropout ({type(module).__name__}, {name}): its masks follow no seed of "
                "the purifier, and are others when a step is computed again for the gradient; call "
                ".eval() on the models"
            )


def check_answer(name: str, answer: Tensor, given: Tensor) -> None:
    """The answer is of real numbers, dense and on the device of the input; asks no device."""
    if answer.device != given.device:
        raise ValueError(
            f"the {name} returned a tensor on {answer.device} for one on {given.device}; it must "
            "answer where it is asked"
        )
    if not answer.is_floating_point() or answer.layout != torch.strided:
        kind = answer.dtype if answer.layout == torch.strided else answer.layout
        raise TypeError(f"the {name} must return dense real floating-point numbers, got {kind}")


def check_logits(logits: Any, given: Tensor) -> Tensor:
    """A classifier's answer to `given`, checked: logits [B, K], K >= 2. ValueError, TypeError.

    Of an object with a tensor `.logits` that is taken.
    """
    logits = logits_of(logits)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(given):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the classifier must return logits [{len(given)}, K]; got {got}")
    check_answer("classifier", logits, given)
    if logits.shape[1] < 2:
        raise ValueError(
            f"the classifier must return logits [{len(given)}, K] of at least 2 classes, got "
            f"{list(logits.shape)}: with one column every label is 0 and every confidence 1; for a "
            "binary classifier return two, torch.cat([torch.zeros_like(z), z], 1)"
        )
    return logits


def version_of(tensor: Tensor) -> int:
    """Counts the writes to a tensor; tensors of inference mode have no count."""
    return 0 if tensor.is_inference() else tensor._version
