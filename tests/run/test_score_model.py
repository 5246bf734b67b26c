"""ScoreModel and EnergyModel: what reaches the network, and s = -∇E against analytic energies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import nn

from coup_fast._torch.modules import declared_channels
from coup_fast.models import AtVPTimes, Normalized
from coup_fast.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, VPSchedule
from coup_fast.score_model import EnergyModel, ScoreModel

CHAIN = DiscreteSchedule()


def test_network_is_called_with_scaled_times_and_returns_its_raw_output() -> None:
    seen = []

    def network(x, t):
        seen.append((x, t))
        return 3 * x

    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 0.5])
    model = ScoreModel(network)
    assert torch.equal(model(x, t), 3 * x)
    assert seen[0][0] is x
    torch.testing.assert_close(seen[0][1], 999 * t)
    assert (model.kind, model.schedule, model.time_scale) == ("eps", VPSchedule(), 999.0)


@pytest.mark.parametrize("steps", [1000, 999, 50, 7])
def test_times_of_a_discrete_schedule_arrive_as_whole_numbers(steps: int) -> None:
    schedule = DiscreteSchedule.linear(num_steps=steps)
    model = ScoreModel(lambda x, t: t, schedule=schedule, time_scale=steps)
    index = torch.arange(steps)
    times = torch.from_numpy(schedule.index_time(index.numpy()))
    assert torch.equal(model(torch.zeros(steps, 1, 1, 1), times), index.float())


def test_objects_with_a_sample_are_unwrapped_and_anything_else_is_refused() -> None:
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2)
    assert torch.equal(ScoreModel(lambda x, t: SimpleNamespace(sample=2 * x))(x, t), 2 * x)
    with pytest.raises(TypeError, match="returned tuple"):
        ScoreModel(lambda x, t: (x, x))(x, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_input_is_cast_to_the_dtype_of_the_parameters_and_time_is_not(dtype) -> None:
    seen = []
    network = TinyNetwork().to(dtype)
    network.register_forward_pre_hook(lambda module, args: seen.extend(a.dtype for a in args))
    out = ScoreModel(network)(images(2), torch.zeros(2))
    assert (out.dtype, seen) == (dtype, [dtype, torch.float32])


@pytest.mark.parametrize(
    ("schedule", "scale"),
    [
        (None, 999.0),
        (DiscreteSchedule.cosine(250), 250.0),
        (EDMSchedule(50.0), 50.0),
        (FlowSchedule(data_at=0), 1.0),
    ],
    ids=["vp", "discrete", "edm", "flow"],
)
def test_times_are_scaled_as_networks_of_the_schedule_expect(schedule, scale: float) -> None:
    """A chain's index and EDM's σ were told as 999 t, silently."""
    assert ScoreModel(TinyNetwork(), "x0", schedule).time_scale == scale
    assert ScoreModel(TinyNetwork(), "x0", schedule, time_scale=3.0).time_scale == 3.0


def test_at_vp_times_says_its_schedule_and_time_scale() -> None:
    process = VPSchedule(0.1, 5.0)
    network = AtVPTimes(TinyNetwork(), process)
    model = ScoreModel(network, "x0")
    assert (model.schedule, model.time_scale) == (process, 1.0)
    for given in ({"schedule": VPSchedule()}, {"time_scale": 999.0}, {"schedule": CHAIN}):
        with pytest.raises(
            ValueError, match=r"AtVPTimes .*VPSchedule\(beta_min=0\.1, .*5\.0\).*got"
        ):
            ScoreModel(network, "x0", **given)


@pytest.mark.parametrize("training", [True, False])
def test_wrappers_are_in_the_mode_of_their_network(training: bool) -> None:
    network = TinyNetwork().train(training)
    wrappers = [
        ScoreModel(network),
        ScoreModel(network, size_multiple=4).network,
        ScoreModel(network, "velocity").network,
        EnergyModel(network),
        AtVPTimes(network),
        Normalized(network, 0.5, 0.2),
    ]
    assert [wrapper.training for wrapper in wrappers] == [training] * len(wrappers)
    assert wrappers[0].train(not training).network.training is not training


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind .*eps, score, x0, v, velocity, ncsn, got 'noise'"):
        ScoreModel(TinyNetwork(), kind="noise")
    with pytest.raises(TypeError, match="callable"):
        ScoreModel(3)
    with pytest.raises(TypeError, match="ScoreModel already"):
        ScoreModel(ScoreModel(TinyNetwork()))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"time_scale .*{scale}"):
            ScoreModel(TinyNetwork(), time_scale=scale)
    for name, values in {
        "time_scale": ["999", True, torch.tensor(999.0)],
        "t_max": ["1", False],
        "schedule": ["vp", VPSchedule],
    }.items():
        for value in values:
            with pytest.raises(TypeError, match=rf"^{name} must be"):
                ScoreModel(TinyNetwork(), **{name: value})
    with pytest.raises(TypeError, match="callable"):
        EnergyModel(3)


def test_channels_are_read_where_they_are_declared() -> None:
    assert declared_channels(TinyNetwork(2)) == 2
    assert declared_channels(ScoreModel(TinyNetwork(2))) == 2
    assert declared_channels(ScoreModel(EnergyModel(TinyNetwork(2)))) == 2
    assert declared_channels(nn.Sequential(nn.Sequential(nn.Conv2d(5, 1, 1)), nn.ReLU())) == 5
    assert declared_channels(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))) is None
    assert declared_channels(SimpleNamespace(config={"in_channels": 4})) == 4
    assert declared_channels(SimpleNamespace(config=SimpleNamespace(in_channels=6))) == 6
    assert declared_channels(lambda x, t: x) is None


class Quadratic(nn.Module):
    """E = ½ Σ a x² + ¼ Σ x⁴ + Σ t x, one number a sample; -∇E = -(a x + x³ + t)."""

    def __init__(self, keepdim: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(3, 4, 4, dtype=torch.float64) + 0.5)
        self.keepdim = keepdim

    def forward(self, x, t):
        terms = 0.5 * self.a * x**2 + 0.25 * x**4 + t.reshape(-1, 1, 1, 1) * x
        energy = terms.flatten(1).sum(1)
        return energy[:, None] if self.keepdim else energy


def analytic(network: Quadratic, x, t):
    return -(network.a * x + x**3 + t.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("keepdim", [False, True])
def test_energy_score_is_the_analytic_one_in_every_grad_mode(mode, keepdim: bool) -> None:
    network = Quadratic(keepdim)
    model = ScoreModel(EnergyModel(network), kind="ncsn", time_scale=2.0)
    with mode():
        x, t = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
        score = model(x, t)
        torch.testing.assert_close(score, analytic(network, x, 2 * t), rtol=1e-12, atol=1e-12)
    assert score.requires_grad == (mode is torch.enable_grad)
    assert network.a.grad is None


def test_energy_score_is_differentiable_for_images_and_for_training() -> None:
    network = Quadratic()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    t = torch.rand(2, dtype=torch.float64)
    weight = torch.randn_like(x)
    inputs = (x, network.a)
    got = torch.autograd.grad((weight * EnergyModel(network)(x, t)).sum(), inputs)
    want = torch.autograd.grad((weight * analytic(network, x, t)).sum(), inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    # DSM training: x is data, the parameters want the second derivative.
    EnergyModel(network)(x.detach(), t).square().sum().backward()
    assert network.a.grad is not None


def test_energy_of_a_convolutional_network_is_its_numerical_gradient() -> None:
    classifier = TinyClassifier(classes=1).double()
    model = EnergyModel(lambda x, t: classifier(x))
    x = images(2, dtype=torch.float64)
    score = model(x, torch.zeros(2))
    direction = torch.randn_like(x)
    h = 1e-6
    change = classifier(x + h * direction) - classifier(x - h * direction)
    slope = -(score * direction).flatten(1).sum(1, keepdim=True)
    torch.testing.assert_close(change / (2 * h), slope, rtol=1e-6, atol=1e-8)


def test_energy_networks_that_cannot_work_are_refused() -> None:
    x, t = torch.randn(4, 1, 2, 2), torch.zeros(4)
    for bad in (lambda x, t: x, lambda x, t: x.sum(), lambda x, t: x.flatten(1)):
        with pytest.raises(ValueError, match=r"energy .*\[4\].* got \["):
            EnergyModel(bad)(x, t)
    with pytest.raises(RuntimeError, match="no gradient"):
        EnergyModel(lambda x, t: x.detach().flatten(1).sum(1))(x, t)
