"""log max softmax and its gradient, against float64 and torch, and its messages."""

from __future__ import annotations

import pytest
import torch
from helpers.cuda_cases import not_finite_logits, same_bits
from helpers.sampling import DTYPES, LOW, ulps

from coup_fast import ops, reference

SHAPES = [(1, 1), (33, 2), (2, 3), (1, 4), (3, 5), (2, 7), (5, 10), (9, 31), (3, 32), (2, 33)]
SHAPES += [(33, 1003), (2, 100_003)]


def backward(*args):
    return torch.ops.coup_fast.confidence_cotangent_backward(*args)


def relative_error(actual, expected) -> float:
    return float(((actual.double() - expected).abs() / expected.abs().clamp_min(1e-30)).max())


def logits_of(shape, scale: float = 4.0):
    return scale * torch.randn(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 4.0, 12.0])
def test_values_are_exact_to_rounding(shape, scale: float) -> None:
    logits = logits_of(shape, scale)
    log_confidence, cotangent = ops.confidence_cotangent(logits)
    exact_log, exact = reference.confidence_cotangent(logits.double())
    # logits of magnitude m are themselves known to m 2^-24, which exp makes a relative error
    bound = 2e-6 + 3e-7 * float(logits.abs().max()) + shape[1] * 1e-10
    assert relative_error(log_confidence, exact_log) <= bound
    assert relative_error(cotangent, exact) <= bound


@pytest.mark.parametrize("margin", [20.0, 40.0, 80.0])
def test_a_certain_classifier_keeps_its_direction(margin: float) -> None:
    """1 - p of the winner is S / (1 + S): no cancellation where p rounds to 1."""
    logits = torch.randn(5, 10)
    logits[:, 3] += margin
    log_confidence, cotangent = ops.confidence_cotangent(logits)
    exact_log, exact = reference.confidence_cotangent(logits.double())
    assert (log_confidence < 0).all()
    assert relative_error(log_confidence, exact_log) <= 2e-5
    assert relative_error(cotangent, exact) <= 2e-5


@pytest.mark.parametrize("shape", [(5, 10), (33, 1003)])
def test_torch_agrees(shape) -> None:
    logits = logits_of(shape).requires_grad_()
    expected = torch.log_softmax(logits, 1).amax(1)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    log_confidence, cotangent = ops.confidence_cotangent(logits.detach())
    torch.testing.assert_close(log_confidence, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cotangent, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 10), (33, 1003)])
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_rounded_once(shape, dtype) -> None:
    logits = logits_of(shape).to(dtype)
    log_confidence, cotangent = ops.confidence_cotangent(logits)
    wide_log, wide = ops.confidence_cotangent(logits.float())
    assert (log_confidence.dtype, cotangent.dtype) == (torch.float32, dtype)
    assert same_bits(log_confidence, wide_log)
    assert same_bits(cotangent, wide.to(dtype))
    exact = reference.confidence_cotangent(logits.double())[1]
    normal = exact.abs() > torch.finfo(dtype).tiny
    assert float(ulps(cotangent, exact)[normal].max()) <= 1
    grads = torch.randn(shape[0]), torch.randn(shape).to(dtype)
    expected = backward(grads[0], grads[1].float(), logits.float()).to(dtype)
    assert same_bits(backward(*grads, logits), expected)


def test_first_index_wins_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, -1.0, -1.0]])
    logits = torch.cat([logits, torch.full((1, 4), -5.0)])
    logits = torch.cat([logits, torch.full((4, 60), -5.0)], 1)
    logits[1, 40:] = 0
    logits[3, [3, 16, 33]] = 4  # 16 comes first in vectors of 4, 8 and 16 lanes
    _, cotangent = ops.confidence_cotangent(logits)
    assert (cotangent > 0).nonzero()[:, 1].tolist() == [1, 0, 0, 3]
    assert float(cotangent.sum(1).abs().max()) <= 1e-6


def test_not_finite_logits_are_as_in_torch() -> None:
    logits = not_finite_logits()
    log_confidence, cotangent = ops.confidence_cotangent(logits)
    expected = torch.log_softmax(logits, 1)
    assert torch.equal(log_confidence.isnan(), expected.isnan().all(1))
    assert torch.equal(cotangent.isnan(), expected.isnan())
    assert cotangent[2, 3] == 0  # a class of probability 0
    gradient = backward(torch.ones(7), torch.randn(7, 40), logits)
    assert torch.equal(gradient.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [(5, 10), (33, 1003)])
