"""What the page does with a picture, without a page: attack, purify, classify."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.experiments import PICTURE, run, tiny_bench
from torch import Tensor, nn

from coup_fast import Purifier, ScoreModel, methods
from coup_fast.app import bench as bench_module
from coup_fast.app.bench import Bench
from coup_fast.app.experiment import ATTACK_STEPS, Choices


@pytest.mark.parametrize("method", list(tiny.SHORT))
def test_the_last_state_is_what_the_purifier_makes_of_the_picture(method: str) -> None:
    kind, short = tiny.SHORT[method]
    bench = tiny_bench(kind)
    _, result = run(bench, Choices(method, short, seed=3))
    model = next(model for model in bench.score_models if model.kind == kind)
    shape = {"image_shape": (3, 8, 8)} if method == "gdmp" else {}
    purifier = Purifier(model, bench.classifier, method=method, seed=3, **short, **shape)
    expected = purifier(PICTURE.pixels[None], sample_ids=[0])[0]
    assert torch.equal(result.states[-1], expected)
    assert result.steps == len(result.seconds) == len(result.states) - 1


def test_every_state_is_kept_seen_and_reported() -> None:
    bench = tiny_bench()
    progress, result = run(bench, Choices("diffpure", {"num_steps": 4}))
    assert [item.done for item in progress] == [0, 1, 2, 3, 4]
    for item, state in zip(progress, result.states, strict=True):
        assert torch.equal(item.state, state)
    purifier = Purifier(bench.score_models[0], method="diffpure", num_steps=4)
    for k, state in purifier.trajectory(PICTURE.pixels[None]):
        assert torch.equal(result.states[k], state[0])
    with torch.no_grad():
        expected = bench.classifier(result.states).softmax(1)
    assert torch.allclose(result.views.states, expected, atol=1e-6)
    assert result.attacked is None
    assert result.views.attacked is None


def test_the_attack_fools_the_classifier_within_its_ball_and_is_what_gets_purified() -> None:
    bench = tiny_bench()
    progress, result = run(bench, Choices("coup", {"num_steps": 2}, epsilon="16/255"))
    moved = (result.attacked - PICTURE.pixels).abs().max()
    assert 15 / 255 < moved <= 16 / 255 + 1e-6
    assert result.attacked.min() >= 0
    assert result.attacked.max() <= 1
    seen = result.views.original.argmax()
    assert result.views.attacked[seen] < 0.8 * result.views.original[seen]
    with torch.no_grad():
        expected = bench.classifier(result.attacked[None]).softmax(1)[0]
    assert torch.allclose(result.views.attacked, expected, atol=1e-6)
    assert progress[0].state is None
    assert progress[0].total == ATTACK_STEPS
    purifier = Purifier(bench.score_models[0], bench.classifier, method="coup", num_steps=2)
    assert torch.equal(result.states[-1], purifier(result.attacked[None], sample_ids=[0])[0])
    assert result.epsilon == pytest.approx(16 / 255)


def test_without_a_classifier_there_is_no_guidance_no_attack_and_no_view() -> None:
    bench = tiny_bench(classifier=False)
    _, result = run(bench, Choices("coup", {"num_steps": 2}))
    assert result.views is None
    assert result.purifier.options["guidance_scale"] == 0
    assert "guidance_scale" not in bench.shown_options("coup")
    with pytest.raises(ValueError, match="--classifier"):
        run(bench, Choices("coup", {"num_steps": 2}, epsilon=0.1))


class Counting(nn.Module):
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (Choices("coup", {"t_star": 5.0}), "t_star .* 5.0"),
        (Choices("coup", {"num_steps": 0}), "num_steps .* 0"),
        (Choices("coup", {"num_steps": None}), "num_steps is empty"),
        (Choices("coup", {}, seed=-1), "seed .* -1"),
        (Choices("coup", {}, seed=None), "seed is empty"),  # type: ignore[arg-type]
        (Choices("coup", {"guidance_scale": -1.0}), "guidance_scale .* -1"),
        (Choices("adp", {}), "do not run 'adp'"),
        (Choices("coup", {"num_steps": 1501}), "1,501 steps.* at most 1,500"),
        (Choices("coup", {}, epsilon="much"), "eps .*much"),
        (Choices("coup", {}, epsilon=""), "eps"),
        (Choices("coup", {}, epsilon=2.0), "eps .* 2"),
    ],
)
def test_bad_choices_are_refused_before_a_network_is_called(choices: Choices, words: str) -> None:
    network = Counting()
    bench = tiny_bench()
    bench = Bench([ScoreModel(network)], bench.classifier, 3, (8, 8), "tiny", bench.device)
    with pytest.raises((ValueError, TypeError), match=words):
        run(bench, choices)
    assert network.calls == 0


def test_the_memory_of_the_states_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "MAX_VALUES", 3 * 8 * 8 * 7)
    run(tiny_bench(), Choices("coup", {"num_steps": 7}))
    with pytest.raises(ValueError, match=r"8 steps.* at most 7 at 8 × 8"):
        run(tiny_bench(), Choices("coup", {"num_steps": 8}))


class Exploding(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * 1e30


def test_a_result_that_is_not_finite_is_no_result() -> None:
    bench = Bench([ScoreModel(Exploding())], None, 3, (8, 8), "tiny", torch.device("cpu"))
    with pytest.raises(FloatingPointError, match=r"at step [1-5] of 5"):
        run(bench, Choices("diffpure", {"num_steps": 5}))


# --- what the page offers


def test_the_methods_are_those_of_the_networks() -> None:
    assert set(tiny_bench("eps").methods) == set(methods.METHODS) - {"adp", "langevin"}
    assert set(tiny_bench("ncsn").methods) == {"adp"}
    both = tiny_bench("eps", "ncsn")
    assert list(both.methods) == [name for name in methods.METHODS if name != "langevin"]
    assert set(tiny_bench("eps", "ncsn", "score").methods) == set(methods.METHODS)
    assert both.methods["adp"].kind == "ncsn"
    assert both.methods["coup"].kind == "eps"


@pytest.mark.parametrize("method", list(methods.METHODS))
def test_what_the_page_starts_with_is_the_published_setting(method: str) -> None:
    """The numbers in its fields give the plan of a call that names no option."""
    bench = tiny_bench("eps", "ncsn", "score")
    shape = {"image_shape": (3, 8, 8)} if method == "gdmp" else {}
    published = Purifier(bench.methods[method], bench.classifier, method=method, **shape)
    shown = bench.shown_options(method)
    assert bench.purifier(method, shown, 0, (3, 8, 8)).plan.digest == published.plan.digest


def test_settings_chosen_for_the_networks_come_first() -> None:
    bench = tiny_bench(settings={"coup": {"t_star": 0.05, "num_steps": 10}})
    shown = bench.shown_options("coup")
    assert shown["t_star"] == 0.05
    assert shown["num_steps"] == 10
    assert shown["guidance_scale"] == 1.0
    assert bench.shown_options("diffpure")["num_steps"] == 100


def test_no_method_starts_beyond_what_the_network_was_trained_for() -> None:
    model = ScoreModel(tiny.TinyNetwork(), t_max=0.2)
    bench = Bench([model], tiny.TinyClassifier(), 3, (8, 8), "tiny", torch.device("cpu"))
    assert bench.shown_options("ddpm")["t_star"] == 0.2
    for method in bench.methods:
        bench.purifier(method, bench.shown_options(method), 0, (3, 8, 8))
