"""The plain PyTorch operators against float64 formulas, gradcheck, and their own contract."""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from coup_fast import noise, reference
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

SHAPES = [(0,), (1,), (2,), (3,), (4,), (5,), (7,), (1003,), (3, 13, 17)]


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


# --- normal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_normal_is_box_muller_of_the_words(shape, batch: int) -> None:
    keys = noise.step_keys(9, range(batch), 0, 2, 5)[1]
    numel = int(np.prod(shape))
    padded = -(-numel // 4) * 4
    words = noise.words(keys, padded)
    uniforms = noise.uniform(words).double().numpy().reshape(batch, padded // 2, 2)
    radius = np.sqrt(-2 * np.log(uniforms[..., 0]))
    angle = 2 * np.pi * uniforms[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    expected = pairs.reshape(batch, padded)[:, :numel].reshape(batch, *shape)
    z = reference.normal(keys, (batch, *shape))
    assert z.dtype == torch.float32
    assert z.is_contiguous()
    assert z.shape == (batch, *shape)
    # float64's own angle is off by about 1e-16 radius; beyond that, one rounding
    error = np.abs(z.double().numpy() - expected)
    assert (error <= 2.0**-24 * np.abs(expected) + 1e-14).all()


def test_normal_at_the_ends_of_the_uniforms() -> None:
    for words, expected in [
        ([2**32 - 1, 0, 2**32 - 1, 5], [0.0, 0.0, 0.0, 0.0]),  # U0 = 1: radius 0
        ([0, 2**32 - 1, 0, 2**31], [6.7637, 0.0, -6.7637, 0.0]),  # U0 = 2^-33: the largest radius
    ]:
        stub = torch.tensor([words])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise, "words", lambda keys, numel, stub=stub: stub)
            z = reference.normal(torch.zeros(1, 2, dtype=torch.int64), (1, 4))[0]
        torch.testing.assert_close(z, torch.tensor(expected), rtol=1e-4, atol=1e-8)


def test_normals_look_normal() -> None:
    z = reference.normal(noise.step_keys(0, range(64), 0, 1, 4096)[0], (64, 4096)).double()
    n = z.numel()
    moments = [float((z**k).mean()) for k in range(1, 5)]
    spreads = [1, 2, 15, 96]  # variances of z, z², z³, z⁴
    for moment, expected, spread in zip(moments, [0, 1, 0, 3], spreads, strict=True):
        assert abs(moment - expected) < 4 * (spread / n) ** 0.5
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < 4 / n**0.5
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / n**0.5
    quantiles = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    for q in quantiles:
        p = float(0.5 * (1 + torch.erf(q / 2**0.5)))
        assert abs(float((z < q).double().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_normal_refuses_what_does_not_fit() -> None:
    keys = noise.step_keys(0, range(3), 0, 1, 4)[0]
    with pytest.raises(ValueError, match="shape"):
        reference.normal(keys, (2, 4))
    with pytest.raises(ValueError, match="keys"):
        reference.normal(keys.to(torch.int32), (3, 4))


# --- reverse_step -----------------------------------------------------------------------------


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
    assert float(out[1].norm()) == pytest.approx(1.0 if norm == "normalised" else 0.5)
    (grad,) = torch.autograd.grad(out.sum(), g)
    assert grad.isfinite().all()


def test_unknown_guidance_norm() -> None:
    with pytest.raises(ValueError, match="normalised"):
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


# --- perturb ----------------------------------------------------------------------------------

START = np.array([1.9, -0.95, 0.3, 0.1, -0.8, 0.9, 0.99, 0.01])


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 5), (33, 1, 3, 3), (2, 3, 4, 4)])
def test_perturb_is_the_formula(shape) -> None:
    u, z = torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    result = reference.perturb(u, torch.tensor(START), noise=z)
    torch.testing.assert_close(result, interpreter.start(START, u, z), rtol=1e-14, atol=1e-14)
    quiet = reference.perturb(u, torch.tensor(START))
    torch.testing.assert_close(quiet, interpreter.start(START, u, None), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_perturb_returns_float32(dtype) -> None:
    u = torch.rand(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    keys = noise.step_keys(0, range(2), 0, 1, 48)[0]
    out = reference.perturb(u, torch.tensor(START, dtype=torch.float32), keys)
    expected = interpreter.start(START, u.double(), reference.normal(keys, u.shape).double())
    assert out.dtype == torch.float32
    assert out.stride() == u.stride()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-7)


def test_the_sign_of_zero_is_its_sign_bit() -> None:
    coeffs = torch.tensor([0.0, 0.0, 0.0, 1.0, -9.0, 9.0, 1.0, 0.0])
    z = torch.tensor([[0.0, -0.0, 2.0, -3.0]])
    out = reference.perturb(torch.zeros(1, 4), coeffs, noise=z)
    assert out.tolist() == [[1.0, -1.0, 1.0, -1.0]]


def test_perturb_gradients_twice() -> None:
    u = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, 2, dtype=torch.float64)
    assert gradcheck(lambda u: reference.perturb(u, torch.tensor(START), noise=z), (u,))
    assert gradgradcheck(lambda u: reference.perturb(u, torch.tensor(START), noise=z), (u,))


# --- adaptive_step ----------------------------------------------------------------------------

ADAPTIVE = np.array([5e-5, 1e-5, 1e-1, 1e-3, 256 / 255, -1 / 510, 0.0, 1.0])


def adaptive_inputs(curvatures):
    """x, h, h_ahead with 1 - γ of the given sizes."""
    size = (len(curvatures), 3, 4, 4)
    x, h = torch.rand(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    shrink = 1 - torch.tensor(curvatures, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return x, h, shrink * h


def test_adaptive_step_is_the_formula() -> None:
    # usual, clipped at alpha_max, negative, below tau, and one that is dead already
    x, h, h_ahead = adaptive_inputs([2e-3, 1e-4, -1e-3, 0.1, 2e-3])
    alive = torch.tensor([True, True, True, True, False])
    expected = interpreter.adaptive_step(ADAPTIVE, x, h, h_ahead, alive)
    result = reference.adaptive_step(x, h, h_ahead, alive, torch.tensor(ADAPTIVE))
    assert result[1].tolist() == expected[1].tolist() == [True, True, False, False, False]
    torch.testing.assert_close(result[0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result[2], expected[2], rtol=1e-10, atol=1e-12)
    assert torch.equal(result[0][2:], x[2:])


def test_what_is_not_finite_stops_its_own_sample() -> None:
    x, h, h_ahead = (t.float() for t in adaptive_inputs([2e-3, 2e-3, 2e-3]))
    h[0], h[1] = 0.0, float("nan")
    h.requires_grad_()
    alive = torch.ones(3, dtype=torch.bool)
    row = torch.tensor(ADAPTIVE, dtype=torch.float32)
    out, still, alpha = reference.adaptive_step(x, h, h_ahead, alive, row)
    assert still.tolist() == [False, False, True]
    assert torch.equal(out[:2], x[:2])
    assert alpha.isnan().tolist() == [True, True, False]
    (grad,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))
    assert grad[2].abs().sum() > 0


def test_no_change_of_score_takes_the_longest_step() -> None:
    x, h, _ = adaptive_inputs([0.0])
    h.requires_grad_()
    row = torch.tensor(ADAPTIVE)
    out, still, alpha = reference.adaptive_step(x, h, h, torch.ones(1, dtype=torch.bool), row)
    assert bool(still)
    assert float(alpha) == 0.1
    (grad,) = torch.autograd.grad(out.sum(), h)
    inside = (out > 0) & (out < 1)
    expected = torch.where(inside, torch.tensor(0.1 * 256 / 255, dtype=torch.float64), 0.0)
    torch.testing.assert_close(grad, expected)


def test_adaptive_gradients_twice() -> None:
    x, h, h_ahead = adaptive_inputs([2e-3, 1e-4, 0.1])
    x, h, h_ahead = 0.5 + 0.1 * x, 0.1 * h, 0.1 * h_ahead  # away from the clamps
    alive = torch.ones(3, dtype=torch.bool)
    given = [t[:, :1, :2, :2].clone().requires_grad_() for t in (x, h, h_ahead)]
    row = torch.tensor(ADAPTIVE)
    row[0] = 5e-3  # a larger step, so that finite differences see it

    def step(x, h, h_ahead):
        return reference.adaptive_step(x, h, h_ahead, alive, row)[0]

    assert gradcheck(step, given, eps=1e-8, atol=1e-5)
    assert gradgradcheck(step, given, eps=1e-8, atol=1e-4, rtol=1e-2)


# --- confidence_cotangent ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 10), (1, 1), (33, 2), (4, 10), (2, 1000)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_confidence_is_the_gradient_of_log_max_softmax(shape, scale: float) -> None:
    logits = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    log_confidence, cotangent = reference.confidence_cotangent(logits)
    direct = logits.log_softmax(1).amax(1)
    torch.testing.assert_close(log_confidence, direct, rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(direct.sum(), logits)
    torch.testing.assert_close(cotangent, grad, rtol=1e-9, atol=1e-14)


def test_confidence_keeps_its_precision_when_all_but_certain() -> None:
    gap = torch.tensor([5.0, 30.0, 80.0], dtype=torch.float64)
    logits = torch.stack((gap, 0 * gap, 0 * gap - 1), dim=1)
    s = np.exp(-gap.numpy()) * (1 + np.exp(-1.0))
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        log_confidence, cotangent = reference.confidence_cotangent(logits.to(dtype))
        np.testing.assert_allclose(log_confidence, -np.log1p(s), rtol=tolerance)
        np.testing.assert_allclose(cotangent[:, 0], s / (1 + s), rtol=tolerance)


def test_confidence_dtypes_and_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float16)
    log_confidence, cotangent = reference.confidence_cotangent(logits)
    assert (log_confidence.dtype, cotangent.dtype) == (torch.float32, torch.float16)
    assert (cotangent > 0).tolist() == [[False, True, False], [True, False, False]]


def test_confidence_gradients_twice() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(reference.confidence_cotangent, (logits,))
    assert gradgradcheck(reference.confidence_cotangent, (logits,))