def test_memory_does_not_matter(shape) -> None:
    logits = logits_of(shape)
    wide = torch.full((2 * shape[0], shape[1] + 3), torch.nan)
    wide[::2, 2:-1] = logits
    expected = ops.confidence_cotangent(logits)
    grads = torch.randn(shape[0]), torch.randn(shape)
    gradient = backward(*grads, logits)
    for view in (wide[::2, 2:-1], logits.T.contiguous().T):
        for a, b in zip(ops.confidence_cotangent(view), expected, strict=True):
            assert same_bits(a, b)
        assert same_bits(backward(*grads, view), gradient)


def test_a_row_does_not_depend_on_its_batch_or_threads() -> None:
    logits = logits_of((70, 1003))
    expected = ops.confidence_cotangent(logits)
    for i in (0, 33, 69):
        for a, b in zip(ops.confidence_cotangent(logits[i : i + 1]), expected, strict=True):
            assert same_bits(a, b[i : i + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        actual = ops.confidence_cotangent(logits)
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


# --- gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_formula(shape) -> None:
    logits = logits_of(shape)
    grads = torch.randn(shape[0]), torch.randn(shape)
    exact = logits.double().requires_grad_()
    outputs = reference.confidence_cotangent(exact)
    (expected,) = torch.autograd.grad(outputs, exact, [g.double() for g in grads])
    error = (backward(*grads, logits).double() - expected).abs()
    assert float(error.max()) <= 1e-5 * float(expected.abs().max()) + 1e-7


@pytest.mark.parametrize("margin", [8.0, 14.0, 20.0, 60.0])
def test_gradient_keeps_its_precision_where_the_classifier_is_all_but_certain(margin) -> None:
    logits = torch.tensor([[0.0, margin, 1.0, -2.0, 0.5]])
    grads = torch.tensor([0.25]), torch.tensor([[-1.0, 2.0, 0.5, 0.25, -0.75]])
    exact = logits.double().requires_grad_()
    outputs = reference.confidence_cotangent(exact)
    (expected,) = torch.autograd.grad(outputs, exact, [g.double() for g in grads])
    actual = backward(*grads, logits).double()
    assert float(((actual - expected) / expected).abs().max()) <= 1e-5


def test_autograd_through_the_op() -> None:
    logits = logits_of((5, 10)).requires_grad_()
    log_confidence, cotangent = ops.confidence_cotangent(logits)
    weight = torch.randn(5, 10)
    (gradient,) = torch.autograd.grad(log_confidence.sum() + (weight * cotangent).sum(), logits)
    assert torch.equal(gradient, backward(torch.ones(5), weight, logits.detach()))
    (gradient,) = torch.autograd.grad(ops.confidence_cotangent(logits)[0].sum(), logits)
    torch.testing.assert_close(gradient, cotangent.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype) -> None:
    logits = logits_of((4, 37)).to(dtype)
    grads = torch.randn(4), torch.randn(4, 37).to(dtype)
    op, op_backward = (
        getattr(torch.ops.coup_fast, f"confidence_cotangent{suffix}").default
        for suffix in ("", "_backward")
    )
    torch.library.opcheck(op_backward, (*grads, logits))
    torch.library.opcheck(op, (logits.requires_grad_(),))


# --- edges and errors -------------------------------------------------------------------------


def test_no_rows() -> None:
    log_confidence, cotangent = ops.confidence_cotangent(torch.zeros(0, 10))
    assert (log_confidence.shape, cotangent.shape) == ((0,), (0, 10))
    assert backward(log_confidence, cotangent, cotangent).shape == (0, 10)


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (torch.zeros(3), r": logits .*\[B, C, ...\].* got float32 \[3\]"),
        (torch.zeros(2, 3, 4), r": logits .*\[B, K\] .* got float32 \[2, 3, 4\]"),
        (torch.zeros(2, 0), r": logits .*\[B, K\] .* got float32 \[2, 0\]"),
        (torch.zeros(2, 3).double(), ": logits .*float32, float16 or bfloat16, got float64"),
    ],
)
def test_errors_name_argument_given_and_expected(logits, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        ops.confidence_cotangent(logits)


def test_errors_of_backward() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r": grad_value .*\[2\], got float32 \[3\]"):
        backward(torch.zeros(3), logits, logits)
    with pytest.raises(RuntimeError, match=r": grad_cotangent .*\[2, 3\], got float32 \[2, 4\]"):
        backward(torch.zeros(2), torch.zeros(2, 4), logits)
