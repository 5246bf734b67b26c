"""The worst of several gradients: on the planted cases, in tables, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import eval_models, tiny
from test_planted_gradient import EPS, case

from coup_fast.attacks import AdaptiveGuided, preset
from coup_fast.attacks.options import AttackGradient
from coup_fast.cli import eval as command
from coup_fast.evaluation.config import from_dict

LABELS = torch.tensor([0, 1, 2, 3])
SMALL = AdaptiveGuided(eps=0.2, steps=2, eot=2, restarts=1, finish_steps=1)


@pytest.mark.parametrize(
    ("texture", "gradients"),
    [(0.055, ("stopped", "exact")), (0.15, ("exact", "classifier"))],
    ids=["exact wins", "exact loses"],
)
def test_it_finds_what_any_of_its_gradients_finds(
    texture: float, gradients: tuple[AttackGradient, ...]
) -> None:
    """In the planted cases of `test_planted_gradient`, the second gradient is the better one."""
    defended, images, labels = case(texture)
    images, labels = images[:4], labels[:4]
    attack = AdaptiveGuided(eps=EPS, steps=12, eot=2, restarts=1, finish_steps=0, loss="margin")
    attack = attack.replace(random_start=False)

    def accuracy(attack: AdaptiveGuided) -> float:
        found = attack(defended, images, labels)
        with torch.no_grad():
            rows = [defended(found, None, draw).argmax(1) == labels for draw in range(16)]
        return float(torch.stack(rows).double().mean())

    both = accuracy(attack.replace(gradients=gradients))
    first, second = (accuracy(attack.replace(gradients=(gradient,))) for gradient in gradients)
    assert second < first - 0.15, "the case is planted so"
    assert both <= second + 0.05


def test_each_image_keeps_what_is_worst_for_it_and_work_is_counted() -> None:
    model, images, ids = tiny.defended("coup", per_sample=True), tiny.images(4), torch.arange(4)
    seen = []
    found = SMALL.run(model, images, LABELS, sample_ids=ids, progress=seen.append)
    assert [one.done for one in seen] == list(range(1, seen[0].total + 1))
    assert found.gradient_runs == (3 * 2 + 1) * 2 * 4
    parts = torch.stack([SMALL.part(g)(model, images, LABELS) for g in SMALL.gradients])
    finished = SMALL.replace(finish_steps=0)(model, images, LABELS)
    assert all(any(torch.equal(finished[i], part[i]) for part in parts) for i in range(4))
    for i in range(4):
        rows = slice(i, i + 1)
        alone = SMALL.run(model, images[rows], LABELS[rows], sample_ids=ids[rows])
        assert torch.equal(alone.images[0], found.images[i])


def test_stopped_images_are_left_out_of_later_parts() -> None:
    model, images = tiny.defended("coup", per_sample=True), tiny.images(4)
    with torch.no_grad():
        labels = model(images).argmax(1)
    attack = SMALL.replace(eps=0.4, steps=6)
    full = attack.run(model, images, labels)
    short = attack.replace(stop_when_fooled=True).run(model, images, labels)
    assert short.stopped > 0
    assert short.gradient_runs < 0.7 * full.gradient_runs
    assert float(short.fooled.mean()) >= float(full.fooled.mean()) - 0.25


def test_without_guidance_the_gradients_are_one() -> None:
    images = tiny.images(4)
    for model in (tiny.defended("diffpure"), tiny.TinyClassifier()):
        found = SMALL.run(model, images, LABELS)
        draws = 2 if isinstance(model, type(tiny.defended("diffpure"))) else 1
        assert found.gradient_runs == (2 + 1) * draws * 4
    inside = torch.nn.Sequential(tiny.defended("coup"))
    assert SMALL.run(inside, images, LABELS).gradient_runs == (3 * 2 + 1) * 2 * 4


def test_rows_say_which_gradients_ran() -> None:
    tables = eval_models.tables(attack=[{"preset": "adaptive-guided", "eps": 0.1}])
    names = {r.defence.name: r.attack.name for r in from_dict(tables).rows if r.attack is not None}
    assert names["COUP"] == "AdaptiveGuided-25+10 ce, EOT 4, unguided/stopped/exact gradient"
    assert names["COUP without guidance (λ=0)"].endswith("EOT 4, exact gradient")
    assert names["undefended"].endswith("EOT 1, exact gradient")
    one = {"preset": "adaptive-guided", "gradients": ["exact", "bpda"], "finish_steps": 0}
    (row,) = [
        r for r in from_dict(eval_models.tables(attack=[one], controls=False)).rows if r.attack
    ]
    assert row.attack.name == "AdaptiveGuided-25 ce, EOT 4, exact/bpda gradient"
    assert row.attack.weakness is None
    assert "guidance" in AdaptiveGuided(gradients=("stopped",)).weakness


def test_unguided_rows_are_for_guided_defences() -> None:
    tables = eval_models.tables(attack=[{"preset": "pgd40", "gradient": "unguided"}])
    assert [r.defence.name for r in from_dict(tables).rows if r.attack] == ["COUP"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradients": []}, TypeError, r"gradients must be a list .*\[\]"),
        ({"gradients": "exact"}, TypeError, "gradients must be a list .*'exact'"),
        ({"gradients": ["exct"]}, ValueError, "each of gradients .*'exct'"),
        ({"gradients": ["exact", "exact"]}, ValueError, "gradients must be different"),
        ({"finish_steps": -1}, ValueError, "finish_steps .*-1"),
        ({"gradient": "stopped"}, ValueError, "gradient of AdaptiveGuided is 'exact'"),
        ({"keep": "last"}, ValueError, "keep of AdaptiveGuided is 'best'"),
        ({"targeted": True}, ValueError, "targeted of AdaptiveGuided is False"),
    ],
)
def test_wrong_options_are_refused(options: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        preset("adaptive-guided", **options)
    with pytest.raises(error, match=message):
        from_dict(eval_models.tables(attack=[{"preset": "adaptive-guided", **options}]))


def test_it_takes_neither_targets_nor_a_surrogate() -> None:
    model, images = tiny.TinyClassifier(), tiny.images(4)
    with pytest.raises(ValueError, match="AdaptiveGuided takes no targets"):
        SMALL.run(model, images, LABELS, targets=(LABELS + 1) % 4)
    with pytest.raises(ValueError, match="AdaptiveGuided takes no surrogate"):
        SMALL.run(model, images, LABELS, surrogate=model)


@pytest.mark.parametrize(
    ("methods", "expected"), [(["coup"], "adaptive-guided"), (["diffpure"], "pgd40")]
)
def test_it_is_the_commands_attack_on_guided_defences(
    methods: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--methods", *methods])
    assert [one["preset"] for one in command._tables(args)["attack"]] == [expected]
    args = parser.parse_args(["--methods", *methods, "--set", "guidance_scale=0"])
    assert [one["preset"] for one in command._tables(args)["attack"]] == ["pgd40"]


def test_one_draw_on_a_classifier_without_noise_is_no_reason_to_warn() -> None:
    attack = AdaptiveGuided(eps=0.1, steps=1, restarts=1, finish_steps=1, eot=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.run(tiny.TinyClassifier(), tiny.images(2), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="eot=2 does nothing for .*; say eot=1"):
        attack.replace(eot=2).run(tiny.TinyClassifier(), tiny.images(2), torch.tensor([0, 1]))
