"""The self-test of gradients on models that are not ours, some of which lie about theirs."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from coup_fast import check_gradient


class Diffusion(nn.Module):
    """Somebody's purifier: noise, two steps of a network, a classifier; and how it is wrong."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.network, self.classifier = tiny.TinyNetwork(), tiny.TinyClassifier()
        self.fault = fault
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, u: Tensor) -> Tensor:
        generator = self.generator if self.fault == "generator" else None
        x = u + 0.1 * torch.randn(u.shape, generator=generator, dtype=u.dtype)
        for k in range(2):
            out = self.network(x, torch.tensor([100.0 * k]))
            x = x - 0.3 * (out.detach() if self.fault == "cut" else out)
        if self.fault == "bpda":
            x = u + (x - u).detach()
        if self.fault == "short":
            x = 0.8 * x + 0.2 * x.detach()
        return self.classifier(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_right_gradient_passes(dtype: torch.dtype) -> None:
    model = Diffusion().to(dtype)
    check = check_gradient(model, tiny.images(2, dtype=dtype), draw=3)
    assert check.passed, str(check)
    assert check.repeats
    assert check["finite differences"].relative_error < 0.02
    assert check["along the gradient"].cosine > 0.9999
    assert "agrees with finite differences" in str(check)
    assert "noise driven by torch's global generator" in str(check)


@pytest.mark.parametrize(("fault", "least"), [("cut", 0.1), ("bpda", 0.1), ("short", 0.19)])
def test_a_wrong_gradient_is_found_with_its_error(fault: str, least: float) -> None:
    images, labels = tiny.images(2), torch.tensor([1, 2])
    wrong, right = Diffusion(fault), Diffusion()
    check = check_gradient(wrong, images, labels, directions=32, reference=right)
    assert not check.passed
    assert "IS NOT that of the values" in str(check)
    if fault == "short":
        assert check["finite differences"].relative_error == pytest.approx(0.2, abs=0.02)
        assert check["reference"].relative_error == pytest.approx(0.2, abs=0.01)
    # Random directions estimate the very error that a right gradient shows.
    estimate, error = (check[n].relative_error for n in ("finite differences", "reference"))
    assert error > least
    assert error / 2 < estimate < 2 * error
    assert check_gradient(right, images, labels, reference=Diffusion()).passed


def test_noise_that_cannot_be_repeated_is_not_judged() -> None:
    check = check_gradient(Diffusion("generator"), tiny.images(2))
    assert not check.passed
    assert not check.repeats
    assert "COULD NOT BE CHECKED: the same draw gave other scores" in str(check)
    assert check["finite differences"].note.startswith("not run: ")


def test_values_too_coarse_for_differences_are_not_judged() -> None:
    classifier = tiny.TinyClassifier()

    def coarse(u: Tensor) -> Tensor:
        scores = classifier(u)
        return scores + ((scores * 50).round() / 50 - scores).detach()

    check = check_gradient(coarse, tiny.images(2))
    assert not check.passed
    assert "COULD NOT BE CHECKED" in str(check) or "IS NOT" in str(check)


@pytest.mark.parametrize("through", ["exact", "bpda"])
def test_a_defence_of_ours_inside_another_model(through: str) -> None:
    defended = tiny.defended("coup")
    defended.purifier = defended.purifier.with_options(gradient=through)
    model = nn.Sequential(nn.Identity(), defended)
    check = check_gradient(model, tiny.images(2), draw=5)
    assert check.seeding == "draws of coup_fast"
    assert check.passed == (through == "exact"), str(check)


def test_a_loss_that_does_not_change_is_said() -> None:
    check = check_gradient(lambda u: u.flatten(1)[:, :4] * 0, tiny.images(1))
    assert not check.passed
    assert "COULD NOT BE CHECKED: not run: the loss does not change" in check.verdict
    with pytest.raises(KeyError, match="'exact'; there are finite differences"):
        check["exact"]
    with pytest.raises(ValueError, match="images must hold at least one"):
        check_gradient(lambda u: u.flatten(1), tiny.images(2)[:0])
    with pytest.raises(ValueError, match=r"directions .* 0"):
        check_gradient(lambda u: u.flatten(1), tiny.images(1), directions=0)
