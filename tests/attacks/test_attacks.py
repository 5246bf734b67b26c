"""PGD and APGD: where they may go, what they depend on, what they find, and how they fail."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier
from coup_fast.attacks import APGD, FIRST_ATTACK_DRAW, LOSSES, PGD, PRESETS, preset
from coup_fast.attacks.apgd import window_ends
from coup_fast.attacks.ball import Ball, ordered_sum
from coup_fast.attacks.eot import cross_entropy
from coup_fast.purified_classifier import combine_votes

BATCH = 4
LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def images() -> Tensor:
    return tiny.images(BATCH)


# --- losses


def test_losses_are_those_of_their_papers(images: Tensor) -> None:
    scores = torch.randn(BATCH, 5, dtype=torch.float64)
    labels = scores.argsort(1)[torch.arange(BATCH), torch.tensor([4, 3, 2, 0])]  # right, then wrong
    for i, (row, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        wrong = max(value for k, value in enumerate(row) if k != label)
        first, _, third = sorted(row, reverse=True)[:3]
        assert LOSSES["margin"](scores, labels)[i].item() == pytest.approx(wrong - row[label])
        expected = -(row[label] - wrong) / (first - third)
        assert LOSSES["dlr"](scores, labels)[i].item() == pytest.approx(expected)
    assert LOSSES["ce"] is cross_entropy


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(ValueError, match=r"DLR .*3 classes, got 2"):
        LOSSES["dlr"](torch.zeros(1, 2), torch.tensor([0]))


# --- the ball


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [1e-5, 8 / 255, 1.0])
def test_projections_and_starts_stay_inside_exactly(
    norm: str, eps: float, dtype: torch.dtype
) -> None:
    centre = torch.rand(16, 3, 8, 8).to(dtype)
    centre[0], centre[1] = 0.0, 1.0
    ball = Ball(centre, norm, eps)
    ids = torch.arange(16)
    for point in (
        centre + torch.randn_like(centre),
        centre + 1e-3 * eps * torch.randn_like(centre),
        centre.clone(),
    ):
        inside = ball.project(point)
        ball.check(inside)
        assert (inside - point).abs().max() < 10
    start = ball.random(0, ids, 0)
    ball.check(start)
    assert not torch.equal(start, centre)
    with pytest.raises(RuntimeError, match=f"the {norm} ball of"):
        ball.check((centre + 2 * eps).clamp_max(1.5))


def test_a_projection_is_the_nearest_point() -> None:
    centre = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    step = torch.tensor([0.3, -0.4, 0.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    linf = Ball(centre, "linf", 0.1).project(centre + step) - centre
    assert torch.allclose(linf, step.clamp(-0.1, 0.1))
    l2 = Ball(centre, "l2", 0.1).project(centre + step) - centre
    assert torch.allclose(l2, 0.2 * step)
    assert Ball(centre, "l2", 1.0).ascent(step).norm() == pytest.approx(1.0)
    assert not Ball(centre, "l2", 1.0).ascent(torch.zeros_like(step)).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_belong_to_sample_ids(norm: str) -> None:
    centre = torch.full((5, 3, 4, 4), 0.5)
    ids = torch.tensor([3, 1, 4, 100, 5])
    together = Ball(centre, norm, 0.1).random(7, ids, 2)
    for i in range(5):
        alone = Ball(centre[i : i + 1], norm, 0.1).random(7, ids[i : i + 1], 2)
        assert torch.equal(alone[0], together[i])
    size = (together - centre).flatten(1)
    size = size.abs().amax(1) if norm == "linf" else size.norm(dim=1)
    assert size.unique().numel() == 5
    assert not torch.equal(together, Ball(centre, norm, 0.1).random(7, ids, 3))
    assert not torch.equal(together, Ball(centre, norm, 0.1).random(8, ids, 2))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 1003])
def test_sums_have_one_order(n: int) -> None:
    values = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(ordered_sum(values), values.sum(1))
    if n:
        alone = torch.stack([ordered_sum(row[None])[0] for row in values])
        assert torch.equal(alone, ordered_sum(values))


# --- attacks as a whole


ATTACKS = [
    PGD(eps=0.1, steps=2, step_size=0.04, eot=2),
    PGD(norm="l2", eps=0.5, steps=2, step_size=0.2, eot=2, loss="dlr", keep="best"),
    PGD(eps=0.1, steps=2, step_size=0.05, eot=1, noise="fixed", restarts=2),
    PGD(eps=0.1, steps=2, step_size=0.05, gradient="bpda", eot=3, loss="margin"),
    PGD(eps=0.1, steps=2, step_size=0.05, gradient="stopped", eot=2),
    PGD(eps=0.1, steps=2, step_size=0.05, gradient="classifier"),
    APGD(eps=0.1, steps=5, eot=2),
    APGD(norm="l2", eps=0.5, steps=5, eot=2, loss="dlr"),
]


SELECTIVE = PGD(eps=0.1, steps=3, step_size=0.04, eot=3, draw_weights="em", loss="margin")


@pytest.mark.parametrize(
    "attack",
    [
        *(*ATTACKS[:3], ATTACKS[-1]),
        SELECTIVE.replace(gradient_averaging=0.5),
        SELECTIVE.replace(norm="l2", eps=0.5, low_frequency=0.5),
    ],
    ids=lambda a: f"{a.name} {a.norm} {a.keep}",
)
def test_results_do_not_depend_on_batch_or_order(attack: PGD | APGD, images: Tensor) -> None:
    model = tiny.defended("diffpure" if attack.norm == "l2" else "coup", per_sample=True)
    ids = torch.tensor([5, 17, 2, 9])
    together = attack.run(model, images, LABELS, sample_ids=ids)
    assert not torch.equal(together.images, images)
    parts = [torch.tensor([3, 1]), torch.tensor([0]), torch.tensor([2])]
    for which in parts:
        part = attack.run(model, images[which], LABELS[which], sample_ids=ids[which])
        assert torch.equal(part.images, together.images[which])
        assert torch.equal(part.loss, together.loss[which])
        assert torch.equal(part.fooled, together.fooled[which])


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.name} {a.norm} {a.keep}")
def test_attacks_raise_the_loss_inside_the_ball(attack: PGD | APGD, images: Tensor) -> None:
    model = tiny.defended()
    attack = attack.replace(steps=6)
    adversarial = attack(model, images, LABELS)
    Ball(images, attack.norm, attack.eps).check(adversarial)
    with torch.no_grad():
        before, after = (
            torch.stack([LOSSES["ce"](model(u, None, k), LABELS) for k in range(8)]).mean()
            for u in (images, adversarial)
        )
    assert after > before + 0.05


def test_the_first_step_is_the_sign_of_the_mean_gradient_of_its_draws(images: Tensor) -> None:
    model = tiny.defended("diffpure")
    attack = PGD(eps=0.1, steps=1, step_size=0.03, eot=3, random_start=False, seed=2)
    leaf = images.clone().requires_grad_()
    first = FIRST_ATTACK_DRAW * 3
    losses = [cross_entropy(model(leaf, None, first + k), LABELS) for k in range(3)]
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(0).sum(), leaf)
    clear = gradient.abs() > 1e-6
    expected = (images + 0.03 * gradient.sign()).clamp(0, 1)
    assert torch.allclose(attack(model, images, LABELS)[clear], expected[clear], atol=1e-7)


def test_every_iterate_has_its_own_draws_and_fixed_noise_has_one(images: Tensor) -> None:
    seen: list[int] = []

    class Spy(PurifiedClassifier):
        pass

    import coup_fast.attacks.objective as objective

    def spied(model, images, labels, loss, draws, *, draw, **rest):
        seen.append(draw)
        return eot(model, images, labels, loss, draws, draw=draw, **rest)

    eot = objective.eot_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "eot_gradient", spied)
        model = tiny.defended(num_draws=2, vote="softmax")
        PGD(eps=0.1, steps=3, eot=3, restarts=2)(model, images, LABELS)
        per_iterate = 3 * 2
        expected = [FIRST_ATTACK_DRAW + per_iterate * i for i in (0, 1, 2, 4, 5, 6)]
        assert seen == expected  # 3 and 7 are the values at the ends
        seen.clear()
        PGD(eps=0.1, steps=2, eot=3, through_vote=False)(model, images, LABELS)
        assert seen == [FIRST_ATTACK_DRAW, FIRST_ATTACK_DRAW + 3]
        seen.clear()
        PGD(eps=0.1, steps=3, eot=1, noise="fixed")(model, images, LABELS)
        assert seen == [0, 0, 0]


def test_the_loss_is_of_the_vote_or_of_each_draw(images: Tensor) -> None:
    model = tiny.defended("diffpure", num_draws=3, vote="majority")
    attack = PGD(eps=0.1, steps=1, eot=1, noise="fixed", random_start=False)
    with torch.no_grad():
        logits = model.draw_logits(images)
    aware = attack.run(model, images, LABELS)
    expected = cross_entropy(combine_votes(logits, "softmax"), LABELS)
    assert torch.allclose(aware.loss, expected.double(), atol=1e-5)
    blind = attack.replace(through_vote=False, eot=3).run(model, images, LABELS)
    expected = torch.stack([cross_entropy(rows, LABELS) for rows in logits]).mean(0)
    assert torch.allclose(blind.loss, expected.double(), atol=1e-5)
    assert aware.gradient_runs == blind.gradient_runs == 3 * BATCH


def test_the_best_iterate_fools_most_draws_then_has_the_highest_loss() -> None:
    class Sharp(nn.Module):
        def forward(self, u: Tensor) -> Tensor:  # fooled in the middle, loss highest beyond
            m = u.flatten(1).mean(1)
            return torch.stack((0 * m, 1 - 40 * (m - 0.55).abs(), 0 * m - 10), 1)

    u = torch.full((1, 1, 2, 2), 0.5)
    label = torch.tensor([0])
    attack = PGD(eps=0.2, steps=8, step_size=0.02, random_start=False, loss="margin")
    kept = attack.replace(keep="best").run(Sharp(), u, label)
    assert kept.fooled.item() == 1
    assert kept.loss.item() > 0


def test_network_calls_and_zero_gradients_are_reported(images: Tensor) -> None:
    model = tiny.defended("diffpure")  # three steps
    progress = []
    attack = PGD(eps=0.1, steps=4, eot=2, step_size=0.05, keep="best")
    result = attack.run(model, images, LABELS, progress=progress.append)
    assert [(p.done, p.total) for p in progress] == [(i, 5) for i in range(1, 6)]
    assert result.gradient_runs == 4 * 2 * BATCH
    runs, values = 4 * 2 * BATCH, 2 * BATCH
    assert result.score_evaluations == 3 * (runs + values)
    assert result.classifier_evaluations >= runs + values
    assert result.zero_gradients == 0
    flat = attack.run(lambda u: 0 * u.flatten(1)[:, :4], images, LABELS)
    assert flat.zero_gradients == 4 * BATCH


@pytest.mark.parametrize("method", ["coup", "diffpure"])
def test_classifications_are_counted_whatever_stands_around_the_classifier(
    method: str, images: Tensor
) -> None:
    attack = PGD(eps=0.1, steps=2, eot=1)
    clean = tiny.short_purifier(method)
    net = tiny.TinyClassifier()
    body, head = nn.Sequential(net.conv, nn.Tanh(), nn.Flatten()), net.linear
    counts = []
    for classifier in (net, lambda u: net(u), partial(net), lambda u: head(body(u))):
        guided = clean.classifier if method == "diffpure" else classifier
        purifier = Purifier(clean.score_model, guided, method=method, num_steps=3)
        found = attack.run(PurifiedClassifier(purifier, classifier), images, LABELS)
        counts.append(found.classifier_evaluations)
    assert counts[0] >= 2 * BATCH * (1 if method == "diffpure" else 4)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("method", ["coup", "diffpure"])
def test_evaluations_are_those_of_forward_passes_whatever_memory_there_was(
    method: str, images: Tensor
) -> None:
    attack = PGD(eps=0.1, steps=3, eot=2)
    counts, calls = [], []
    for budget, options in (
        (10**9, {}),
        (300_000, {}),
        (10**9, {"states": "sqrt"}),
        (10**9, {"verify_states": True}),
    ):
        purifier = tiny.short_purifier(method, **options)
        model = PurifiedClassifier(purifier, tiny.TinyClassifier())
        seen: list[int] = []
        network = purifier.score_model.network
        handle = network.register_forward_pre_hook(
            lambda _, given, to=seen: to.append(len(given[0]))
        )
        found = attack.run(model, images, LABELS, memory_budget=budget)
        handle.remove()
        counts.append((found.score_evaluations, found.classifier_evaluations))
        calls.append(sum(seen))
    assert len(set(calls)) > 1  # what was computed does depend on it
    assert counts == counts[:1] * len(counts)
    assert counts[0][0] == 3 * 2 * BATCH * 3
    guidance = 3 if method == "coup" else 0
    assert counts[0][1] == 3 * 2 * BATCH * (1 + guidance)


def test_the_second_attack_of_a_process_counts_as_the_first(images: Tensor) -> None:
    model = tiny.defended("coup")
    attack = PGD(eps=0.1, steps=2, eot=1)
    counts = [
        (found.score_evaluations, found.classifier_evaluations)
        for found in (attack.run(model, images, LABELS) for _ in range(3))
    ]
    assert counts == counts[:1] * 3


def test_the_defence_is_left_as_it_was(images: Tensor) -> None:
    model = tiny.defended(fresh_draws=True)
    model.reset_draws(5)
    flags = [p.requires_grad for p in model.parameters()]
    gradient = model.purifier.gradient
    PGD(eps=0.1, steps=1, eot=1, gradient="bpda")(model, images, LABELS)
    assert model.next_draw == 5
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.purifier.gradient == gradient
    assert not model.purifier.score_model._forward_pre_hooks


def test_float64_images_are_attacked_in_float64(images: Tensor) -> None:
    purifier = tiny.short_purifier("coup", double=True)
    model = PurifiedClassifier(purifier, purifier.classifier)
    found = PGD(eps=0.1, steps=2, eot=1)(model, images.double(), LABELS)
    assert found.dtype == torch.float64
    empty = PGD(eps=0.1, steps=2, eot=1)(model, images[:0].double(), LABELS[:0])
    assert empty.shape == (0, 3, 8, 8)


# --- failures


class Poisoned(nn.Module):
    """A classifier whose gradient is NaN for bright images."""

    def forward(self, u: Tensor) -> Tensor:
        total = u.flatten(1).sum(1)
        root = ((total <= 150) * (150 - total)).sqrt()  # bright: an infinite slope times 0
        return torch.stack((root, torch.zeros_like(root), -root), 1)


def test_a_gradient_that_is_not_finite_names_the_image(images: Tensor) -> None:
    images = torch.cat((images[:2] * 0.3, images[2:].clamp_min(0.9)))
    with pytest.raises(FloatingPointError, match="sample id 12 "):
        PGD(eps=0.1, steps=1)(Poisoned(), images, LABELS % 3, sample_ids=[10, 11, 12, 13])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": "l1"}, ValueError, "norm .*'l1'"),
        ({"loss": "cw"}, ValueError, "loss .*'cw'"),
        ({"gradient": "adjoint"}, ValueError, "gradient .*'adjoint'"),
        ({"noise": "none"}, ValueError, "noise .*'none'"),
        ({"keep": "first"}, ValueError, "keep .*'first'"),
        ({"eps": 0}, ValueError, "eps .* 0"),
        ({"eps": float("nan")}, ValueError, "eps .* nan"),
        ({"steps": 0}, ValueError, "^steps .* 0"),
        ({"eot": 1.5}, TypeError, "eot "),
        ({"seed": 2**29}, ValueError, "seed .* 536870912"),
        ({"step_size": -1}, ValueError, "step_size .* -1"),
    ],
)
def test_options_are_checked(change: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**change)


def test_apgd_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rho .* 2"):
        APGD(rho=2)


def test_inputs_are_checked(images: Tensor) -> None:
    model, attack = tiny.defended(), PGD(eps=0.1, steps=1, eot=1)
    with pytest.raises(TypeError, match=r"images .*float16"):
        attack(model, images.half(), LABELS)
    with pytest.raises(ValueError, match=r"labels .*\[4\].*\[2\]"):
        attack(model, images, LABELS[:2])
    with pytest.raises(ValueError, match=r"labels .*int64.*int32"):
        attack(model, images, LABELS.int())
    with pytest.raises(ValueError, match=r"images .*\[0, 1\].* 1\.99"):
        attack(model, 2 * images, LABELS)
    with pytest.raises(ValueError, match=r"images .*\[0, 1\].*clamp"):
        attack(model, images + 5e-5 + (1 - images.max()), LABELS)
    with pytest.raises(ValueError, match=r"sample_ids .*\[1\]"):
        attack(model, images, LABELS, sample_ids=[1])


# --- presets


def test_presets_are_the_published_ones() -> None:
    assert PGD() == PRESETS["pgd-linf"] == preset("pgd-linf")
    attack = preset("pgd-linf")
    assert isinstance(attack, PGD)
    assert (attack.eps, attack.steps, attack.step_size, attack.eot) == (8 / 255, 200, 0.007, 20)
    assert preset("apgd-dlr", eot=3) == APGD(loss="dlr", eot=3)
    assert attack.weakness is None
    assert {name for name, a in PRESETS.items() if a.weakness} == {"stopped", "bpda", "classifier"}


def test_a_preset_keeps_the_proportion_of_its_step() -> None:
    assert preset("pgd-linf", eps=4 / 255).as_dict()["step_size"] == pytest.approx(0.0035)
    assert preset("pgd-linf", eps=4 / 255, step_size=0.01).as_dict()["step_size"] == 0.01
    assert preset("pgd-linf", steps=40).as_dict()["step_size"] == pytest.approx(0.007)
    l2 = preset("pgd-l2", eps=1.0, steps=50).as_dict()
    assert l2["step_size"] == pytest.approx(2.5 / 50)
    with pytest.raises(ValueError, match=r"attack .*pgd-linf, .*'pdg'"):
        preset("pdg")
    for steps, error in ((0, ValueError), ("x", TypeError), (2.5, TypeError)):
        with pytest.raises(error, match=rf"steps must be an int .*{steps!r}"):
            preset("pgd-l2", steps=steps)


def test_names_and_dictionaries_say_what_a_table_needs() -> None:
    assert preset("pgd-linf").name == "PGD-200 ce, EOT 20, exact gradient"
    assert preset("classifier").name == "PGD-40 ce, bare classifier"
    assert "fixed noise" in preset("fixed-noise").name
    row = preset("bpda").as_dict()
    assert row["attack"] == "PGD"
    assert "identity" in row["weakness"]
    assert row.keys() >= {field.name for field in dataclasses.fields(PGD)}


# --- APGD's schedule


def test_windows_are_those_of_the_paper() -> None:
    # 22 %, then 3 % less each time, down to 6 %: Croce & Hein, section 3.2, for 100 steps.
    assert sorted(window_ends(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(window_ends(5)) == [1, 2, 3, 4, 5]
    assert sorted(window_ends(1)) == [1]
