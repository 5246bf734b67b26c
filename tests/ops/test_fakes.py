"""Fakes refuse what the kernels refuse, in the same words; devices are never mixed in silence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.sampling import keys_of, perturb_row, step

import coup_fast  # noqa: F401  # loads and registers the operators

kernels = torch.ops.coup_fast


def calls() -> dict[str, tuple]:
    """The arguments of a call of every operator."""
    call = step((2, 3, 4, 5))
    row, keys = perturb_row(std=0.3, lo=-1, hi=1), keys_of(2, (3, 4, 5))
    state, grad = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    adaptive = (state, grad, 0.9 * grad, torch.tensor([True, False]), torch.rand(8))
    logits = torch.randn(2, 10)
    stable = step((2, 3, 4, 5), guidance_norm="stable")
    return {
        "normal": (keys, [2, 3, 4, 5]),
        "perturb": (state, row, keys, grad),
        "perturb_backward": (grad, state, row, keys, grad),
        "reverse_step": call.args,
        "reverse_step_": call.args,
        "reverse_step_backward": (grad, *call.args),
        "reverse_step stable": stable.args,
        "reverse_step_backward stable": (grad, *stable.args),
        "adaptive_step": adaptive,
        "adaptive_step_backward": (grad, *adaptive),
        "confidence_cotangent": (logits,),
        "confidence_cotangent_backward": (torch.randn(2), torch.randn(2, 10), logits),
        "confidence_cotangent margin": (logits, "margin"),
        "confidence_cotangent_backward margin": (
            *(torch.randn(2), torch.randn(2, 10)),
            *(logits, "margin"),
        ),
    }


CALLS = calls()
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "nothing": lambda t: None,
    "float64": torch.Tensor.double,
    "int32": torch.Tensor.int,
    "one more dimension": lambda t: t[None],
    "a number": lambda t: t.flatten()[0],
    "longer": lambda t: torch.cat([t, t]),
    "wider": lambda t: torch.cat([t, t], -1),
    "empty": lambda t: t[:0],
    "transposed": lambda t: t.mT if t.ndim > 1 else t,
    "apart": lambda t: torch.stack([t, t], -1)[..., 0],
}


def changed(args: tuple, change: Callable) -> Iterator[tuple]:
    """args with each of their tensors changed in turn."""
    for i, argument in enumerate(args):
        if isinstance(argument, torch.Tensor):
            yield (*args[:i], change(argument), *args[i + 1 :])


def answer(op: Callable, args: tuple) -> object:
    """Sizes, strides and types of the results, or what was said instead."""
    try:
        out = op(*args)
    except RuntimeError as error:
        return re.search("coup_fast::.*", str(error))[0]  # without the kernel's source line
    out = (out,) if isinstance(out, torch.Tensor) else out or ()
    return [(t.shape, t.stride(), t.dtype) for t in out]


def on_meta(argument: object) -> object:
    if not isinstance(argument, torch.Tensor):
        return argument
    layout = (argument.shape, argument.stride())
    return torch.empty_strided(*layout, dtype=argument.dtype, device="meta")


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_a_fake_answers_as_its_kernel(name: str, wrong: str) -> None:
    op = getattr(kernels, name.split()[0])
    for args in changed(CALLS[name], WRONG[wrong]):
        assert answer(op, tuple(map(on_meta, args))) == answer(op, args)


@pytest.mark.parametrize("name", ["reverse_step", "reverse_step_", "reverse_step_backward"])
def test_a_fake_knows_the_guidance_norms(name: str) -> None:
    args = (*CALLS[name][:-2], "clip", None)
    said = f"coup_fast::{name}: guidance_norm must be none, normalised, clipped or stable, got clip"
    for given in (args, tuple(map(on_meta, args))):
        assert answer(getattr(kernels, name), given) == said


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_several_devices_are_refused(name: str) -> None:
    op, args = getattr(kernels, name.split()[0]), CALLS[name]
    tensors = sum(isinstance(a, torch.Tensor) for a in args)
    for mixed in changed(args, on_meta):
        if tensors > 1:
            with pytest.raises(RuntimeError, match="they must be on the same device"):
                op(*mixed)


@pytest.mark.parametrize("name", ["confidence_cotangent", "confidence_cotangent_backward"])
def test_a_fake_knows_the_quantities(name: str) -> None:
    *_, logits = CALLS[name]
    rest = CALLS[name][:-1]
    for args, said in (
        ((*rest, logits, "margins"), "quantity must be log_confidence or margin, got margins"),
        (
            (*(t[..., :1] if t.ndim > 1 else t for t in rest), logits[:, :1], "margin"),
            "logits must have at least two classes for the margin, got float32 [2, 1]",
        ),
    ):
        for given in (args, tuple(map(on_meta, args))):
            assert answer(getattr(kernels, name), given) == f"coup_fast::{name}: {said}"
