"""What models may not do (docs/assumptions.md), one fault at a time. Not a test.

Each fault changes what an honest model answers, every time it is called and for every image, and
names the words by which a run must say so. `pure` is the function of its input that a model with
this fault stands for, the honest one unless given: a run may go by it and need say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[..., Any]


@dataclass(frozen=True)
class Fault:
    """answer: of (honest model, part, *inputs). part: a module that it needs.

    at_each_call: it is looked for at each call, without `check_values` as well.
    """

    answer: Callable[..., Any]
    words: str
    pure: Callable[..., Any] | None = None
    part: Callable[[], nn.Module] = nn.Identity
    at_each_call: bool = False

    def of(self, honest: Model, as_module: bool) -> Model:
        """The model with this fault, as a module or as a function around one."""
        module = _Faulty(self, honest)
        return module if as_module else lambda *inputs: module(*inputs)

    def stands_for(self, honest: Model) -> Model:
        """What the fault's model computes if it is taken for a function of its input."""
        if self.pure is None:
            return honest
        return lambda *inputs: self.pure(honest, *inputs)


class _Faulty(nn.Module):
    def __init__(self, fault: Fault, honest: Model) -> None:
        super().__init__()
        self.fault, self.honest, self.part = fault, honest, fault.part()
        self.training = False  # which the part may be in

    def forward(self, *inputs: Tensor) -> Any:
        return self.fault.answer(self.honest, self.part, *inputs)


