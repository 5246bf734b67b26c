"""Networks of other pixels than [-1, 1], against mixtures whose score is known in both ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

from coup_fast import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    Purifier,
    ScoreModel,
    VPSchedule,
)
from coup_fast.models import with_data_range
from coup_fast.models.analytic import GaussianMixture, MixtureNetwork

OTHER_VP = VPSchedule(0.2, 12.0)
CHAIN = DiscreteSchedule.cosine(1000)
MEAN, STD = (0.4, 0.5, 0.45), 0.22
RANGES = [
    (-0.5, 0.5),
    (0.0, 1.0),
    (tuple((0 - m) / STD for m in MEAN), tuple((1 - m) / STD for m in MEAN)),
]


def mixture(low=-1.0, high=1.0) -> GaussianMixture:
    """Two images with noise; in the pixels of the range."""
    generator = torch.Generator().manual_seed(3)
    u = 0.4 * torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    lows, highs = (torch.as_tensor(b, dtype=torch.float64).reshape(-1, 1, 1) for b in (low, high))
    scale = (highs - lows) / 2
    stds = (0.3 * scale).expand(3, 1, 1).expand(2, 3, 8, 8)
    return GaussianMixture(scale * u + (lows + highs) / 2, stds)


class Denoiser(nn.Module):
    """E[image | y] of a mixture at y = image + σ noise."""

    def __init__(self, known: GaussianMixture) -> None:
        super().__init__()
        self.network = MixtureNetwork(known, "x0", OTHER_VP)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        alpha_bar = 1 / (1 + sigma.double() ** 2)
        slope = OTHER_VP.beta_max - OTHER_VP.beta_min
        lost = -alpha_bar.log()
        root = (OTHER_VP.beta_min**2 + 2 * slope * lost).sqrt()
        time = 2 * lost / (OTHER_VP.beta_min + root)
        return self.network(alpha_bar.sqrt().reshape(-1, 1, 1, 1) * y, time)


@pytest.mark.parametrize("bounds", RANGES, ids=["half", "pixels", "standardised"])
@pytest.mark.parametrize("kind", ["eps", "score", "x0", "sigma"])
@pytest.mark.parametrize("schedule", [VPSchedule(), OTHER_VP], ids=["same", "other"])
def test_a_network_of_other_pixels_is_the_exact_network(bounds, kind: str, schedule) -> None:
    known = mixture(*bounds)
    if kind == "sigma":
        theirs = ScoreModel(Denoiser(known), "x0", EDMSchedule(80.0), time_scale=80.0)
    else:
        network = MixtureNetwork(known, kind, schedule)
        theirs = ScoreModel(network, kind, schedule, time_scale=1.0)
    ours = with_data_range(theirs, *bounds)
    assert ours.schedule == VPSchedule()
    wanted = MixtureNetwork(mixture(), ours.kind, VPSchedule())
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.002, 0.05, 0.1, 0.3], dtype=torch.float64)
    torch.testing.assert_close(ours(x, t), wanted(x, t), rtol=1e-9, atol=1e-9)


class Velocity(nn.Module):
    """dx_t/dt of x_t = a x₀ + b z, from E[x₀ | x_t] of a mixture; t [B] is the path's time."""

    def __init__(self, known: GaussianMixture, schedule: FlowSchedule) -> None:
        super().__init__()
        self.denoised = Denoiser(known)
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        progress = (t if self.schedule.data_at == 1 else 1 - t).reshape(-1, 1, 1, 1)
        sign = 1 if self.schedule.data_at == 1 else -1
        if self.schedule.source == "noise":
            image = self.denoised(x / progress, (1 / progress - 1).flatten())
            return sign * (image - (x - progress * image) / (1 - progress))
        sigma = self.schedule.noise_std * (1 - progress)
        return sign * (self.denoised(x, sigma.flatten()) - x) / (1 - progress)


PATHS = [
    FlowSchedule(),
    FlowSchedule(data_at=0),
    FlowSchedule("noised", noise_std=4.0),
    FlowSchedule("noised", data_at=0, noise_std=4.0),
]


