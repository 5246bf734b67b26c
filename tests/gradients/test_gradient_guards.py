"""What the exact gradient refuses: models that would not repeat themselves, and says why."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel


class With(nn.Module):
    """The tiny network with something on its way."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.network = TinyNetwork()
        self.part = part

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(self.part(x), t)


def purifier(network=None, method: str = "coup", classifier=None, **options) -> Purifier:
    kind, short = SHORT[method]
    model = ScoreModel(network or TinyNetwork(), kind)
    return Purifier(model, classifier or TinyClassifier(), method=method, **short | options)


def run(clean: Purifier, **options) -> Tensor:
    u = images().requires_grad_()
    return torch.autograd.grad(clean(u).square().sum(), u)[0]


TRAINING = {
    "dropout": (nn.Dropout(0.1), r"\(Dropout, ScoreModel\.network\.part\)"),
    "dropout2d": (nn.Dropout2d(0.1), r"\(Dropout2d, ScoreModel\.network\.part\)"),
    "rrelu": (nn.RReLU(), r"\(RReLU, ScoreModel\.network\.part\)"),
    "batch norm": (nn.BatchNorm2d(3), r"batch norm .*\(ScoreModel\.network\.part\)"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_modes_are_refused_before_the_run_and_fine_in_eval(name: str) -> None:
    part, message = TRAINING[name]
    part.train()
    calls: list[int] = []
    clean = purifier(With(part))
    part.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message + r".*\.eval\(\)"):
        run(clean)
    assert not calls
    with pytest.raises(ValueError, match=message + r".*\.eval\(\)"):
        clean(images())  # in inference as with a gradient
    assert not calls
    assert part.training
    run(clean.eval())


def test_harmless_parts_in_training_mode_are_not_refused() -> None:
    for part in (nn.Dropout(0.0), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)):
        run(purifier(With(part.train())))
    with pytest.raises(ValueError, match="active dropout"):
        run(purifier(With(nn.Dropout(0.5)), gradient="autograd"))


def test_batch_norm_without_statistics_is_refused_in_eval_too() -> None:
    network = With(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"running statistics \(ScoreModel\.network\.part\)"):
        run(purifier(network))


def test_the_classifiers_are_looked_at_too() -> None:
    class Dropped(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

    with pytest.raises(ValueError, match=r"Dropped\.drop"):
        run(purifier(classifier=Dropped()))
    plain = purifier(method="diffpure")
    model = PurifiedClassifier(plain, nn.Sequential(nn.BatchNorm2d(3), TinyClassifier()))
    with pytest.raises(ValueError, match=r"batch norm .*\(Sequential\.0\)"):
        model(images().requires_grad_())
    with pytest.raises(ValueError, match=r"batch norm .*\(Sequential\.0\)"):
        model(images())
    assert model.eval()(images()).shape == (3, 4)


class Noisy(TinyNetwork):
    """A network that hides its randomness from any look at its modules."""

    def __init__(self, size: float) -> None:
        super().__init__(pull=8.0)  # so that ADP goes on
        self.size = size

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + self.size * torch.randn(x.shape)


@pytest.mark.parametrize("method", ["diffpure", "coup", "adp", "gdmp"])
def test_a_network_that_does_not_repeat_itself_is_noticed(method: str) -> None:
    for options in ({}, {"verify_states": True}, {"states": "sqrt"}):
        clean = purifier(Noisy(0.01 if method == "adp" else 1.0), method, **options)
        with pytest.raises(RuntimeError, match=f"{method}: step .* differs .* likely reason"):
            run(clean)
    run(purifier(Noisy(1.0), method, check_values=False))  # nobody looked


def test_rounding_is_warned_of_and_refused_by_verify_states() -> None:
    with pytest.warns(UserWarning, match=r"step 3 of 3, .*differs"):
        run(purifier(Noisy(1e-4), "diffpure"))
    with pytest.raises(RuntimeError, match=r"differs .*training mode \(ScoreModel\.network\)"):
        run(purifier(Noisy(1e-4), "diffpure", verify_states=True).train())
    with pytest.raises(RuntimeError, match=r"differs .*draws random numbers"):
        run(purifier(Noisy(1e-4), "diffpure", verify_states=True).eval())


def test_verify_states_names_the_step_that_differs() -> None:
    class Once(TinyNetwork):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x, t) + (0.1 if self.calls == 2 else 0.0)

    for states in ("device", "sqrt"):
        Once.calls = 0
        clean = purifier(Once(), "diffpure", num_steps=4, states=states, verify_states=True)
        with pytest.raises(RuntimeError, match="diffpure: step 2 of 4"):
            run(clean)
    Once.calls = 0
    run(purifier(Once(), "diffpure", num_steps=4))  # the last step alone is looked at


