"""The stable step of guidance: its root, its derivatives, and the margin that it starts from."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from helpers.cuda_cases import same_bits
from helpers.sampling import DTYPES, step_row
from torch.autograd import gradcheck, gradgradcheck

from coup_fast import ops, reference

_host = pytest.importorskip("coup_fast._host")


def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c, q and m, float32: every size of step and every sureness that a classifier can have."""
    draw = np.random.default_rng(0)
    c, q = 10 ** draw.uniform(-8, 4, 300), 10 ** draw.uniform(-8, 6, 300)
    m = np.concatenate([draw.uniform(-21, 60, 200), draw.uniform(-2, 2, 100)])
    return c.astype(np.float32), q.astype(np.float32), m.astype(np.float32)


def exact(c: float, q: float, m: float) -> tuple[float, float, float]:
    """D / q, its t = -2 d log(D / q) / d log q and its derivative by m, in 60 digits."""
    with mpmath.workdps(60):
        c, q, m = map(mpmath.mpf, (c, q, m))
        pull, odds = c * q, mpmath.exp(m)
        start = min(pull / (1 + odds), mpmath.log1p(pull / odds))
        change = mpmath.findroot(lambda d: d + odds * mpmath.expm1(d) - pull, start)
        slope = 1 / (1 + mpmath.exp(m + change))
        turn = 2 * (1 - pull * slope / change)
        return float(change / q), float(turn), float(-odds * mpmath.expm1(change) * slope / q)