class _Memory(nn.Module):
    """What a model keeps between its calls, in a buffer or beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.number = 0
        self.kept: Any = None

    def count(self) -> int:
        self.number += 1
        return self.number


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.5 * grad


def _changed(change: Callable[[Tensor], Any], words: str) -> Fault:
    """A model whose answers are changed so."""
    return Fault(lambda honest, part, *inputs: change(honest(*inputs)), words)


def _other(change: Callable[[Tensor], Any], words: str) -> Fault:
    """A model whose answers are of another kind than they must be."""
    return replace(_changed(change, words), at_each_call=True)


def _writes(honest: Model, part: Any, x: Tensor, *rest: Tensor) -> Any:
    return honest(x.mul_(0.5), *rest)


def _writes_through_data(honest: Model, part: Any, x: Tensor, *rest: Tensor) -> Any:
    x.data.mul_(0.5)
    return honest(x, *rest)


def _writes_later(honest: Model, part: _Memory, x: Tensor, *rest: Tensor) -> Any:
    """Keeps its input, and writes to it when it is called again."""
    if part.kept is not None:
        part.kept.mul_(0.5)
    part.kept = x.detach()
    return honest(x, *rest)


def _answers_from_a_buffer(honest: Model, part: _Memory, *inputs: Tensor) -> Any:
    out = honest(*inputs)
    part.kept = out if part.kept is None or part.kept.shape != out.shape else part.kept.copy_(out)
    return part.kept


def _counts(honest: Model, part: _Memory, *inputs: Tensor) -> Any:
    part.calls += 1
    return honest(*inputs)


def _tires(honest: Model, part: _Memory, *inputs: Tensor) -> Any:
    return honest(*inputs) / part.count()


def _random(honest: Model, part: Any, *inputs: Tensor) -> Any:
    out = honest(*inputs)
    return out + torch.rand_like(out)


def _looks_aside(honest: Model, part: Any, x: Tensor, *rest: Tensor) -> Any:
    """Depends on the image after this one in the batch; alone it is honest."""
    out = honest(x, *rest)
    return out + (out.roll(1, 0) - out)


def _through(honest: Model, part: nn.Module, x: Tensor, *rest: Tensor) -> Any:
    return honest(part(x), *rest)


def _without_grad(honest: Model, part: Any, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return honest(*inputs)


def _raises(honest: Model, part: Any, *inputs: Tensor) -> Any:
    raise OSError("the model's own failure")


def _first_nan(out: Tensor) -> Tensor:
    out = out.clone()
    out[:1, :1] = torch.nan
    return out


NO_FLOATS = "floating-point"
NO_TENSOR = "score network returned|logits"
SHAPES = "score network returned|classifier must return|needs network outputs"
ANY = {
    "batch norm in training mode": Fault(
        _through, "batch norm in training mode", part=lambda: nn.BatchNorm2d(3), at_each_call=True
    ),
    "batch norm without statistics": Fault(
        _through,
        "batch norm without running statistics",
        part=lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(),
    ),
    "active dropout": Fault(_through, "active dropout", part=lambda: nn.Dropout(0.5)),
    "writes to its input": Fault(
        _writes, "changed its input|in-?place", lambda honest, x, *t: honest(0.5 * x, *t)
    ),
    "writes through data": Fault(
        _writes_through_data, "changed its input", lambda honest, x, *t: honest(0.5 * x, *t)
    ),
    "writes to an earlier input": Fault(
        _writes_later, "changed its input|in-?place|answers to one input", part=_Memory
    ),
    "answers from a buffer": Fault(
        _answers_from_a_buffer, "gave before|in-?place|answers to one input", part=_Memory
    ),
    "counts its calls": Fault(_counts, r"changed .*\.calls", part=_Memory),
    "hidden state": Fault(_tires, "two answers|computed again", part=_Memory),
    "random": Fault(_random, "two answers|computed again"),
    "depends on its neighbours": Fault(_looks_aside, "other images"),
    "cut from the graph": Fault(_without_grad, "carr(y|ies) no gradient"),
    "cut in part": _changed(lambda out: 0.5 * out + 0.5 * out.detach(), "derivative is not"),
    "another derivative": _changed(_HalfGradient.apply, "derivative is not"),
    "raises": Fault(_raises, "the model's own failure"),
    "NaN": _changed(lambda out: out * torch.nan, "(inf or NaN|NaN or inf)"),
    "one NaN": _changed(_first_nan, "(inf or NaN|NaN or inf)"),
    "infinity": _changed(lambda out: out + torch.inf, "(inf or NaN|NaN or inf)"),
    "int64": _other(lambda out: out.long(), NO_FLOATS),
    "bool": _other(lambda out: out > 0, NO_FLOATS),
    "complex": _other(lambda out: out.to(torch.complex64), NO_FLOATS),
    "sparse": _other(lambda out: out.to_sparse(), NO_FLOATS),
    "meta": _other(lambda out: out.to("meta"), "on meta"),
    "nothing": _other(lambda out: None, NO_TENSOR),
    "tuple": _other(lambda out: (out, out), NO_TENSOR),
    "array": _other(lambda out: out.detach().numpy(), NO_TENSOR),
    "number": _other(lambda out: out.sum(), SHAPES),
    "one row": _other(lambda out: out.sum(0), SHAPES),
    "a row too many": _other(lambda out: torch.cat([out, out[:1]]), SHAPES),
    "a dimension too many": _other(lambda out: out[None], SHAPES),
}
NETWORK = (
    ANY
    | {
        "writes to its time": Fault(
            lambda honest, part, x, t: honest(x, t.mul_(0.5)),
            "changed its input|written-to tensor",  # one number serves all images
            lambda honest, x, t: honest(x, 0.5 * t),
        ),
        "one channel": _other(lambda out: out[:, :1], SHAPES),
        "another size": _other(lambda out: out[..., :1], SHAPES),
    }
)
CLASSIFIER = ANY | {
    "one column": _other(lambda out: out[:, :1], "at least 2 classes"),
    "probabilities": _changed(lambda out: out.softmax(1), "probabilities"),
    "a masked class": _changed(
        lambda out: out + torch.tensor([0.0, 0.0, 0.0, -torch.inf]), "infinite"
    ),
}
# What a model may do.
FINE = {
    "honest": _changed(lambda out: out, "-"),
    "float64": _changed(lambda out: out.double(), "-"),
    "in other memory": _changed(lambda out: torch.stack([out, out], -1)[..., 0], "-"),
    "transposed": _changed(lambda out: out.mT.contiguous().mT, "-"),
    "a parameter's answer": _changed(lambda out: out * nn.Parameter(torch.ones(())), "-"),
}
