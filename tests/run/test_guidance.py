"""The confidence gradient against analytic and float64 derivatives, and frozen parameters."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.tiny import TinyClassifier, flags, images
from torch import nn

from coup_fast import reference
from coup_fast._torch.frozen import frozen_parameters
from coup_fast.run.guidance import confidence_gradient


def state(batch: int = 3, dtype=torch.float64):
    return 3 * images(batch, dtype=dtype) - 1.5


def log_confidence(classifier, x):
    return torch.log_softmax(classifier((x + 1) / 2), dim=1).max(dim=1).values


def test_linear_classifier_has_the_analytic_gradient() -> None:
    weight = torch.randn(5, 3 * 64, dtype=torch.float64)

    def classifier(u):
        return u.flatten(1) @ weight.T

    x = state()
    p = torch.softmax(classifier((x + 1) / 2), dim=1)
    winner = nn.functional.one_hot(p.argmax(1), 5)
    want = 0.5 * (winner - p) @ weight
    got = confidence_gradient(classifier, x, reference)
    torch.testing.assert_close(got.flatten(1), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_in_every_grad_mode_leaves_the_classifier_alone(mode) -> None:
    classifier = TinyClassifier().double()
    leaf = state().requires_grad_()
    (want,) = torch.autograd.grad(log_confidence(classifier, leaf).sum(), leaf)
    with mode():
        got = confidence_gradient(classifier, state(), reference)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


def test_second_order_is_the_hessian_of_the_log_confidence() -> None:
    classifier = TinyClassifier().double()
    x = state(1)
    hessian = torch.autograd.functional.hessian(lambda y: log_confidence(classifier, y).sum(), x)
    y = x.clone().requires_grad_()
    gradient = confidence_gradient(classifier, y, reference, graph=True)
    direction = torch.randn_like(x)
    (product,) = torch.autograd.grad((gradient * direction).sum(), y)
    want = (hessian.reshape(x.numel(), -1) @ direction.flatten()).reshape(x.shape)
    torch.testing.assert_close(product, want, rtol=1e-9, atol=1e-14)
    assert product.abs().max() > 1e-4  # a Hessian worth having


def test_half_precision_classifier_gets_half_precision_pixels() -> None:
    classifier = TinyClassifier().to(torch.bfloat16)
    x = state(dtype=torch.float32)
    got = confidence_gradient(classifier, x, reference)
    want = confidence_gradient(TinyClassifier(), x, reference)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.2, atol=0.02)


def test_classifiers_that_cannot_guide_are_refused() -> None:
    x = state(3, torch.float32)
    with pytest.raises(ValueError, match=r"classifier .*\[3, K\]; got \[3\]"):
        confidence_gradient(lambda u: u.flatten(1).sum(1), x, reference)
    with pytest.raises(ValueError, match=r"classifier .*\[3, K\]; got \[1, 5\]"):
        confidence_gradient(lambda u: torch.zeros(1, 5), x, reference)
    with pytest.raises(ValueError, match=r"classifier .*got tuple"):
        confidence_gradient(lambda u: (u,), x, reference)
    with pytest.raises(RuntimeError, match="no gradient"):
        confidence_gradient(torch.no_grad()(TinyClassifier()), x, reference)


class OnceOnly(torch.autograd.Function):
    """As a compiled graph: a first derivative, and an error for more."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("donated buffers")
        return grad


def test_a_classifier_that_differentiates_once_guides_but_has_no_full_gradient() -> None:
    tiny = TinyClassifier()

    def classifier(u):
        return OnceOnly.apply(tiny(u))

    x = state(dtype=torch.float32)
    want = confidence_gradient(tiny, x, reference)
    assert torch.equal(confidence_gradient(classifier, x, reference), want)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*'stopped'"):
        confidence_gradient(classifier, x.requires_grad_(), reference, graph=True)


class Exhausted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("no memory left")


def test_running_out_of_memory_is_reported_as_such() -> None:
    tiny = TinyClassifier()
    x = state(dtype=torch.float32).requires_grad_()
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        confidence_gradient(lambda u: Exhausted.apply(tiny(u)), x, reference, graph=True)


def test_flags_are_off_inside_and_as_found_outside_also_after_an_exception() -> None:
    model = TinyClassifier()
    model.linear.weight.requires_grad_(False)
    before = flags(model)
    with frozen_parameters(model, None, lambda x: x, model.forward):
        assert not any(flags(model))
        with frozen_parameters(model):
            assert not any(flags(model))
        assert not any(flags(model))
    assert flags(model) == before
    with pytest.raises(KeyError), frozen_parameters(model):
        raise KeyError
    assert flags(model) == before


def test_overlapping_threads_restore_once_both_are_done() -> None:
    model = TinyClassifier()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with frozen_parameters(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with frozen_parameters(model):
        leave.set()
        thread.join(10)
        assert not any(flags(model))  # the other has left, this one is still inside
    assert all(flags(model))


class Freezing(nn.Module):
    """Freezes its model and does nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyClassifier()

    def forward(self) -> None:
        with frozen_parameters(self.model):
            pass


def test_computed_parameters_are_refused() -> None:
    module = Freezing()
    computed = {name: 2 * p for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match="detach them"):
        torch.func.functional_call(module, computed, ())
    assert all(flags(module))
