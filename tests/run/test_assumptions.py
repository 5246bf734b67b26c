"""What models may not do: each breach is an error or a warning that names the cause."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images, short_purifier
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, purify
from coup_fast.attacks import PGD

SHORT = {"num_steps": 2}
LABELS = torch.tensor([0, 1, 2])


def guided(classifier, **options) -> Purifier:
    return Purifier(ScoreModel(TinyNetwork().eval()), classifier, **SHORT | options)


def unguided(network, method: str = "diffpure", **options) -> Purifier:
    kind = "ncsn" if method == "adp" else "eps"
    return Purifier(ScoreModel(network, kind), method=method, **SHORT | options)


def defence(classifier) -> PurifiedClassifier:
    return PurifiedClassifier(unguided(TinyNetwork().eval()), classifier)


# Modes


def batch_norm_classifier() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), TinyClassifier())


def entries(classifier) -> dict:
    u = images()
    plain = unguided(TinyNetwork())
    model = PurifiedClassifier(plain, classifier)
    return {
        "purify": lambda: purify(u, plain.score_model, classifier, **SHORT),
        "autograd": lambda: guided(classifier, gradient="autograd")(u.clone().requires_grad_()),
        "trajectory": lambda: list(guided(classifier).trajectory(u)),
        "PurifiedClassifier": lambda: model(u),
        "attack": lambda: PGD(eps=0.1, steps=1, eot=1)(model, u, LABELS),
    }


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("entry", entries(TinyClassifier()))
def test_batch_norm_in_training_mode_is_refused_and_not_changed(entry: str, wrapped: bool) -> None:
    module = batch_norm_classifier()
    classifier = (lambda u: module(u)) if wrapped else module
    with pytest.raises(ValueError, match=r"batch norm in training mode \(Sequential\.0\).*eval"):
        entries(classifier)[entry]()
    assert torch.equal(module[0].running_mean, torch.zeros(3))
    assert module[0].num_batches_tracked == 0
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries(classifier)[entry]()


def test_dropout_and_batch_norm_without_statistics_are_refused_in_inference() -> None:
    with pytest.raises(ValueError, match=r"active dropout \(Dropout, Sequential\.0\).*\.eval\(\)"):
        guided(nn.Sequential(nn.Dropout(0.1), TinyClassifier()))(images())
    without = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), TinyClassifier())
    with pytest.raises(ValueError, match=r"without running statistics \(Sequential\.0\)"):
        guided(without.eval())(images())


# What a model does to its input and to itself


class InPlace(TinyNetwork):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.mul_(1.1), t)


class ThroughData(TinyNetwork):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x.data.mul_(1.1)
        return super().forward(x, t)


class OnTime(TinyNetwork):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t.div_(2))


@pytest.mark.parametrize("network", [InPlace, ThroughData])
@pytest.mark.parametrize("method", ["diffpure", "adp"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_written_to(network, method: str, mode) -> None:
    clean = unguided(network(), method)
    for _ in range(2):  # refused once, refused again
        with mode(), pytest.raises(RuntimeError, match="changed its input in place"):
            clean(images())


def test_a_time_that_is_written_to() -> None:
    with pytest.raises(RuntimeError, match=r"changed its input in place at step 1 of 2 .*time"):
        unguided(OnTime())(images(1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_an_answer_that_the_next_call_overwrites(mode) -> None:
    class Buffer(TinyNetwork):
        kept = None

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out = super().forward(x, t) + 6 * (0.5 - x)
            self.kept = out if self.kept is None else self.kept.copy_(out)
            return self.kept

    with mode(), pytest.raises(RuntimeError, match="an answer that it gave before"):
        unguided(Buffer(), "adp")(images())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_earlier_input_that_is_written_to(mode) -> None:
    class Late(TinyNetwork):
        kept = None

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if self.kept is not None:
                self.kept.mul_(0.5)  # the state by now; after the run, the result
            self.kept = x.detach()
            return super().forward(x, t)

    by_torch = "Inplace update to inference tensor"  # the look is in no inference mode
    with mode(), pytest.raises(RuntimeError, match=f"changed its input in place|{by_torch}"):
        unguided(Late(), num_steps=1)(images())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_final_classifier_may_answer_in_the_same_memory_again(mode) -> None:
    model, buffer = TinyClassifier().eval(), torch.zeros(1, 4)

    def classify(u: Tensor) -> Tensor:
        with torch.no_grad():
            return buffer.copy_(model(u))

    with mode():
        clean = unguided(TinyNetwork().eval(), max_batch=1)
        got = PurifiedClassifier(clean, classify)(images())
        assert torch.equal(got, PurifiedClassifier(clean, model)(images()))


def test_a_model_that_changes_itself() -> None:
    class Counting(TinyNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x, t)

    with pytest.raises(RuntimeError, match=r"changed by their own calls \(.*\.calls\)"):
        unguided(Counting())(images())

    class FillsOnce(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.zeros(()), persistent=False)
            return super().forward(x, t) + self.cache

    unguided(FillsOnce())(images())  # a cache that the first call fills is none


# What it answers


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: x.to("meta"), ValueError, "on meta for one on cpu"),
        (lambda x: x.long(), TypeError, "real floating-point numbers, got torch.int64"),
        (lambda x: x > 0, TypeError, "got torch.bool"),
        (lambda x: x.to(torch.complex64), TypeError, "got torch.complex64"),
        (lambda x: x.to_sparse(), TypeError, "got torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_answers_of_another_kind(answer, error, message: str, backend: str) -> None:
    for method in ("diffpure", "adp"):
        with pytest.raises(error, match=rf"score network .*{message}"):
            unguided(lambda x, t: answer(x), method, backend=backend)(images())
    model = TinyClassifier()
    for call in (
        guided(lambda u: answer(model(u)), backend=backend),
        defence(lambda u: answer(model(u))),
    ):
        with pytest.raises(error, match=rf"classifier .*{message}"):
            call(images())


def test_one_column_of_logits() -> None:
    one = TinyClassifier(classes=1)
    for call in (guided(one), defence(one)):
        with pytest.raises(ValueError, match=r"at least 2 classes, got \[3, 1\].*zeros_like"):
            call(images())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    model = TinyClassifier()
    with pytest.raises(FloatingPointError, match=r"classifier's logits .* NaN or inf"):
        defence(lambda u: model(u) + value)(images())


@pytest.mark.parametrize("clamp_output", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_infinite_answer_that_a_clamp_turns_into_pixels(clamp_output: bool, grad: bool) -> None:
    model = TinyNetwork()
    clean = unguided(lambda x, t: model(x, t) + torch.inf, clamp_output=clamp_output)
    with pytest.raises(FloatingPointError, match=r"diffpure.* output is inf or NaN at step 1 of 2"):
        clean(images().requires_grad_(grad))
    channels = TinyNetwork(out=6)

    def unused(x: Tensor, t: Tensor) -> Tensor:
        out = channels(x, t)
        return torch.cat([out[:, :3], out[:, 3:] + torch.inf], 1)

    unguided(unused, clamp_output=clamp_output)(images())  # variance channels that nothing reads


def test_a_trajectory_is_looked_at_when_it_ends() -> None:
    model = TinyNetwork()
    clean = unguided(lambda x, t: model(x, t) * torch.nan)
    steps = clean.trajectory(images())
    assert [k for k, _ in zip(range(3), steps, strict=False)] == [0, 1, 2]
    with pytest.raises(FloatingPointError, match="output is inf or NaN at step 1 of 2"):
        next(steps)
    with pytest.warns(UserWarning, match="score network gave two answers"):
        list(unguided(lambda x, t: model(x, t) + torch.rand_like(x)).trajectory(images()))
    ended = unguided(lambda x, t: torch.full_like(x, torch.nan), "adp")  # by steps that are NaN
    with pytest.raises(FloatingPointError, match="adp"):
        list(ended.trajectory(images()))


# What is doubtful: one warning


def said(call) -> list[str]:
    """The warnings of two calls and of a variant's call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            call(images())
        if isinstance(call, Purifier):
            call.with_options(max_batch=2)(images())
    return [str(warning.message) for warning in caught]