def test_the_root_and_its_derivatives_are_exact_to_rounding() -> None:
    c, q, m = points()
    expected = np.array([exact(*map(float, point)) for point in zip(c, q, m, strict=True)])
    np.testing.assert_allclose(_host.stable_scale(c, q, m), expected[:, 0], rtol=6e-7)
    np.testing.assert_allclose(_host.stable_turn(c, q, m), expected[:, 1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(_host.stable_margin_slope(c, q, m), expected[:, 2], rtol=4e-6)


def test_the_reference_has_the_same_root() -> None:
    c, q, m = (torch.from_numpy(values).double() for values in points())
    scales = [
        reference._stable_scale(c[i], q[i].sqrt().reshape(1, 1), m[i : i + 1])
        for i in range(len(c))
    ]
    expected = [exact(float(c[i]), float(q[i]), float(m[i]))[0] for i in range(len(c))]
    np.testing.assert_allclose(torch.cat(scales).flatten(), expected, rtol=1e-13)


@pytest.mark.parametrize("margin", [-2.0, 0.0, 3.0, 20.0])
def test_small_steps_are_explicit_ones(margin: float) -> None:
    """To first order in c: what is left of D / (c q s(-m)) - 1 is proportional to c."""
    left = []
    for c in (1e-2, 1e-3, 1e-4):
        scale = reference._stable_scale(
            torch.tensor(c, dtype=torch.float64),
            torch.tensor([[2.0]], dtype=torch.float64),
            torch.tensor([margin], dtype=torch.float64),
        )
        left.append(float(scale) / (c / (1 + np.exp(margin))) - 1)
    assert left[0] < 0
    np.testing.assert_allclose([left[0] / left[1], left[1] / left[2]], 10, rtol=0.05)


def test_exp_minus_1_and_log_1p() -> None:
    draw = np.random.default_rng(1)
    small = 10 ** draw.uniform(-12, 1, 4000) * draw.choice([-1, 1], 4000)
    x = np.concatenate([draw.uniform(-90, 88, 4000), small]).astype(np.float32)
    wide = np.expm1(x.astype(np.float64))
    assert (np.abs(_host.exp_minus_1(x) - wide) <= 1.5 * np.spacing(np.float32(abs(wide)))).all()
    x = (10 ** draw.uniform(-12, 37, 4000)).astype(np.float32)
    wide = np.log1p(x.astype(np.float64))
    assert (np.abs(_host.log_1p(x) - wide) <= 1.5 * np.spacing(wide.astype(np.float32))).all()
    assert np.isnan(_host.exp_minus_1(np.float32("nan")))


@pytest.mark.parametrize("margin", [torch.nan, torch.inf, -torch.inf])
def test_margins_that_are_not_finite(margin: float) -> None:
    x, g = torch.zeros(1, 2), torch.ones(1, 2)
    row = step_row(v=1.0, c=0.5)
    args = (x, None, row, None, g, None, None, "stable", torch.tensor([margin]))
    expected = {torch.inf: 0.0, -torch.inf: 0.5}.get(margin, torch.nan)
    torch.testing.assert_close(
        ops.reverse_step(*args), torch.full((1, 2), expected), equal_nan=True
    )


def stable_step(g: torch.Tensor, margin: torch.Tensor, c: float) -> torch.Tensor:
    row = step_row(v=1.0, c=c, out_lo=-2.0, out_hi=2.0).double()
    x = torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g)
    return reference.reverse_step(x, None, row, None, g, None, None, "stable", margin)


@pytest.mark.parametrize("c", [1e-4, 0.3, 50.0])
def test_gradients_of_the_reference(c: float) -> None:
    g = torch.randn(3, 2, 2, dtype=torch.float64).requires_grad_()
    margin = torch.tensor([-1.5, 0.5, 6.0], dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda g, m: stable_step(g, m, c), (g, margin))
    assert gradgradcheck(lambda g, m: stable_step(g, m, c), (g, margin))


# --- the margin and its cotangent -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 2), (2, 3), (5, 10), (9, 31), (3, 32), (2, 33), (7, 1003)])
@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
def test_margins_are_those_of_torch(shape, scale: float) -> None:
    logits = scale * torch.randn(shape)
    wide = logits.double().requires_grad_()
    top, winner = wide.max(1)
    expected = top - wide.scatter(1, winner[:, None], -torch.inf).logsumexp(1)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    margin, cotangent = ops.confidence_cotangent(logits, "margin")
    size = float(logits.abs().max())
    torch.testing.assert_close(margin.double(), expected, rtol=0, atol=3e-7 * (4 + size))
    torch.testing.assert_close(cotangent.double(), gradient, rtol=1e-6 * (4 + size), atol=1e-37)
    exact_margin, exact_cotangent = reference.confidence_cotangent(logits.double(), "margin")
    torch.testing.assert_close(exact_margin, expected.detach())
    torch.testing.assert_close(exact_cotangent, gradient)


def test_the_confidence_follows_from_the_margin() -> None:
    logits = 3 * torch.randn(50, 10, dtype=torch.float64)
    confidence, gradient = reference.confidence_cotangent(logits)
    margin, direction = reference.confidence_cotangent(logits, "margin")
    torch.testing.assert_close(confidence, torch.nn.functional.logsigmoid(margin))
    torch.testing.assert_close(gradient, torch.sigmoid(-margin)[:, None] * direction)


def test_margins_of_ties_and_of_what_is_not_finite() -> None:
    logits = torch.tensor([[1.0, 1.0, -torch.inf], [0, torch.nan, 1], [torch.inf, 0, 1], [2, 0, 0]])
    margin, cotangent = ops.confidence_cotangent(logits, "margin")
    expected = [0.0, torch.nan, torch.nan, 2 - math.log(2)]
    torch.testing.assert_close(margin, torch.tensor(expected), equal_nan=True)
    assert cotangent[0].tolist() == [1, -1, 0]
    assert cotangent[1:3].isnan().all()
    torch.testing.assert_close(cotangent[3], torch.tensor([1.0, -0.5, -0.5]))
    both = torch.tensor([[1.0, -torch.inf]])
    for module in (ops, reference):
        assert all(part.isnan().all() for part in module.confidence_cotangent(both, "margin"))


@pytest.mark.parametrize("shape", [(33, 2), (5, 10), (9, 31), (3, 32), (2, 33), (7, 1003)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_gradient_of_margins_is_that_of_the_formula(shape, scale: float) -> None:
    logits = scale * torch.randn(shape)
    grads = torch.randn(shape[0]), torch.randn(shape)
    wide = logits.double().requires_grad_()
    outputs = reference.confidence_cotangent(wide, "margin")
    (expected,) = torch.autograd.grad(outputs, wide, [g.double() for g in grads])
    actual = torch.ops.coup_fast.confidence_cotangent_backward(*grads, logits, "margin")
    error = (actual.double() - expected).abs()
    assert float(error.max()) <= 2e-5 * float(expected.abs().max())
    leaf = logits.clone().requires_grad_()
    (through,) = torch.autograd.grad(ops.confidence_cotangent(leaf, "margin"), leaf, grads)
    assert same_bits(through, actual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_in_low_precision_are_rounded_once(dtype) -> None:
    logits = (4 * torch.randn(5, 37)).to(dtype)
    margin, cotangent = ops.confidence_cotangent(logits, "margin")
    wide_margin, wide = ops.confidence_cotangent(logits.float(), "margin")
    assert same_bits(margin, wide_margin)
    assert same_bits(cotangent, wide.to(dtype))


def test_the_reference_is_differentiable_twice() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda t: reference.confidence_cotangent(t, "margin"), (logits,))
    assert gradgradcheck(lambda t: reference.confidence_cotangent(t, "margin"), (logits,))


def test_a_margin_needs_two_classes() -> None:
    with pytest.raises(RuntimeError, match=r"at least two classes .*\[3, 1\]"):
        ops.confidence_cotangent(torch.zeros(3, 1), "margin")
    with pytest.raises(ValueError, match=r"at least two classes .*\[3, 1\]"):
        reference.confidence_cotangent(torch.zeros(3, 1), "margin")
    with pytest.raises(ValueError, match=r"quantity .*'odds'"):
        reference.confidence_cotangent(torch.zeros(3, 2), "odds")