def test_silu_in_the_guidance_rounds_differently_and_is_accepted() -> None:
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(purifier(classifier=classifier, guidance_scale=50.0, verify_states=True))


def test_a_model_that_is_another_one_under_gradients_is_refused() -> None:
    class TwoFaced(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) * (2.0 if torch.is_grad_enabled() else 1.0)

    with pytest.raises(RuntimeError, match=r"step 3 of 3, .*when it is differentiated"):
        run(purifier(TwoFaced(), "diffpure"))


def change_weight(clean: Purifier) -> None:
    with torch.no_grad():
        clean.score_model.network.first.weight.add_(1.0)


def optimiser_step(clean: Purifier) -> None:
    parameter = clean.classifier.linear.weight
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], 0.1).step()


def replace_weight(clean: Purifier) -> None:
    clean.classifier.linear.weight = nn.Parameter(torch.zeros(4, 64))


def replace_data(clean: Purifier) -> None:
    clean.score_model.network.last.bias.data = torch.ones(3)


CHANGES = [change_weight, optimiser_step, replace_weight, replace_data]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parameters_between_forward_and_backward_are_noticed(change) -> None:
    clean = purifier()
    out = clean(images().requires_grad_())
    change(clean)
    with pytest.raises(RuntimeError, match=r"between .* \((Sc|Ti).*(weight|bias)\)"):
        out.sum().backward()
    run(clean)


def test_changed_noise_and_changed_mode_are_noticed() -> None:
    clean = purifier(method="diffpure")
    noise = torch.randn(clean.num_noise, 3, 3, 8, 8)
    out = clean(images().requires_grad_(), noise=noise)
    noise.zero_()
    with pytest.raises(RuntimeError, match="the given noise"):
        out.sum().backward()
    clean = purifier(With(nn.Dropout(0.5))).eval()
    out = clean(images().requires_grad_())
    clean.train()
    with pytest.raises(ValueError, match=r"\(Dropout, ScoreModel\.network\.part\)"):
        out.sum().backward()


def test_models_that_change_themselves_or_their_input_are_refused() -> None:
    network = TinyNetwork()
    network.first = nn.utils.parametrizations.spectral_norm(network.first)
    with pytest.raises(RuntimeError, match=r"during the run \(ScoreModel\.network\.first\."):
        run(purifier(network.train()))
    run(purifier(network.eval()))

    class InPlace(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x.mul_(1.5), t)

    with pytest.raises(RuntimeError, match="input in place at step 1 of 3"):
        run(purifier(InPlace(), "diffpure"))


def test_autocast_of_the_forward_pass_is_used_again_in_the_backward_pass() -> None:
    u = images()
    gradients = []
    for kind in ("exact", "autograd"):
        clean = purifier(gradient=kind, verify_states=True)
        leaf = u.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = clean(leaf)
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    gap = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert gap <= 1e-4


def test_flags_and_grads_are_left_as_found() -> None:
    clean = purifier()
    clean.classifier.linear.weight.requires_grad_(False)
    run(clean)
    assert all(p.grad is None for p in clean.parameters())
    assert not clean.classifier.linear.weight.requires_grad
    assert clean.score_model.network.first.weight.requires_grad
    with pytest.raises(RuntimeError):
        run(purifier(Noisy(1.0)))
    out = clean(images().requires_grad_())
    change_weight(clean)
    with pytest.raises(RuntimeError):
        out.sum().backward()
    assert clean.score_model.network.first.weight.requires_grad