@pytest.mark.parametrize("bounds", RANGES, ids=["half", "pixels", "standardised"])
@pytest.mark.parametrize("schedule", [*PATHS, OTHER_VP], ids=str)
def test_velocities_of_other_pixels_are_exact(bounds, schedule) -> None:
    known = mixture(*bounds)
    if isinstance(schedule, FlowSchedule):
        theirs = ScoreModel(Velocity(known, schedule), "velocity", schedule)
    else:
        noise = MixtureNetwork(known, "eps", schedule)

        def v(x: Tensor, t: Tensor) -> Tensor:
            signal = torch.from_numpy(schedule.alpha_bar(t.numpy())).sqrt().reshape(-1, 1, 1, 1)
            sigma, z = (1 - signal**2).sqrt(), noise(x, t)
            return signal * z - sigma * (x - sigma * z) / signal

        theirs = ScoreModel(v, "v", schedule, time_scale=1.0)
    ours = with_data_range(theirs, *bounds)
    assert (ours.kind, ours.schedule) == ("eps", VPSchedule())
    wanted = MixtureNetwork(mixture(), "eps", VPSchedule())
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.002, 0.05, 0.1, 0.3], dtype=torch.float64)
    torch.testing.assert_close(ours(x, t), wanted(x, t), rtol=1e-9, atol=1e-9)


def test_a_chain_of_v_is_read_at_the_index_that_it_is_told() -> None:
    """Below its first level it is told index 0, and v counts as one of that level, as in plans."""

    def v(x: Tensor, t: Tensor) -> Tensor:
        level = torch.from_numpy(CHAIN.alpha_bar(t.numpy())).reshape(-1, 1, 1, 1)
        z = torch.ones_like(x)
        return level.sqrt() * z - (1 - level).sqrt() * (x - (1 - level).sqrt() * z) / level.sqrt()

    ours = with_data_range(ScoreModel(v, "v", CHAIN, time_scale=1000), -1.0, 1.0)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([1e-5, 0.03, 0.1], dtype=torch.float64)
    torch.testing.assert_close(ours(x, t), torch.ones_like(x), rtol=1e-9, atol=1e-9)


def test_a_network_keeps_its_mode() -> None:
    """One in eval mode was put into training mode: dropout and batch norm changed its numbers."""
    network = TinyNetwork().eval()
    assert not with_data_range(ScoreModel(network), 0, 1).training
    assert not any(part.training for part in network.modules())
    assert with_data_range(ScoreModel(network.train()), 0, 1).training


def test_bounds_are_arrays_too_and_say_how_many_channels_there_are() -> None:
    low, high = np.array([-1.0, -1.1, -1.2]), torch.tensor([1.0, 0.9, 0.8]).reshape(3, 1, 1)
    ours = with_data_range(ScoreModel(lambda x, t: x), low, high)
    with pytest.raises(ValueError, match=r"takes images of 3 channels, got 1"):
        Purifier(ours, method="diffpure", num_steps=1)(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("bounds", RANGES[::2], ids=["half", "standardised"])
def test_a_chain_is_asked_between_its_indices(bounds) -> None:
    """A cosine chain, which is told the index; between two of them log ᾱ is linear."""
    asked = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        level = torch.from_numpy(CHAIN.alpha_bar(t.numpy())).reshape(-1, 1, 1, 1)
        s = (known.stds[0, 0, 0, 0] ** 2 * level + 1 - level).sqrt()
        return (1 - level).sqrt() * (x - level.sqrt() * known.means[:1]) / s**2

    known, plain = mixture(*bounds), mixture()
    theirs = ScoreModel(network, "eps", CHAIN, time_scale=1000)
    ours = with_data_range(theirs, *bounds)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.03, 0.05, 0.1], dtype=torch.float64)
    level = torch.from_numpy(VPSchedule().alpha_bar(t.numpy())).reshape(-1, 1, 1, 1)
    spread = 0.3**2 * level + 1 - level
    wanted = (1 - level).sqrt() * (x - level.sqrt() * plain.means[:1]) / spread
    torch.testing.assert_close(ours(x, t), wanted, rtol=1e-9, atol=1e-9)
    assert (asked[0] % 1 != 0).any()


