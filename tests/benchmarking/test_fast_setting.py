"""`fast_setting`: what it may choose, what it refuses, and that its options repeat its numbers."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

import coup_fast
from coup_fast.benchmarking import fast_setting as module
from coup_fast.benchmarking.fast_setting import SHORT_STEPS, fast_setting
from coup_fast.benchmarking.timing import Timing


def purifier(
    method: str = "coup", network: nn.Module | None = None, **options
) -> coup_fast.Purifier:
    model = coup_fast.ScoreModel(network or TinyNetwork())
    return coup_fast.Purifier(model, TinyClassifier(), method=method, seed=3, **options)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Medians that the next measurements give, in the order of the trials."""
    planned: list[float] = []

    def measured(functions, *_rest):
        for function in functions.values():
            function()
        return {
            name: Timing(planned[int(name)], planned[int(name)], 0.0, 0.0, 3, 1)
            for name in functions
        }

    monkeypatch.setattr(module, "measure_in_turns", measured)
    monkeypatch.setattr(module, "HOPELESS", 1e9)
    return planned


class HalfBroken(TinyNetwork):
    """Gives `value` for the answer of bfloat16."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        return torch.full_like(out, self.value) if out.dtype == torch.bfloat16 else out


def test_the_fastest_one_is_chosen_and_its_options_repeat_its_numbers(times) -> None:
    times += [4.0, 3.0, 2.0, 1.0]
    given = purifier(num_steps=20)
    found = fast_setting(given, images(4))
    assert found.options == {
        "num_steps": SHORT_STEPS,
        "solver": "exponential",
        "precision": "bf16",
        "channels_last": True,
    }
    assert found.trials[3].seconds == pytest.approx(1.0 / (4 * SHORT_STEPS))
    by_hand = given.with_options(**found.options)
    assert torch.equal(found.purifier(images(4), range(4)), by_hand(images(4), range(4)))
    assert given.plan.num_steps == 20  # what was given stays as it was
    assert given.precision == "fp32"


def test_an_earlier_one_is_kept_where_a_later_one_is_hardly_faster(times) -> None:
    times += [1.0, 0.98, 1.5, 0.975]
    assert fast_setting(purifier(), images(2)).options["precision"] == "fp32"
    assert fast_setting(purifier(), images(2)).options["channels_last"] == "auto"


@pytest.mark.parametrize("value", [float("nan"), 50.0])
def test_a_wrong_result_is_refused_however_fast_it_is(times, value: float) -> None:
    times += [4.0, 4.0, 1.0, 1.0]
    found = fast_setting(purifier(network=HalfBroken(value)), images(2))
    assert found.options["precision"] == "fp32"
    refused = [trial.refused for trial in found.trials]
    assert refused[:2] == ["", ""]
    assert all(text.startswith("refused") for text in refused[2:])
    assert "refused" in str(found)


def test_a_purifier_that_fails_in_float32_fails(times) -> None:
    class Broken(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, float("nan"))

    with pytest.raises(FloatingPointError):
        fast_setting(purifier(network=Broken()), images(2))


def test_the_steps(times) -> None:
    times += [1.0] * 4
    short = fast_setting(purifier(num_steps=5), images(2))
    assert short.purifier.plan.num_steps == 5
    assert "num_steps" not in short.options
    stepped = fast_setting(purifier(step_size=2e-3), images(2))
    assert stepped.purifier.plan.num_steps == SHORT_STEPS
    same = fast_setting(purifier(num_steps=20), images(2), shorten=False)
    assert same.purifier.plan.num_steps == 20
    assert set(same.options) == {"precision", "channels_last"}
    chain = purifier("ddpm", t_star=0.03)
    kept = fast_setting(chain, images(2))
    assert kept.purifier.plan.num_steps == chain.plan.num_steps
    assert any("ddpm keeps" in note for note in kept.notes)


def test_compiled_networks_are_tried_for_long_runs_only(times, monkeypatch) -> None:
    times += [1.0, 1.0, 1.0, 1.0, 0.5]
    tried = []
    search = module._Search

    class Noting(search):
        def add(self, options):
            tried.append(options)
            super().add({name: value for name, value in options.items() if name != "compile"})

    monkeypatch.setattr(module, "_Search", Noting)
    found = fast_setting(purifier(), images(2), num_images=10)
    assert not any("compile" in options for options in tried)
    assert any("not tried" in note for note in found.notes)
    fast_setting(purifier(), images(2), num_images=10_000)
    assert tried[-1]["compile"] is True


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.nn.Identity(), images(2)), TypeError, ["purifier", "Identity"]),
        ((None, images(2).double()), TypeError, ["images", "float64"]),
        ((None, [1.0]), TypeError, ["images", "list"]),
        ((None, images(2)[0]), ValueError, ["images"]),
        ((None, images(2)[:0]), ValueError, ["images"]),
    ],
)
def test_bad_arguments(arguments, error: type[Exception], words: list[str]) -> None:
    given, pixels = arguments
    with pytest.raises(error) as raised:
        fast_setting(purifier() if given is None else given, pixels)
    assert all(word in str(raised.value) for word in words)
    with pytest.raises(ValueError, match="num_images"):
        fast_setting(purifier(), images(2), num_images=0)


def test_measured_for_real() -> None:
    found = fast_setting(purifier(num_steps=3), images(2))
    assert all(trial.seconds > 0 for trial in found.trials)
    assert found.trials[0].difference == 0.0
    assert found.trials[2].difference > 0.0  # bfloat16 did run
