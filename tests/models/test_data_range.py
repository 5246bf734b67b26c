"""Networks of other pixels than [-1, 1], against mixtures whose score is known in both ranges."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

from coup_fast import DiscreteSchedule, EDMSchedule, Purifier, ScoreModel, VPSchedule
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
    with pytest.raises(ValueError, match=r"kind .*eps, score, x0, got 'ncsn'"):
        with_data_range(ScoreModel(TinyNetwork(), "ncsn"), 0, 1)
    with pytest.raises(ValueError, match=r"low and high .*low < high.* got 1 and 0"):
        with_data_range(model, 1, 0)
    with pytest.raises(ValueError, match="the same for every channel"):
        with_data_range(model, [0.0, 0.0, 0.0], [1.0, 1.0, 1.1])
    with pytest.raises(ValueError, match="equally many"):
        with_data_range(model, [0.0, 0.0, 0.0], 1)
    with pytest.raises(TypeError, match="low must be a finite number, got 'a'"):
        with_data_range(model, "a", 1)
    chain = ScoreModel(
        TinyNetwork(), schedule=DiscreteSchedule(), time_scale=1000, time_dtype=torch.int64
    )
    with pytest.raises(ValueError, match=r"time_dtype=torch\.int64"):
        with_data_range(chain, 0, 1)
