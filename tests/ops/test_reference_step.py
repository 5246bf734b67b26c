"""The plain PyTorch step against the formula in float64, gradcheck, and its own contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import interpreter
from torch.autograd import gradcheck, gradgradcheck

from coup_fast import noise, ops, reference
from coup_fast.plan import (
    G_MAX,
    LOG_VAR_HI,
    LOG_VAR_LO,
    NUM_COLUMNS,
    OUT_HI,
    OUT_LO,
    OUT_SCALE,
    X0_HI,
    X0_LO,
    X_VAR,
    Z_VAR,
    C,
    D,
    E,
    P,
    Q,
    U,
    V,
    W,
    blank_row,
)


def full_row(seed: int = 0) -> np.ndarray:
    """A row with every term and every clamp at work."""
    row = np.random.default_rng(seed).uniform(0.3, 1.0, NUM_COLUMNS)
    row[[X0_LO, X0_HI, OUT_LO, OUT_HI]] = -0.7, 0.8, -1.2, 1.1
    row[[LOG_VAR_LO, LOG_VAR_HI, G_MAX]] = -2.0, -1.0, 0.9
    return row


def inputs(shape, model_channels: int = 1, dtype=torch.float64):
    x, g, r, z = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(4))
    m = torch.randn(shape[0], model_channels * shape[1], *shape[2:], dtype=torch.float64).to(dtype)
    return x, m, g, r, z


@pytest.mark.parametrize("norm", ["none", "normalised", "clipped"])
@pytest.mark.parametrize("model_channels", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3), (5, 3, 13, 17), (2, 1, 4, 4), (3, 2, 2, 3, 4)])
def test_step_is_the_formula(shape, model_channels: int, norm: str) -> None:
    row = full_row()
    x, m, g, r, z = inputs(shape, model_channels)
    expected = interpreter.step(row, x, m, g, r, z, norm)
    coeffs = torch.tensor(row)
    result = reference.reverse_step(x, m, coeffs, None, g, r, z, norm)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    single = reference.reverse_step(
        *(t.float() for t in (x, m, coeffs)), None, g.float(), r.float(), z.float(), norm
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_read_as_they_are(dtype) -> None:
    row = torch.tensor(full_row(), dtype=torch.float32)
    x, m, g, r, z = (t.float() for t in inputs((2, 3, 4, 4)))
    low = [t.to(dtype) for t in (m, g, r, z)]
    result = reference.reverse_step(x, low[0], row, None, *low[1:], "clipped")
    expected = reference.reverse_step(
        x, low[0].float(), row, None, *(t.float() for t in low[1:]), "clipped"
    )
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_absent_inputs_are_zero() -> None:
    row = full_row()
    x, m, g, r, z = inputs((2, 3, 4, 4))
    coeffs = torch.tensor(row)
    for missing in range(4):
        given = [None if k == missing else t for k, t in enumerate((m, g, r, z))]
        result = reference.reverse_step(x, given[0], coeffs, None, *given[1:])
        expected = interpreter.step(row, x, *given)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_keys_give_the_noise_and_given_noise_wins() -> None:
    x, m, *_ = inputs((3, 2, 4, 4))
    coeffs = torch.tensor(full_row())
    keys = noise.step_keys(0, range(3), 0, 1, 32)[0]
    z = reference.normal(keys, x.shape)
    a = reference.reverse_step(x, m, coeffs, keys)
    assert torch.equal(a, reference.reverse_step(x, m, coeffs, noise=z))
    assert torch.equal(a, reference.reverse_step(x, m, coeffs, keys * 0, noise=z))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_zero_coefficients_switch_terms_off(bad: float) -> None:
    x, m, g, _, _ = (t.float() for t in inputs((2, 3, 4, 4), 2))
    row = blank_row()
    row[V] = 0.5
    coeffs = torch.tensor(row, dtype=torch.float32)
    poison = torch.full_like(x, bad)
    for out in (
        reference.reverse_step(x, poison, coeffs, None, poison, poison, poison),
        reference.reverse_step(x, m, coeffs, None, poison, poison, poison),
        reference.reverse_step(x, m, coeffs, None, poison, poison, poison, "normalised"),
    ):
        assert torch.equal(out, 0.5 * x)
    row[[V, W]] = 0.0, 2.0
    coeffs = torch.tensor(row, dtype=torch.float32)
    assert torch.equal(reference.reverse_step(poison, g, coeffs), 2 * g)


def test_nan_survives_the_clamps() -> None:
    x = torch.tensor([[float("nan"), 3.0, -3.0]])
    row = torch.tensor(full_row(), dtype=torch.float32)
    out = reference.reverse_step(x, None, row)
    assert out[0, 0].isnan()
    assert out[0, 1:].isfinite().all()


@pytest.mark.parametrize("norm", ["normalised", "clipped"])
def test_zero_guidance_gives_zero_and_a_finite_gradient(norm: str) -> None:
    row = blank_row()
    row[[C, V, G_MAX]] = 1.0, 1.0, 0.5
    x = torch.zeros(2, 4, requires_grad=True)
    g = torch.stack((torch.zeros(4), torch.ones(4))).requires_grad_()
    out = reference.reverse_step(
        x, None, torch.tensor(row, dtype=torch.float32), guidance=g, guidance_norm=norm
    )
    assert torch.equal(out[0], torch.zeros(4))
    assert float(out[1].detach().norm()) == pytest.approx(1.0 if norm == "normalised" else 0.5)
    (grad,) = torch.autograd.grad(out.sum(), g)
    assert grad.isfinite().all()


@pytest.mark.parametrize("g_max", [math.inf, 1e38, 1.0])
def test_guidance_within_its_bound_has_the_gradient_of_the_kernel(g_max: float) -> None:
    """Such a norm has no part in the result, not as 0 * inf and not where its powers overflow."""
    row = blank_row()
    row[[C, G_MAX]] = 0.7, g_max
    row = torch.tensor(row, dtype=torch.float32)
    x, guidance = torch.zeros(3, 2, 3, 3), torch.randn(3, 2, 3, 3).mul_(0.1)
    guidance[1] *= 1e-17
    grads, values = [], []
    for step in (reference.reverse_step, ops.reverse_step):
        given = guidance.clone().requires_grad_()
        out = step(x, None, row, None, given, None, None, "clipped")
        grads.append(torch.autograd.grad(out.sum(), given)[0])
        values.append(out.detach())
    assert torch.equal(*grads)
    assert torch.equal(*values)
    assert torch.equal(grads[0], torch.full_like(guidance, 0.7))


def test_unknown_guidance_norm() -> None:
    with pytest.raises(ValueError, match=r"guidance_norm .*'l2'"):
        reference.reverse_step(
            torch.zeros(1, 2), None, torch.tensor(blank_row()), guidance_norm="l2"
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_and_in_place_twin(layout) -> None:
    x, m, g, r, z = (t.float() for t in inputs((2, 3, 4, 5)))
    row = torch.tensor(full_row(), dtype=torch.float32)
    expected = reference.reverse_step(x, m, row, None, g, r, z)
    laid = x.to(memory_format=layout)
    for other in (torch.contiguous_format, torch.channels_last):
        out = reference.reverse_step(laid, m.to(memory_format=other), row, None, g, r, z)
        assert torch.equal(out, expected)
        assert out.stride() == laid.stride()
    state = laid.clone()
    assert reference.reverse_step_(state, m, row, None, g, r, z) is None
    assert torch.equal(state, expected)


@pytest.mark.parametrize("norm", ["none", "normalised", "clipped"])
@pytest.mark.parametrize("model_channels", [1, 2])
def test_step_gradients_twice(model_channels: int, norm: str) -> None:
    row = torch.tensor(full_row())
    given = [t.requires_grad_() for t in inputs((2, 2, 3), model_channels)[:4]]
    z = torch.randn(2, 2, 3, dtype=torch.float64)

    def step(x, m, g, r):
        return reference.reverse_step(x, m, row, None, g, r, z, norm)

    assert gradcheck(step, given)
    assert gradgradcheck(step, given)


def test_gradient_of_clamps_passes_at_the_bounds() -> None:
    row = blank_row()
    row[[P, U, X0_LO, X0_HI]] = 1.0, 1.0, -1.0, 1.0
    row[[OUT_LO, OUT_HI, OUT_SCALE]] = -1.0, 1.0, 3.0
    x = torch.tensor([[-1.5, -1.0, 0.0, 1.0, 1.5]], requires_grad=True)
    out = reference.reverse_step(x, None, torch.tensor(row, dtype=torch.float32))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.tolist() == [[0.0, 3.0, 3.0, 3.0, 0.0]]


def test_noise_and_keys_are_not_differentiated() -> None:
    x, m, _, _, z = inputs((2, 3, 2, 2))
    z.requires_grad_()
    assert not reference.reverse_step(x, m, torch.tensor(full_row()), noise=z).requires_grad
    assert not reference.perturb(x, torch.ones(8), noise=z).requires_grad


def test_a_row_of_zeros_for_learned_variance_has_finite_gradients() -> None:
    row = blank_row()
    row[[V, W, LOG_VAR_LO, LOG_VAR_HI]] = 1.0, 0.5, -3.0, -1.0
    x, m, _, _, z = inputs((2, 3, 2, 2), 2)
    m.requires_grad_()
    out = reference.reverse_step(x, m, torch.tensor(row), noise=z)
    (grad,) = torch.autograd.grad(out.sum(), m)
    assert torch.equal(grad[:, 3:], torch.zeros_like(grad[:, 3:]))
    assert grad.isfinite().all()


def test_column_names_are_the_columns() -> None:
    """Each column, one at a time, does what its name says."""
    x, m, g, r, z = inputs((2, 3, 4, 4), 2)
    for column, value in [(V, x), (W, m[:, :3]), (Q, None), (C, None), (E, None), (D, None)]:
        row = blank_row()
        row[column] = 0.5
        out = reference.reverse_step(x, m, torch.tensor(row), None, g, r, z)
        if value is not None:
            assert torch.equal(out, 0.5 * value)
        torch.testing.assert_close(out, interpreter.step(row, x, m, g, r, z))
    for column in (X_VAR, Z_VAR):
        row = full_row()
        row[column] = 0.0
        out = reference.reverse_step(x, m, torch.tensor(row), None, g, r, z)
        torch.testing.assert_close(out, interpreter.step(row, x, m, g, r, z))