def test_chains_that_are_not_linear_run_every_method_so() -> None:
    theirs = ScoreModel(TinyNetwork(), "v", CHAIN)
    with pytest.raises(ValueError, match=r"not linear.*with_data_range\(score_model, -1, 1\)"):
        Purifier(theirs, method="diffpure")
    clean = Purifier(with_data_range(theirs, -1, 1), method="diffpure", num_steps=2)
    assert clean(images(2)).isfinite().all()


@pytest.mark.parametrize("double", [True, False])
def test_whole_runs_and_gradients_agree(double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    known, plain = mixture(-0.5, 0.5).to(dtype), mixture().to(dtype)
    classifier = TinyClassifier().to(dtype)
    theirs = ScoreModel(MixtureNetwork(known, "x0", OTHER_VP), "x0", OTHER_VP, time_scale=1.0)
    ours = with_data_range(theirs, -0.5, 0.5)
    wanted = ScoreModel(MixtureNetwork(plain, "x0", VPSchedule()), "x0", time_scale=1.0)
    found = []
    for model in (ours, wanted):
        clean = Purifier(model, classifier, method="coup", num_steps=4)
        leaf = images(dtype=dtype).requires_grad_()
        out = clean(leaf)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    tolerance = 1e-9 if double else 2e-4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_wider_range_ends_at_an_earlier_time() -> None:
    """Pixels with a = 2 meet the network's last level at half the process's."""
    theirs = ScoreModel(TinyNetwork(), t_max=0.2)
    ours = with_data_range(theirs, -2.0, 2.0)
    level = VPSchedule().alpha_bar(ours.t_max)
    last = VPSchedule().alpha_bar(0.2)
    assert 2 * (1 / level - 1) ** 0.5 == pytest.approx((1 / last - 1) ** 0.5, rel=1e-9)
    with pytest.raises(ValueError, match=r"t = 0\.2.*\(t_max\)"):
        Purifier(ours, method="diffpure", t_star=0.2)
    assert with_data_range(ScoreModel(TinyNetwork()), -1, 1).t_max == pytest.approx(1.0)


def test_variance_channels_are_left_out() -> None:
    theirs = ScoreModel(TinyNetwork(out=6))
    assert with_data_range(theirs, 0, 1)(images(2), torch.full((2,), 0.1)).shape == (2, 3, 8, 8)


def test_bad_arguments_are_named() -> None:
    model = ScoreModel(TinyNetwork())
    with pytest.raises(TypeError, match=r"score_model .*got TinyNetwork"):
        with_data_range(TinyNetwork(), 0, 1)
    with pytest.raises(ValueError, match=r"kind .*v, velocity, got 'ncsn'"):
        with_data_range(ScoreModel(TinyNetwork(), "ncsn"), 0, 1)
    with pytest.raises(ValueError, match=r"low and high .*low < high.* got 1 and 0"):
        with_data_range(model, 1, 0)
    with pytest.raises(ValueError, match="the same for every channel"):
        with_data_range(model, [0.0, 0.0, 0.0], [1.0, 1.0, 1.1])
    with pytest.raises(ValueError, match="equally many"):
        with_data_range(model, [0.0, 0.0, 0.0], 1)
    with pytest.raises(TypeError, match="low must be numbers, one per channel, got 'a'"):
        with_data_range(model, "a", 1)
    chain = ScoreModel(
        TinyNetwork(), schedule=DiscreteSchedule(), time_scale=1000, time_dtype=torch.int64
    )
    with pytest.raises(ValueError, match=r"FlowSchedule\(source='attacked'\) has none"):
        with_data_range(ScoreModel(TinyNetwork(), "velocity", FlowSchedule("attacked")), 0, 1)
    with pytest.raises(ValueError, match=r"time_dtype=torch\.int64"):
        with_data_range(chain, 0, 1)
