"""Bad input is refused with a sentence, before any network is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import environment
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, _extension, purify
from coup_fast.run import backends
from coup_fast.run.validation import check_model


def never(*args):
    raise AssertionError("a network was called")


class Never(TinyNetwork):
    def forward(self, x, t):
        never()


class NeverClassifier(TinyClassifier):
    def forward(self, u):
        never()


def never_called(method: str = "coup", **options) -> Purifier:
    kind, short = SHORT[method]
    return Purifier(
        ScoreModel(Never(), kind=kind), NeverClassifier(), method=method, **short | options
    )


NAN = images()
NAN[1, 2, 3, 4] = float("nan")


@pytest.mark.parametrize("method", ["coup", "adp"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (images().numpy(), TypeError, "images .*tensor, got ndarray"),
        (images()[0], ValueError, r"images .*\[B, C, H, W\].* \[3, 8, 8\].*images\[None\]"),
        (images()[:, :, 0, 0], ValueError, r"images .*\[B, C, H, W\].* \[3, 3\]"),
        ((255 * images()).byte(), TypeError, "images .*uint8.* 255"),
        (images().to(torch.complex64), TypeError, "images .*complex64"),
        (images().to_sparse(), TypeError, "images .*dense"),
        (255 * images(), ValueError, r"images .*\[0, 1\].* 254\..* / 255"),
        (2 * images() - 1, ValueError, r"images .*\[0, 1\].* -0\.9.*\[-1, 1\]"),
        (NAN, ValueError, "images .*NaN"),
        (images() / 0, ValueError, "images .*inf"),
        (images(channels=1), ValueError, "score model .* 3 channels, got 1"),
    ],
)
def test_bad_images(method: str, bad, error, message: str) -> None:
    with pytest.raises(error, match=message):
        never_called(method)(bad)
    with pytest.raises(error, match=message.replace("score model", "(score model|classifier)")):
        PurifiedClassifier(never_called(method), NeverClassifier())(bad)


def test_a_classifier_of_other_channels_or_on_another_device() -> None:
    clean = Purifier(ScoreModel(never), NeverClassifier(1), num_steps=2)
    with pytest.raises(ValueError, match=r"classifier .* 1 channels, got 3"):
        clean(images())
    with pytest.raises(ValueError, match=r"classifier .* 1 channels, got 3"):
        PurifiedClassifier(never_called(), TinyClassifier(1))(images())
    elsewhere = torch.zeros(1, 3, 8, 8, device="meta")
    with pytest.raises(ValueError, match="images are on meta and the score model is on cpu"):
        check_model("score model", ScoreModel(Never()), elsewhere)


def test_rounding_beyond_the_range_is_tolerated() -> None:
    u = images()
    u[0, 0, 0, 0], u[0, 0, 0, 1] = 1 + 1e-6, -1e-6
    clean = Purifier(ScoreModel(TinyNetwork()), TinyClassifier(), num_steps=2)
    assert clean(u).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"sample_ids": [1, 2]}, ValueError, r"sample_ids .*\[3\].*\[2\]"),
        ({"sample_ids": torch.zeros(3, 1).long()}, ValueError, r"sample_ids .*\[3, 1\]"),
        ({"sample_ids": torch.zeros(3)}, TypeError, "sample_ids .*float32"),
        ({"sample_ids": [True, False, True]}, TypeError, "sample_ids .*(bool|True)"),
        ({"draw": -1}, ValueError, "draw .* -1"),
        ({"draw": 0.5}, TypeError, "draw .*int"),
        ({"draw": True}, TypeError, "draw .*int"),
        ({"draw": torch.zeros(2).long()}, ValueError, r"draw .*int64.*\[3\].*\[2\]"),
        ({"draw": torch.tensor([0, -3, 1])}, ValueError, r"draw .* at least 0, got -3"),
        (
            {"draw": torch.tensor([0, -3, 1]), "noise": torch.zeros(4, 3, 3, 8, 8)},
            ValueError,
            r"draw .* at least 0, got -3",
        ),
        ({"noise": images().numpy()}, TypeError, "noise .*tensor, got ndarray"),
        ({"noise": torch.zeros(2, 3, 3, 8, 8)}, ValueError, r"needs 4 .*noise.* 2.*\[4, 3, "),
        ({"noise": torch.zeros(3, 3, 8, 8)}, ValueError, r"noise .*\[4, 3, 3, 8, 8\].*\[3, 3, 8"),
        (
            {"noise": torch.zeros(4, 2, 3, 8, 8)},
            ValueError,
            r"noise .*\[4, 3, 3, 8, 8\].*\[4, 2, 3",
        ),
        ({"noise": torch.zeros(4, 3, 3, 8, 8).double()}, TypeError, "noise .*got torch.float64"),
        ({"noise": torch.zeros(4, 3, 3, 8, 8).long()}, TypeError, "noise .*int64"),
        ({"noise": torch.zeros(4, 3, 3, 8, 8, device="meta")}, ValueError, "noise is on meta"),
    ],
)
def test_bad_calls(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        never_called("diffpure")(images(), **call)


def test_accepted_sample_ids() -> None:
    clean = Purifier(ScoreModel(TinyNetwork()), method="diffpure", num_steps=2)
    want = clean(images(), sample_ids=torch.tensor([3, 1, 2]))
    for ids in ([3, 1, 2], (3, 1, 2), torch.tensor([3, 1, 2], dtype=torch.int32)):
        assert torch.equal(clean(images(), sample_ids=ids), want)
    assert torch.equal(clean(images()), clean(images(), sample_ids=range(3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "cuop"}, ValueError, "'cuop'.*coup.*diffpure.*one-shot"),
        ({"method": ["coup"]}, ValueError, "unknown method .*coup.*diffpure.*one-shot"),
        ({"stps": 3}, ValueError, "'stps'.*t_star.*num_steps.*backend.*guidance_gradient"),
        ({"method": "adp", "t_star": 0.1}, ValueError, "'adp' .*'t_star'.*sigma.*backend"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"t_star": 2.0}, ValueError, "t_star"),
        ({"backend": "cuda"}, ValueError, "backend .*auto, compiled, reference, got 'cuda'"),
        ({"guidance_gradient": "half"}, ValueError, "guidance_gradient .*stopped, got 'half'"),
        ({"check_values": "no"}, ValueError, "check_values .*True.* False.*'no'"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 0.0}, TypeError, "seed .*int"),
        ({"classifier": None}, ValueError, "'coup' .*classifier"),
        ({"classifier": 3}, TypeError, "classifier .*callable"),
    ],
)
def test_bad_options(options, error, message: str) -> None:
    arguments = {"classifier": never} | options
    with pytest.raises(error, match=message):
        Purifier(ScoreModel(never), **arguments)
    with pytest.raises(error, match=message):
        purify(images(), ScoreModel(never), **arguments)


def test_models_must_suit_the_method() -> None:
    with pytest.raises(TypeError, match=r"score_model .*ScoreModel, got TinyNetwork"):
        Purifier(TinyNetwork(), TinyClassifier())
    with pytest.raises(ValueError, match=r"adp .*ncsn.* 'eps'"):
        Purifier(ScoreModel(never), method="adp")
    Purifier(ScoreModel(never), guidance_scale=0)  # without guidance, no classifier
    Purifier(ScoreModel(never), method="diffpure")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "num_draws .* 0"),
        ({"num_draws": 1.0}, TypeError, "num_draws .*int"),
        ({"vote": "mean"}, ValueError, "vote .*logits, softmax, majority, got 'mean'"),
        ({"classifier": None}, TypeError, "classifier .*NoneType"),
        ({"purifier": TinyNetwork()}, TypeError, "purifier .*TinyNetwork"),
    ],
)
def test_bad_purified_classifiers(arguments, error, message: str) -> None:
    good = {"purifier": never_called(), "classifier": never}
    with pytest.raises(error, match=message):
        PurifiedClassifier(**good | arguments)


def test_bad_calls_of_a_purified_classifier() -> None:
    model = PurifiedClassifier(never_called(), never)
    for draw, error in ((-1, ValueError), (0.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="draw "):
            model(images(), draw=draw)
    with pytest.raises(ValueError, match=r"sample_ids .*\[3\].*\[1\]"):
        model(images(), sample_ids=[0])
    with pytest.raises(ValueError, match=r"next_draw .*-1"):
        model.reset_draws(-1)


# Backends


def test_float64_has_no_compiled_path() -> None:
    with pytest.raises(TypeError, match=r"float64 images .*reference"):
        never_called(backend="compiled")(images(dtype=torch.float64))


def test_missing_kernels_are_an_error_that_names_the_cure(monkeypatch) -> None:
    monkeypatch.setattr(_extension, "available", lambda: False)
    monkeypatch.setattr(_extension, "cuda_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"operators .* not loaded.*'reference'"):
        never_called(backend="compiled")(images())
    assert backends.choose_ops("auto", images()).__name__ == "coup_fast.reference"
    for backend in ("auto", "compiled"):
        fake = type("FakeImages", (), {"device": torch.device("cuda"), "dtype": torch.float32})
        with pytest.raises(RuntimeError, match=r"no CUDA kernels.*'reference'"):
            backends.choose_ops(backend, fake())
        with pytest.raises(RuntimeError, match="'meta'"):
            backends.choose_ops(backend, torch.zeros(1, device="meta"))
    assert backends.choose_ops("reference", fake()).__name__ == "coup_fast.reference"


@pytest.mark.parametrize("wanted", ["garbage", "AVX2"])
def test_an_instruction_set_that_does_not_exist_is_refused_before_any_network(wanted: str) -> None:
    code = (
        "from test_validation import *\n"
        "try: never_called()(images())\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(Path(__file__).parent, COUP_FAST_CPU=wanted),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = f"COUP_FAST_CPU must be baseline, avx2 or avx512, got {wanted}"
    assert done.stdout.strip() == said


# What networks return


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x, t: x[:, :1], r"returned \[3, 1, 8, 8\].*\[3, 3, 8, 8\]"),
        (lambda x, t: x[:, :, 1:], r"returned \[3, 3, 7, 8\]"),
        (lambda x, t: x[:1], r"returned \[1, 3, 8, 8\]"),
        (lambda x, t: x.mean(), r"returned \[\]"),
    ],
)
def test_network_outputs_of_another_shape(network, message: str) -> None:
    for method, kind in (("diffpure", "eps"), ("adp", "ncsn")):
        clean = Purifier(ScoreModel(network, kind=kind), method=method, num_steps=2)
        with pytest.raises(ValueError, match=message):
            clean(images())


def test_learned_variance_needs_its_channels() -> None:
    clean = Purifier(ScoreModel(TinyNetwork()), method="ddpm", num_steps=2, variance="learned")
    with pytest.raises(ValueError, match=r"variance .*\[3, 6, 8, 8\].*got \[3, 3, 8, 8\]"):
        clean(images())


def turning_bad(step: int, position: int, value: float):
    calls = []

    def network(x, t):
        calls.append(1)
        out = torch.zeros_like(x)
        if (len(calls) - 1) % 4 == step:
            out[position] = value
        return out

    return network


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_turns_bad_is_named_with_step_and_image(value: float) -> None:
    clean = Purifier(ScoreModel(turning_bad(2, 1, value)), method="diffpure", num_steps=4)
    message = r"score network's output is inf or NaN at step 3 of 4, for 1 of 3 images \(pos.* 1\)"
    with pytest.raises(FloatingPointError, match=message):
        clean(images())
    assert (
        not Purifier(
            ScoreModel(turning_bad(2, 1, value)), method="diffpure", num_steps=4, check_values=False
        )(images())
        .isfinite()
        .all()
    )


def test_a_classifier_that_turns_bad_is_named() -> None:
    clean = Purifier(
        ScoreModel(lambda x, t: 0 * x), lambda u: u.flatten(1)[:, :4] * float("inf"), num_steps=2
    )
    with pytest.raises(FloatingPointError, match="classifier's confidence gradient is inf or NaN"):
        clean(images())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adp_does_not_take_a_bad_network_for_a_stopped_sample(value: float) -> None:
    def network(x, t):
        return torch.where(torch.arange(3).reshape(3, 1, 1, 1) == 2, value, 6 * (0.5 - x))

    clean = Purifier(ScoreModel(network, kind="ncsn"), method="adp", num_steps=3)
    with pytest.raises(FloatingPointError, match=r"at step 1 of 3, for 1 of 3 .*\(positions 2\)"):
        clean(images())
    # A score of exactly zero has no step size either, and is nothing to complain about.
    still = Purifier(ScoreModel(lambda x, t: 0 * x, kind="ncsn"), method="adp", num_steps=3)
    assert still(images()).isfinite().all()


def test_noise_that_is_not_finite_is_named() -> None:
    clean = Purifier(ScoreModel(TinyNetwork()), method="diffpure", num_steps=1)
    noise = torch.full((2, 3, 3, 8, 8), float("nan"))
    with pytest.raises(FloatingPointError, match="state is inf or NaN before the first step"):
        clean(images(), noise=noise)


def test_times_that_a_model_was_not_trained_for_are_refused() -> None:
    model = ScoreModel(lambda x, t: x, t_max=0.2)
    with pytest.raises(ValueError, match=r"t = 0\.3.* 0\.2 \(t_max\)"):
        Purifier(model, method="diffpure", t_star=0.3)
    Purifier(model, method="diffpure", t_star=0.2)
    Purifier(model, method="gradual")
    with pytest.raises(ValueError, match=r"t_max .* 1\.5"):
        ScoreModel(lambda x, t: x, t_max=1.5)
