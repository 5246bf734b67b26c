"""Batches in parts: the same bits, the same errors, less memory."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import (
    SHORT,
    PerSample,
    TinyClassifier,
    TinyNetwork,
    gradient_of,
    images,
    short_purifier,
)

from coup_fast import PurifiedClassifier, Purifier, ScoreModel
from coup_fast.attacks.peak_memory import peak_bytes

METHODS = sorted(SHORT)


def purifier(method: str, **options) -> Purifier:
    return short_purifier(method, per_sample=True, **options)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_batch_have_the_bits_of_the_whole(method: str) -> None:
    u, ids = images(5), [4, 9, 2, 7, 7]
    draw = torch.tensor([0, 3, 1, 0, 5])
    want = purifier(method)(u, ids, draw)
    for size in (1, 2, 4, 5, 99):
        assert torch.equal(purifier(method, max_batch=size)(u, ids, draw), want)
    whole, parts = (
        [x for _, x in purifier(method, max_batch=size).trajectory(u, ids, draw)]
        for size in (None, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("gradient", ["exact", "autograd"])
@pytest.mark.parametrize("method", ["coup", "coup-l2", "gdmp", "adp"])
def test_gradients_in_parts_have_the_bits_of_the_whole(method: str, gradient: str) -> None:
    u, weight = images(5), torch.randn(5, 3, 8, 8)
    want = gradient_of(purifier(method, gradient=gradient), u, weight, draw=2)
    got = gradient_of(purifier(method, gradient=gradient, max_batch=2), u, weight, draw=2)
    assert want.abs().max() > 0
    assert torch.equal(got, want)


def test_given_noise_is_cut_with_the_images() -> None:
    u = images(5)
    noise = torch.randn(purifier("diffpure").num_noise, *u.shape)
    want = purifier("diffpure")(u, noise=noise)
    assert torch.equal(purifier("diffpure", max_batch=3)(u, noise=noise), want)


def test_a_defence_classifies_in_parts_too() -> None:
    seen = []

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = PerSample(TinyClassifier())

        def forward(self, u):
            seen.append(len(u))
            return self.inner(u)

    u, weight = images(3), torch.randn(3, 4)
    results = []
    for size in (None, 4):
        clean = purifier("coup", max_batch=size, check_values=False)
        model = PurifiedClassifier(clean, Watching(), num_draws=3)
        seen.clear()
        results.append((model(u), gradient_of(model, u, weight)))
        assert seen == ([9, 9] if size is None else [4, 4, 1, 4, 4, 1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layouts_and_empty_batches() -> None:
    u = images(5).contiguous(memory_format=torch.channels_last)
    out = short_purifier("coup", max_batch=2)(u)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert short_purifier("coup", max_batch=2)(u[:0]).shape == (0, 3, 8, 8)


def test_positions_in_an_error_are_those_of_the_whole_batch() -> None:
    def network(x, t):
        return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.5, x / 0 * 0, x)

    u = 0.2 * images(5)
    u[[1, 4]] += 0.8
    clean = Purifier(ScoreModel(network), method="vp-ode", num_steps=2, max_batch=3)
    with pytest.raises(FloatingPointError, match=r"\(positions 1\)"):
        clean(u)
    u[1] -= 0.8
    with pytest.raises(FloatingPointError, match=r"\(positions 4\)"):
        clean(u)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "max_batch .* 0"),
        (2.0, TypeError, "max_batch .*int"),
        (True, TypeError, "max_batch .*int"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(value, error, text: str) -> None:
    with pytest.raises(error, match=text):
        purifier("coup", max_batch=value)


def peak(clean: Purifier, u: torch.Tensor) -> int:
    return peak_bytes(lambda: clean(u), u.device)


def test_memory_of_inference_grows_neither_with_steps_nor_with_a_batch_in_parts() -> None:
    u = images(16, size=32)
    options = {"method": "coup", "check_values": False}

    def clean(**more):
        return Purifier(
            ScoreModel(TinyNetwork()), TinyClassifier(size=32), **options | {"num_steps": 3} | more
        )

    state = 4 * u.numel()
    few, many = peak(clean(num_steps=3), u), peak(clean(num_steps=12), u)
    assert many - few < state / 16  # keys of the steps, no states
    parts = peak(clean(max_batch=2), u)
    assert parts < (few - state) / 8 + 3 * state  # a part's work, and results