CLASSIFIERS = {
    "probabilities": (lambda u, m: m(u).softmax(1), "probabilities are taken for logits"),
    "saturated": (lambda u, m: 1e4 * m(u), "exactly 0 for 2 of 2 images .* saturated"),
    "batch": (lambda u, m: m(u) - m(u).mean(0), "classifier's answer .* other images"),
    "random": (lambda u, m: m(u) + torch.rand(4), "classifier gave two answers"),
    "cut": (lambda u, m: m(u) + m(u.flip(3)).detach(), "classifier's derivative is not"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_doubtful_classifiers_are_warned_of_once(name: str) -> None:
    function, message = CLASSIFIERS[name]
    model = TinyClassifier().eval()
    found = said(guided(lambda u: function(u, model)))
    assert len([text for text in found if "saturated" not in text or name == "saturated"]) == 1
    with pytest.warns(UserWarning, match=message):
        guided(lambda u: function(u, model))(images())


@pytest.mark.parametrize("name", ["probabilities", "batch", "random"])
def test_doubtful_final_classifiers_are_warned_of(name: str) -> None:
    function, message = CLASSIFIERS[name]
    model = TinyClassifier().eval()
    defended = defence(lambda u: function(u, model))
    found = said(defended)
    assert len(found) == 1
    with pytest.warns(UserWarning, match=message):
        defence(lambda u: function(u, model))(images())


def test_infinite_logits_are_warned_of() -> None:
    model = TinyClassifier().eval()
    masked = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    with pytest.warns(UserWarning, match="logits that are infinite"):
        defence(lambda u: model(u) + masked)(images())


class Cut(TinyNetwork):
    """Half of the answer is cut from the graph."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + 0.5 * torch.tanh(x.detach())


class CutWholly(TinyNetwork):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x, t)


@pytest.mark.parametrize("gradient", ["exact", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_cut_inside_the_network(gradient: str, dtype: torch.dtype) -> None:
    u = images(dtype=dtype).requires_grad_()
    with pytest.warns(UserWarning, match="score network's derivative is not that of its values"):
        unguided(Cut().to(dtype), gradient=gradient)(u)
    with pytest.raises(RuntimeError, match="score network's answer carries no gradient"):
        unguided(CutWholly().to(dtype), gradient=gradient)(u)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unguided(Cut(), gradient="bpda")(u.float())  # nothing is differentiated
        unguided(Cut())(u.detach().float())
        unguided(lambda x, t: torch.zeros_like(x), gradient=gradient)(u)  # nothing to cut


def test_a_final_classifier_that_is_cut() -> None:
    model = TinyClassifier().eval()
    defended = defence(lambda u: model(u) + model(u.flip(3)).detach())
    with pytest.warns(UserWarning, match="classifier's derivative is not"):
        defended(images().requires_grad_())


def test_weights_that_are_not_finite() -> None:
    network = TinyNetwork()
    network.unused = nn.Linear(2, 2)
    network.unused.weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"weights .* NaN: .*unused\.weight"):
        unguided(network)(images())


@pytest.mark.parametrize("method", ["coup", "coup-l2", "diffpure", "adp", "gdmp", "one-shot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_good_models_are_met_in_silence(method: str, dtype: torch.dtype) -> None:
    clean = short_purifier(method).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean(images(dtype=dtype), sample_ids=[0, 1, 2])
        clean(images(dtype=dtype).requires_grad_(), sample_ids=[0, 1, 2])
        with torch.inference_mode():
            clean(images(1), sample_ids=[7])


def test_half_precision_and_kinks_are_no_reason_for_a_warning() -> None:
    torch.manual_seed(0)
    kinked = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 4)
    ).eval()
    half = TinyClassifier().to(torch.bfloat16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for classifier in (kinked, half):
            guided(classifier, precision="bf16")(images().requires_grad_())
            guided(classifier)(images().requires_grad_())


def test_later_runs_of_a_kind_call_the_models_as_often_as_they_have_steps() -> None:
    network, classifier = TinyNetwork().eval(), TinyClassifier().eval()
    calls: list[nn.Module] = []
    for module in (network, classifier):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    clean = Purifier(ScoreModel(network), classifier, **SHORT)
    clean(images())
    calls.clear()
    clean(images())

    clean.with_plan(clean.plan)(images())
    assert [calls.count(network), calls.count(classifier)] == [4, 4]
    unlooked = Purifier(ScoreModel(network), classifier, check_values=False, **SHORT)
    calls.clear()
    unlooked(images())
    assert [calls.count(network), calls.count(classifier)] == [2, 2]


def test_calls_of_purify_look_once_at_the_same_models() -> None:
    network, calls = TinyNetwork(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    score_model, classifier = ScoreModel(network), TinyClassifier()
    counts = []
    for _ in range(3):
        calls.clear()
        purify(images(), score_model, classifier, num_steps=2)
        counts.append(len(calls))
    assert counts[0] > counts[1] == counts[2] == 2


def test_an_image_that_decides_for_the_others_is_seen() -> None:
    """The largest logit of the batch is the first image's, which sees no change by itself."""
    model, u = TinyClassifier().eval(), images()
    with torch.no_grad():
        largest = int(model(u).abs().amax(1).argmax())
    u = u.roll(-largest, 0)

    def scaled(pixels: Tensor) -> Tensor:
        logits = model(pixels)
        return logits / logits.detach().abs().max()

    with pytest.warns(UserWarning, match=r"classifier's answer .* other images"):
        guided(scaled)(u)
