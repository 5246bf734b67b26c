"""Gradients over many draws: the mean, the same bits however they are cut, memory as promised."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import images, short_purifier
from torch import Tensor

from coup_fast import PurifiedClassifier, eot_gradient
from coup_fast.attacks import PGD
from coup_fast.attacks.eot import cross_entropy, memory_model
from coup_fast.attacks.peak_memory import peak_bytes

LABELS = torch.tensor([0, 1, 2, 3, 0])


def model(method="coup", num_draws=1, vote="logits", *, fresh=False, per_sample=True, **options):
    clean = short_purifier(method, per_sample=per_sample, **options)
    return PurifiedClassifier(clean, clean.classifier, num_draws, vote, fresh_draws=fresh)


def by_calls(defence: PurifiedClassifier, u: Tensor, draws: int, first: int = 0) -> Tensor:
    """The same mean, as a loop over plain calls."""
    leaf = u.clone().requires_grad_()
    for d in range(draws):
        scores = defence(leaf, draw=first + d * defence.num_draws)
        (cross_entropy(scores, LABELS).sum() / draws).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("vote", ["logits", "softmax", "majority"])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_is_the_mean_over_draws_with_the_vote_inside(num_draws: int, vote: str) -> None:
    defence, u = model("coup", num_draws, vote), images(5)
    result = eot_gradient(defence, u, LABELS, draws=4, draw=2)
    torch.testing.assert_close(result.gradient, by_calls(defence, u, 4, 2), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        scores = torch.stack([defence(u, draw=2 + d * num_draws) for d in range(4)])
    torch.testing.assert_close(result.scores, scores, rtol=1e-5, atol=1e-5)
    losses = torch.stack([cross_entropy(row, LABELS) for row in scores])
    torch.testing.assert_close(result.losses, losses, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for p in defence.parameters())


@pytest.mark.parametrize("method", ["coup", "diffpure", "adp"])
@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_bits_do_not_depend_on_the_micro_batches(method: str, num_draws: int) -> None:
    defence, u = model(method, num_draws, "softmax"), images(5)
    want = eot_gradient(defence, u, LABELS, draws=3, micro_batch=15)
    for micro_batch in (1, 2, 4, 7, 100):
        got = eot_gradient(defence, u, LABELS, draws=3, micro_batch=micro_batch)
        assert torch.equal(got.gradient, want.gradient)
        assert torch.equal(got.losses, want.losses)
        assert torch.equal(got.scores, want.scores)
    flipped = eot_gradient(
        defence, u.flip(0), LABELS.flip(0), draws=3, sample_ids=range(4, -1, -1), micro_batch=6
    )
    assert torch.equal(flipped.gradient.flip(0), want.gradient)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 8},
        {"num_steps": 9, "states": "sqrt"},
        {"num_steps": 4, "gradient": "autograd"},
        {"num_steps": 4, "gradient": "bpda"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_micro_batches_stay_within_the_budget(options) -> None:
    defence, u = model("coup", 2, per_sample=False, **options), images(5)
    whole = memory_model(defence, u[:1], LABELS[:1])
    result = u.numel() * 4  # the sum itself comes on top
    for runs in (1, 4):
        budget = whole.bytes(runs)
        got = eot_gradient(defence, u, LABELS, draws=1, memory_budget=budget)
        assert got.micro_batch == runs
        peak = peak_bytes(
            lambda runs=runs: eot_gradient(defence, u, LABELS, draws=1, micro_batch=runs), u.device
        )
        assert 0.75 * budget <= peak <= 1.05 * budget + 2 * result
    with pytest.raises(ValueError, match=r"bytes.* memory_budget is 1000"):
        eot_gradient(defence, u, LABELS, memory_budget=1000)


def test_the_default_budget_takes_small_work_at_once() -> None:
    assert eot_gradient(model(), images(5), LABELS, draws=2).micro_batch == 10


def test_fresh_draws_move_on_as_calls_would() -> None:
    defence, u = model("diffpure", 2, fresh=True), images(5)
    defence.reset_draws()
    eot_gradient(defence, u, LABELS, draws=3)
    assert defence.next_draw == 6
    got = eot_gradient(defence, u, LABELS, draws=2)
    assert defence.next_draw == 10
    want = eot_gradient(model("diffpure", 2), u, LABELS, draws=2, draw=6)
    assert torch.equal(got.gradient, want.gradient)


def test_other_losses_dtypes_and_an_empty_batch() -> None:
    def margin(scores: Tensor, labels: Tensor) -> Tensor:
        own = scores.gather(1, labels[:, None])[:, 0]
        return scores.scatter(1, labels[:, None], -torch.inf).amax(1) - own

    got = eot_gradient(model(), images(5).to(torch.bfloat16), LABELS, margin, draws=2)
    assert got.gradient.dtype == torch.bfloat16
    assert got.gradient.abs().max() > 0
    empty = eot_gradient(model(), images(5)[:0], LABELS[:0], draws=2)
    assert empty.gradient.shape == (0, 3, 8, 8)
    assert empty.losses.shape == (2, 0)


def test_mistakes_are_refused() -> None:
    u = images(5)
    with pytest.raises(ValueError, match=r"loss .*\[1\].*\[\]"):
        eot_gradient(model(), u, LABELS, torch.nn.functional.cross_entropy)
    with pytest.raises(ValueError, match=r"labels .*\[5\].*\[3\]"):
        eot_gradient(model(), u, LABELS[:3])
    with pytest.raises(ValueError, match=r"^draws .* 0"):
        eot_gradient(model(), u, LABELS, draws=0)
    with pytest.raises(TypeError, match="micro_batch "):
        eot_gradient(model(), u, LABELS, micro_batch=2.0)
    with pytest.raises(ValueError, match='gradient="none"'):
        eot_gradient(model(gradient="none"), u, LABELS)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, r"labels must be an int64 tensor \[2\]"),
        (torch.zeros(2), ValueError, r"labels must be int64 \[2\], got torch.float32"),
        (torch.tensor([0, 99]), ValueError, r"labels must be in \[0, 3\] .* got \[0, 99\]"),
        (torch.tensor([0, -100]), ValueError, r"labels must be in \[0, 3\] .* got \[0, -100\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, error, message: str) -> None:
    with pytest.raises(error, match=message):
        eot_gradient(model("diffpure"), images(2), labels, micro_batch=2)
    for loss in ("ce", "margin"):
        with pytest.raises((TypeError, ValueError), match="labels must be"):
            PGD(steps=1, eot=1, loss=loss)(model("diffpure"), images(2), labels)


def test_inference_mode_changes_no_gradient() -> None:
    defence = model()
    want = eot_gradient(defence, images(5), LABELS, micro_batch=5).gradient
    with torch.inference_mode():
        got = eot_gradient(defence, images(5), LABELS.clone(), micro_batch=5).gradient
    assert torch.equal(got, want)
