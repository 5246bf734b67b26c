"""Pixel map and forward diffusion against float64, and the gradient."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreter
from helpers.sampling import DTYPES, LOW, VIEWS, keys_of, perturb_row, ulps, views_of

from coup_fast import ops

ROWS = {
    "map": perturb_row(),
    "clamped_map": perturb_row(lo=-1, hi=1),
    "diffusion": perturb_row(scale=1.8, bias=-0.9, std=0.32),
    "adp": perturb_row(
        scale=1, bias=0, std=0.25, lo=0, hi=1, out_scale=255 / 256, out_bias=1 / 512
    ),
    "binary": perturb_row(scale=1, bias=0, sign_std=0.2, lo=0, hi=1),
    "both": perturb_row(std=0.1, sign_std=0.3, lo=-0.9, hi=0.8),
    "noise_alone": perturb_row(scale=0, bias=0.5, std=1.5),
}
SHAPES = [(1, 1), (33, 1, 7), (5, 3, 13, 17), (2, 3, 32, 32), (1, 2, 2, 3, 4)]


def truth(images, row, z):
    return interpreter.start(row.double().numpy(), images.double(), z.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_perturb_is_the_formula(shape, name: str, dtype) -> None:
    images, keys = torch.rand(shape).to(dtype), keys_of(shape[0], shape[1:])
    z = ops.normal(keys, shape)
    out = ops.perturb(images, ROWS[name], keys)
    assert out.dtype == torch.float32
    assert out.shape == shape
    bound = 2e-6 * (4 + z.abs().double())  # terms are at most 2, 1 and |z|
    assert bool(((out.double() - truth(images, ROWS[name], z)).abs() <= bound).all())
    assert torch.equal(ops.perturb(images, ROWS[name], None, z), out)
    assert torch.equal(ops.perturb(images.float(), ROWS[name], keys), out)


def test_without_noise_its_terms_are_absent() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(ops.perturb(images, ROWS["both"]), (2 * images - 1).clamp(-0.9, 0.8))


def test_sign_of_zero_is_one() -> None:
    row = perturb_row(scale=0, bias=0, sign_std=0.5)
    z = torch.tensor([[0.0, -0.0, 1e-30, -1e-30]])
    assert ops.perturb(torch.zeros(1, 4), row, None, z).tolist() == [[0.5, 0.5, 0.5, -0.5]]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_formats_do_not_matter(dtype, name: str) -> None:
    images, keys = torch.rand(5, 3, 13, 17).to(dtype), keys_of(5, (3, 13, 17))
    viewed = views_of(images)[name]
    out = ops.perturb(viewed, ROWS["adp"], keys)
    assert torch.equal(out, ops.perturb(images, ROWS["adp"], keys))
    last = name == "channels_last"
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_gradient_is_that_of_the_formula(name: str, dtype, given: bool) -> None:
    shape = (5, 3, 13, 17)
    images, keys = torch.rand(shape).to(dtype), keys_of(5, shape[1:])
    z = ops.normal(keys, shape)
    exact = images.double().requires_grad_()
    grad = torch.randn(shape)
    (wanted,) = torch.autograd.grad(truth(exact, ROWS[name], z), exact, grad.double())
    leaf = images.requires_grad_()
    out = ops.perturb(leaf, ROWS[name], None if given else keys, z if given else None)
    (actual,) = torch.autograd.grad(out, leaf, grad)
    assert actual.dtype == dtype
    if dtype in LOW:
        assert bool((ulps(actual, wanted)[wanted.abs() > 1e-4] <= 1).all())
    else:
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": torch.zeros(3)}, r": images .*\[B, C, ...\].* got float32 \[3\]"),
        (
            {"images": torch.zeros(2, 3).int()},
            ": images .*float32, float16 or bfloat16, got int32",
        ),
        ({"coeffs": torch.zeros(19)}, r": coeffs .*float32 \[8\], got float32 \[19\]"),
        ({"noise": torch.zeros(2, 4)}, r": noise .*\[2, 3\], got float32 \[2, 4\]"),
        ({"keys": torch.zeros(2).long()}, r": keys .*int64 \[2, 2\] .* got int64 \[2\]"),
    ],
)
def test_errors_name_argument_given_and_expected(change: dict, said: str) -> None:
    arguments = {
        "images": torch.zeros(2, 3),
        "coeffs": ROWS["map"],
        "keys": None,
        "noise": None,
    } | change
    with pytest.raises(RuntimeError, match=said):
        ops.perturb(**arguments)
