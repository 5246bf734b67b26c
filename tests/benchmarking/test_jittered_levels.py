"""benchmarks/jittered_levels.py: its target, and files that score_networks.py judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scripts import load_script
from torch import Tensor, nn

from coup_fast.data import Labelled
from coup_fast.models import UNet, save_network
from coup_fast.training.data import TrainingData
from coup_fast.training.dsm import VPNoise, vp_loss


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("benchmarks/jittered_levels.py")


class Oracle(nn.Module):
    """The noise that gives back black images under the label."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = VPNoise().alpha_bar(t / 999.0).float().view(-1, 1, 1, 1)
        return (x + alpha_bar.sqrt()) / (1.0 - alpha_bar).sqrt()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_target_gives_back_the_image_under_the_label(script: Any, share: float) -> None:
    images, labels = torch.zeros(64, 1, 8, 8), torch.zeros(64)
    noise = VPNoise(t_min=0.05)
    arguments = (images, labels, generator())
    assert script.jittered_error(Oracle(), *arguments, noise=noise, share=share) < 1e-6
    silent = nn.Module()
    silent.forward = lambda x, t: torch.zeros_like(x)  # type: ignore[method-assign]
    power = script.jittered_error(silent, images, labels, generator(), noise=noise, share=share)
    usual = vp_loss(silent, images, generator(), noise)  # of standard normals
    assert (power < 0.9 * usual) == (share > 0)


def test_a_run_goes_on_and_writes_a_network(
    script: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (128, 3, 8, 8), dtype=torch.uint8)
    found = Labelled(images, torch.arange(128) % 10)
    monkeypatch.setattr(script, "load_data", lambda *_: TrainingData(found, found, "validation"))
    save_network(tmp_path / "init.safetensors", UNet(3, [4]), {"kind": "eps"})
    data = ["--data", "unused", "--init", str(tmp_path / "init.safetensors")]
    out = ["--steps", "2", "--out", str(tmp_path / "share.safetensors")]
    assert script.main([*data, *out, "--share", "0.5"]) == 0
    judge = load_script("benchmarks/score_networks.py")
    _, *facts = judge.load(str(tmp_path / "share.safetensors"), "eps")
    assert facts == [0.2, "128 images"]
    capsys.readouterr()
    assert script.main([*data, *out, "--share", "0.5"]) == 0
    assert "all 2 steps were finished before" in capsys.readouterr().err
    for words, message in (
        (["--share", "0"], "another run: share (0.5, now 0.0)"),
        (["--share", "2"], "--share must be a number in [0, 1], got 2"),
    ):
        assert script.main([*data, *out, *words]) == 2
        assert message in capsys.readouterr().err
    save_network(tmp_path / "init.safetensors", UNet(3, [4]), {"kind": "ncsn"})
    assert script.main([*data, *out, "--share", "0.5"]) == 2
    assert "holds kind 'ncsn', not 'eps'" in capsys.readouterr().err
