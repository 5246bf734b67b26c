"""A purifier with other options, another plan or fewer steps, beside the one it came from."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images
from helpers.tiny import short_purifier as purifier

from coup_fast import Purifier, ScoreModel

METHODS = sorted(SHORT)


@pytest.mark.parametrize("method", METHODS)
def test_a_variant_is_what_its_arguments_would_have_made(method: str) -> None:
    u = images()
    clean = purifier(method)
    for options in ({"check_values": False, "max_batch": 2}, {"backend": "reference"}):
        other = clean.with_options(**options)
        assert torch.equal(other(u), purifier(method, **options)(u))
        for name, value in options.items():
            assert getattr(other, name) == value
            assert getattr(clean, name) == getattr(purifier(method), name)


def test_options_of_the_method_make_the_plan_anew() -> None:
    clean = purifier("coup")
    other = clean.with_options(num_steps=2, gradient="bpda")
    assert torch.equal(other(images()), purifier("coup", num_steps=2)(images()))
    assert (other.gradient, other.options["num_steps"]) == ("bpda", 2)
    assert clean.options == purifier("coup").options
    assert clean.plan.num_steps != 2


@pytest.mark.parametrize("method", METHODS)
def test_the_first_steps_are_those_of_the_trajectory(method: str) -> None:
    clean, u = purifier(method), images()
    states = dict(clean.trajectory(u))
    for steps in range(1, clean.plan.num_steps + 2):
        plan = clean.plan.first(steps)
        few = dict(clean.with_plan(plan).trajectory(u))
        assert plan.num_steps == min(steps, clean.plan.num_steps)
        for k in set(few) - {plan.num_steps}:
            assert torch.equal(few[k], states[k])
    assert torch.equal(clean.with_plan(clean.plan.first(1000))(u), clean(u))


def test_what_is_changed_in_a_variant_stays_in_it() -> None:
    clean = purifier("coup")
    classifier, options = clean.classifier, dict(clean.options)
    other = clean.with_options(gradient="none")
    called = []
    other.classifier = TinyClassifier()
    other.options["zzz"] = 1
    other.register_forward_hook(lambda *_: called.append(1))
    clean(images())
    assert clean.classifier is classifier
    assert clean.options == options
    assert not called


@pytest.mark.parametrize("steps", [0, -1, True, None, 1.0])
@pytest.mark.parametrize("method", ["coup", "adp"])
def test_counts_of_steps_that_make_no_sense_are_refused(method: str, steps) -> None:
    with pytest.raises((TypeError, ValueError), match="steps must be an int of at least 1"):
        purifier(method).plan.first(steps)


def test_plans_that_the_models_cannot_run_are_refused() -> None:
    network = TinyNetwork()
    bare = Purifier(ScoreModel(network, t_max=0.1), method="diffpure", num_steps=2)
    with pytest.raises(TypeError, match="plan must be a Plan or an AdaptivePlan, got str"):
        bare.with_plan("coup")
    with pytest.raises(ValueError, match="'coup' is guided by a classifier"):
        bare.with_plan(purifier("coup").plan)
    late = Purifier(ScoreModel(network), method="diffpure", num_steps=2, t_star=0.5)
    with pytest.raises(ValueError, match=r"t = 0\.5.*t up to 0\.1"):
        bare.with_plan(late.plan)
    with pytest.raises(ValueError, match="has no option 'gradeint'"):
        bare.with_options(gradeint="none")


def test_an_option_that_is_set_is_checked() -> None:
    clean = purifier("coup")
    clean.gradient = "bpda"
    assert clean.run_options.gradient == "bpda"
    with pytest.raises(ValueError, match=r"gradient .*typo"):
        clean.gradient = "typo"
    clean.compile_networks = 0  # == False, and kept as that
    assert clean.compile_networks is False


def test_an_empty_batch_has_one_state() -> None:
    for method in ("coup", "adp"):
        shown = [k for k, _ in purifier(method).trajectory(images(0))]
        assert shown[0] == 0
        assert (len(shown) == 1) == (method == "adp")  # ADP has nothing alive
