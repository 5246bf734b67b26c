"""Weights that are no numbers a network could use are refused when they are loaded."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import TinyClassifier
from torch import nn

from coup_fast.models.state import build_with


def state() -> dict[str, torch.Tensor]:
    return TinyClassifier().state_dict()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda w: w.to(torch.int8), r"1 of another kind: linear\.weight is torch\.int8.* real"),
        (lambda w: w.to(torch.complex64), r"linear\.weight is torch\.complex64, expected real"),
        (lambda w: w * float("nan"), r"1 with NaN: linear\.weight"),
    ],
)
def test_weights_of_another_kind(bad, message: str) -> None:
    weights = state() | {"linear.weight": bad(state()["linear.weight"])}
    with pytest.raises(ValueError, match=rf"a file does not fit TinyClassifier.*{message}"):
        build_with(TinyClassifier, weights, "a file", None)


def test_weights_of_any_precision_and_infinite_buffers_fit() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("count", torch.tensor(3))

    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in Masked().state_dict().items()
        }
        assert build_with(Masked, weights, "a file", torch.float32).mask.dtype == torch.float32
