"""Smooth perturbations: against SciPy's cosine transform, and a defence that only they fool."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor, nn

from coup_fast.attacks import APGD, PGD, preset
from coup_fast.attacks.ball import Ball
from coup_fast.attacks.low_frequency import LowFrequencyBall, low_pass
from coup_fast.evaluation.config import from_dict


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 12), (3, 2, 1, 5), (0, 1, 4, 4)])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.6, 1.0])
def test_it_keeps_the_first_coefficients_of_the_cosine_transform(shape, share: float) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    if values.numel() == 0:
        assert low_pass(values, share).shape == shape
        return
    spectrum = dctn(values.numpy(), axes=(2, 3), norm="ortho")
    rows, columns = math.ceil(share * shape[2]), math.ceil(share * shape[3])
    spectrum[:, :, rows:] = 0
    spectrum[:, :, :, columns:] = 0
    smooth = torch.from_numpy(idctn(spectrum, axes=(2, 3), norm="ortho"))
    assert torch.allclose(low_pass(values, share), smooth, atol=1e-12)
    assert torch.allclose(low_pass(smooth, share), smooth, atol=1e-12)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    values = torch.randn(5, 3, 28, 28)
    together = low_pass(values, 0.3)
    for rows in ([0], [4, 2], [1, 3, 0]):
        assert torch.equal(low_pass(values[rows], 0.3), together[rows])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_smooth_ball_is_inside_the_ball(norm: str) -> None:
    centre, ids = torch.rand(4, 1, 8, 8), torch.arange(4)
    smooth, whole = LowFrequencyBall(centre, norm, 0.3, 0.4), Ball(centre, norm, 0.3)
    for images in (smooth.random(0, ids, 1), smooth.project(torch.rand(4, 1, 8, 8))):
        whole.check(images)
        assert float((images - centre).abs().max()) > 0.01
    all_of_it = LowFrequencyBall(centre, norm, 0.3, 1.0)
    points, gradient = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    assert torch.equal(all_of_it.project(points), whole.project(points))
    assert torch.equal(all_of_it.ascent(gradient), whole.ascent(gradient))


# --- the planted case

SIZE, EPS = 16, 0.1


def wave(vertical: int, horizontal: int) -> Tensor:
    """A cosine of these frequencies, with norm 1."""
    place = (torch.arange(SIZE, dtype=torch.float64) + 0.5) * math.pi / SIZE
    values = torch.cos(vertical * place)[:, None] * torch.cos(horizontal * place)
    return values / values.norm()


class Shattered(nn.Module):
    """A random defence whose answer goes by one slow wave, and whose gradient by fast ones.

    Each draw adds a small term that oscillates quickly along its own sum of fast waves. It never
    changes an answer by itself, and its gradient is a hundred times that of the slow wave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slow", wave(1, 2))
        self.register_buffer("fast", torch.stack([wave(8 + i, 15 - i) for i in range(8)]))

    def set_draw(self, draw: int, sample_ids: Tensor) -> None:
        rows = [
            torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in ((sample_ids * 1_000_003 + draw) % 2**31).tolist()
        ]
        self.mine = torch.einsum("bk,khw->bhw", torch.stack(rows), self.fast)

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0] - 0.5
        slow = (x * self.slow).sum((1, 2))
        shaken = 0.3 * torch.sin(400 * (x * self.mine).sum((1, 2)))
        loss = -1 + 2 * slow + shaken
        return torch.stack((-loss, 0 * loss), 1)


GREY = torch.full((6, 1, SIZE, SIZE), 0.5, dtype=torch.float64)
ZEROS = torch.zeros(6, dtype=torch.int64)


def accuracy(images: Tensor) -> float:
    defence, right = Shattered(), []
    for draw in range(20):
        defence.set_draw(draw, torch.arange(6))
        right.append(defence(images).argmax(1) == 0)
    return torch.stack(right).double().mean().item()


@pytest.mark.parametrize(
    "plain",
    [
        PGD(eps=EPS, steps=10, step_size=0.02, eot=4, loss="margin"),
        PGD(norm="l2", eps=1.6, steps=10, step_size=0.4, eot=4, loss="margin"),
        APGD(eps=EPS, steps=10, eot=4, loss="margin", keep="last"),
    ],
    ids=["linf", "l2", "apgd"],
)
def test_smooth_steps_fool_a_defence_whose_gradient_is_noise(plain: PGD) -> None:
    smooth = plain.replace(low_frequency=0.25)
    assert smooth.name.startswith(f"{type(plain).__name__}-10 margin low-frequency, ")
    without, found = (attack.run(Shattered(), GREY, ZEROS) for attack in (plain, smooth))
    assert without.gradient_runs == found.gradient_runs
    assert accuracy(GREY) == 1
    assert accuracy(without.images) > 0.95
    assert accuracy(found.images) < 0.05


def test_the_perturbation_is_smooth() -> None:
    attack = PGD(norm="l2", eps=1.6, steps=4, step_size=0.4, eot=2, low_frequency=0.25)
    change = attack(Shattered(), GREY, ZEROS) - GREY
    assert torch.allclose(change, low_pass(change, 0.25), atol=1e-12)
    linf = preset("pgd-low-frequency", eps=EPS, steps=4, step_size=0.03, eot=2)
    shares = []
    for attack in (linf, linf.replace(low_frequency=1.0)):
        change = attack(Shattered(), GREY, ZEROS) - GREY
        shares.append(float(low_pass(change, 0.25).square().sum() / change.square().sum()))
    assert shares[0] > 0.95  # what clamping cuts off is the rest
    assert shares[1] < 0.5


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (0, ValueError, r"low_frequency .*\(0, 1\].* 0"),
        (8, ValueError, r"low_frequency .*\(0, 1\].* 8"),
        ("low", TypeError, "low_frequency .*'low'"),
    ],
)
def test_wrong_values_are_refused(share, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(low_frequency=share)
    tables = {"attack": [{"preset": "pgd40", "low_frequency": share}]}
    with pytest.raises(error, match=message):
        from_dict({"defence": [{"method": "coup"}], **tables})
