"""PurifiedClassifier: votes against hand computation, draws, and life with attack libraries."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tiny import TinyClassifier, defended, images

from coup_fast import PurifiedClassifier
from coup_fast.purified_classifier import VOTES, combine_votes

LOGITS = torch.tensor(  # three draws of two images, three classes
    [
        [[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]],
        [[-1.0, 3.0, 0.0], [4.0, -1.0, 0.0]],
        [[1.0, 0.5, 0.0], [0.0, 0.2, 0.1]],
    ],
    dtype=torch.float64,
)


def test_votes_by_hand() -> None:
    mean = torch.tensor([[2 / 3, 3.5 / 3, -1 / 3], [4 / 3, 0.2 / 3, 0.6 / 3]]).double()
    torch.testing.assert_close(combine_votes(LOGITS, "logits"), mean, rtol=1e-6, atol=1e-7)
    e = LOGITS.exp()
    probability = (e / e.sum(2, keepdim=True)).mean(0)
    torch.testing.assert_close(combine_votes(LOGITS, "softmax").exp(), probability)
    share = torch.tensor([[2 / 3, 1 / 3, 0.0], [1 / 3, 2 / 3, 0.0]]).double()
    torch.testing.assert_close(combine_votes(LOGITS, "majority"), share, rtol=1e-7, atol=1e-7)
    # On the first image the mean of the logits and the majority disagree.
    decisions = {vote: combine_votes(LOGITS, vote).argmax(1).tolist() for vote in VOTES}
    assert decisions["logits"] == [1, 0]
    assert decisions["majority"] == [0, 1]


def test_majority_breaks_ties_towards_the_lower_class() -> None:
    logits = torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]])
    assert combine_votes(logits, "majority").argmax(1).tolist() == [1]


def test_one_draw_is_decided_alike_by_every_vote() -> None:
    one = LOGITS[:1]
    assert torch.equal(combine_votes(one, "logits"), one[0])
    for vote in VOTES:
        assert torch.equal(combine_votes(one, vote).argmax(1), one[0].argmax(1))


def test_majority_is_a_share_with_the_gradient_of_the_mean_softmax() -> None:
    logits = LOGITS.clone().requires_grad_()
    weight = torch.randn(2, 3, dtype=torch.float64)
    share = combine_votes(logits, "majority")
    torch.testing.assert_close(share.detach(), combine_votes(LOGITS, "majority"))
    (got,) = torch.autograd.grad((share * weight).sum(), logits)
    (want,) = torch.autograd.grad((logits.softmax(2).mean(0) * weight).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("method", ["coup", "diffpure", "adp"])
def test_draws_are_the_purifier_draws_one_by_one(method: str, vote: str) -> None:
    model = defended(method, num_draws=3, vote=vote)
    u, ids = images(), [5, 3, 9]
    by_hand = torch.stack(
        [model.classifier(model.purifier(u, ids, draw)) for draw in (4, 5, 6)]
    ).detach()
    torch.testing.assert_close(model.draw_logits(u, ids, draw=4), by_hand, rtol=1e-4, atol=1e-5)
    want = combine_votes(by_hand, vote)
    torch.testing.assert_close(model(u, ids, draw=4), want, rtol=1e-4, atol=1e-5)


def test_same_call_same_scores_unless_fresh_draws_are_asked_for() -> None:
    fixed = defended("diffpure", num_draws=2)
    fresh = defended("diffpure", num_draws=2, fresh_draws=True)
    fresh.reset_draws()
    u = images()
    assert torch.equal(fixed(u), fixed(u))
    assert fixed.next_draw == 0
    calls = [fresh(u) for _ in range(3)]
    assert fresh.next_draw == 6
    for k, scores in enumerate(calls):
        assert torch.equal(scores, fixed(u, draw=2 * k))
    assert not torch.equal(calls[0], calls[1])
    fresh.reset_draws(2)
    assert torch.equal(fresh(u), calls[1])
    fresh.reset_draws()
    assert torch.equal(fresh(u), calls[0])
    with pytest.raises(ValueError, match="NaN"):
        fresh(u / 0 * 0)
    assert fresh.next_draw == 4  # no later call gets the draws of one that failed


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("method", ["coup", "adp"])
def test_gradients_reach_images_and_never_parameters(method: str, vote: str) -> None:
    model = defended(method, num_draws=2, vote=vote)
    u = images().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(u), torch.tensor([0, 1, 2]))
    loss.backward()
    assert u.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model(images()).requires_grad is False
    with torch.no_grad():
        assert torch.equal(model(images()), model(images().requires_grad_()))


def test_gradient_over_draws_is_the_mean_of_the_draws() -> None:
    model = defended("coup", num_draws=3)
    u, weight = images(), torch.randn(3, 4)

    def gradient(scores, u):
        return torch.autograd.grad((scores * weight).sum(), u)[0]

    leaf = u.clone().requires_grad_()
    got = gradient(model(leaf), leaf)
    singles = []
    for draw in range(3):
        leaf = u.clone().requires_grad_()
        singles.append(gradient(model.classifier(model.purifier(leaf, draw=draw)), leaf))
    want = torch.stack(singles).mean(0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_it_owns_its_models_and_leaves_their_modes_alone() -> None:
    model = defended("coup")
    owned = {id(p) for p in model.parameters()}
    for part in (model.purifier.score_model, model.classifier):
        assert {id(p) for p in part.parameters()} <= owned
    assert next(model.parameters()).device == torch.device("cpu")
    model.purifier.score_model.eval()
    model.classifier.train()
    model(images())
    assert not model.purifier.score_model.training
    assert model.classifier.training


def test_another_classifier_than_the_guiding_one() -> None:
    judge = TinyClassifier(classes=7, seed=5)
    model = PurifiedClassifier(defended("coup").purifier, judge, num_draws=2)
    u = images().requires_grad_()
    scores = model(u)
    assert scores.shape == (3, 7)
    scores.sum().backward()
    assert all(p.grad is None for p in judge.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_dtype_reach_the_classifier_in_its_own(dtype) -> None:
    model = defended("diffpure", num_draws=2)
    u = images(dtype=dtype)
    scores = model(u)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model(u.float()), rtol=0.05, atol=0.05)


def test_an_empty_batch_has_no_scores() -> None:
    assert defended("diffpure", num_draws=2)(images()[:0]).shape == (0, 4)


def test_classifiers_that_return_no_logits_are_refused() -> None:
    purifier = defended("diffpure").purifier
    for bad, got in ((lambda u: u.mean((1, 2, 3)), r"\[6\]"), (lambda u: None, "NoneType")):
        with pytest.raises(ValueError, match=rf"classifier .*\[6, K\]; got {got}"):
            PurifiedClassifier(purifier, bad, num_draws=2)(images())


def test_calls_at_once_get_draws_of_their_own() -> None:
    model = defended("diffpure", num_draws=2, fresh_draws=True)
    model.reset_draws()
    both = threading.Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        both.wait()

    model.purifier.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(model.draw_logits, [images(), images()])
    assert model.next_draw == 4
    assert not torch.equal(first, second)


def test_draws_of_a_failed_call_are_used_up() -> None:
    model = defended("diffpure", num_draws=2, fresh_draws=True)
    model.reset_draws()
    handle = model.purifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images())
    handle.remove()
    assert model.next_draw == 2
    assert torch.equal(model(images()), defended("diffpure", num_draws=2)(images(), draw=2))


def test_draws_stay_below_the_end_of_int64() -> None:
    model = defended("diffpure", num_draws=2)
    last = 2**63 - 1 - 2
    assert model(images(), draw=last).isfinite().all()
    with pytest.raises(ValueError, match=rf"draw must be an int in \[0, {last}\], got {last + 1}"):
        model(images(), draw=last + 1)
    fresh = defended("diffpure", num_draws=2, fresh_draws=True)
    fresh.reset_draws(last)
    with pytest.raises(ValueError, match=rf"draw \+ next_draw must be .*, got {last + 1}"):
        fresh(images(), draw=1)
    with pytest.raises(ValueError, match="next_draw must be an int"):
        fresh.reset_draws(2**63)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"num_draws": 0}, ValueError),
        ({"num_draws": 2**20 + 1}, ValueError),
        ({"num_draws": 2.0}, TypeError),
        ({"vote": "mean"}, ValueError),
        ({"fresh_draws": 1}, TypeError),
        ({"fresh_draws": "no"}, TypeError),
    ],
)
def test_bad_options_are_named(option: dict, error) -> None:
    with pytest.raises(error, match=f"^{next(iter(option))} must be"):
        defended("diffpure", **option)
