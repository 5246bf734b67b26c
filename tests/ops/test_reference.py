"""The plain PyTorch operators against float64 formulas, gradcheck, and their own contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import interpreter
from torch.autograd import gradcheck, gradgradcheck

from coup_fast import noise, reference

SHAPES = [(0,), (1,), (2,), (3,), (4,), (5,), (7,), (1003,), (3, 13, 17)]


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
    with pytest.raises(ValueError, match=r"shape .* 3 .*\(2, 4\)"):
        reference.normal(keys, (2, 4))
    with pytest.raises(ValueError, match=r"keys .*int64.* got torch.int32"):
        reference.normal(keys.to(torch.int32), (3, 4))


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


def test_the_sign_of_zero_is_positive() -> None:
    coeffs = torch.tensor([0.0, 0.0, 0.0, 1.0, -9.0, 9.0, 1.0, 0.0])
    z = torch.tensor([[0.0, -0.0, 2.0, -3.0]])
    out = reference.perturb(torch.zeros(1, 4), coeffs, noise=z)
    assert out.tolist() == [[1.0, 1.0, 1.0, -1.0]]


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
