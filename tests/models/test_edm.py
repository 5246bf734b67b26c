"""Denoisers of EDM: names, shapes, outputs, preconditioning, files.

Outputs are compared with numbers that the released code gave for the same weights.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import TinyClassifier
from torch import Tensor, nn

import coup_fast
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.edm import CONFIGS, EDMConfig, EDMDenoiser, load_edm
from coup_fast.models.edm_network import EDMNetwork, EDMNetworkConfig
from coup_fast.schedules import EDMSchedule, VPSchedule

TINY = EDMNetworkConfig(
    image_size=8, channels=8, channel_mult=(1, 2), num_blocks=1, attention_sizes=(4,)
)


def filled(network: EDMNetwork) -> EDMNetwork:
    """Weights that any program can make again: tensor n by name holds 0.6 sin(1.7 i + n)."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(network.state_dict().items())):
            if not name.endswith("resample_filter"):
                index = torch.arange(tensor.numel(), dtype=torch.float64)
                tensor.copy_((0.6 * torch.sin(1.7 * index + number)).reshape(tensor.shape))
    return network.eval()


def saved(tmp_path: Path, config: EDMNetworkConfig = TINY) -> Path:
    """A state dict of the released object, which holds the network as `model`."""
    state = filled(EDMNetwork(config)).state_dict()
    path = tmp_path / "edm.pt"
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "conditions", "entries", "parameters"),
    [
        ("edm-cifar10-32x32-uncond-vp", {"augment_dim": 9}, 425, 55_733_891),
        ("edm-cifar10-32x32-cond-ve", {"augment_dim": 9, "label_dim": 10}, 434, 56_400_643),
        ("baseline-cifar10-32x32-uncond-vp", {}, 552, 61_804_419),
        ("baseline-cifar10-32x32-uncond-ve", {}, 562, 62_758_787),
        ("edm-imagenet-64x64-cond-adm", {"label_dim": 1000}, 553, 295_899_267),
    ],
)
def test_networks_have_the_released_size(
    name: str, conditions: dict[str, int], entries: int, parameters: int
) -> None:
    with torch.device("meta"):
        network = EDMNetwork(replace(CONFIGS[name].network, **conditions))
    assert len(network.state_dict()) == entries
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_modules_have_the_released_names() -> None:
    with torch.device("meta"):
        network = EDMNetwork(replace(CONFIGS["edm-cifar10-32x32-uncond-vp"].network, augment_dim=9))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["map_augment.weight"] == (128, 9)
    assert shapes["enc.32x32_conv.weight"] == (128, 3, 3, 3)
    assert shapes["enc.16x16_down.conv0.resample_filter"] == (1, 1, 2, 2)
    assert shapes["enc.16x16_block0.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["enc.32x32_block0.skip.bias"] == (256,)
    assert shapes["dec.8x8_in0.proj.bias"] == (256,)
    assert "dec.16x16_block3.qkv.weight" not in shapes
    assert shapes["dec.16x16_block4.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)


@pytest.mark.parametrize(
    ("config", "preconditioning", "expected"),
    [
        (
            TINY,
            "edm",
            [-0.006147, -0.694135, -0.984836, -0.665908, 0.126642, 0.08088, 0.098818, 0.309537],
        ),
        (
            replace(TINY, architecture="ncsnpp", label_dim=10, augment_dim=9),
            "edm",
            [0.059786, -0.634577, -1.047125, -0.636323, 0.497245, 0.630515, -0.439914, 0.899032],
        ),
        (
            TINY,
            "vp",
            [-0.000402, -0.708146, -1.00621, -0.749326, -0.780987, 0.324857, 0.575933, -1.055026],
        ),
        (
            replace(TINY, architecture="ncsnpp"),
            "ve",
            [0.079732, -0.610662, -1.080623, -0.627272, 3.226997, 4.796009, -2.391753, 8.04827],
        ),
        (
            replace(TINY, architecture="adm", channels=64, label_dim=5),
            "edm",
            [0.121944, -0.59758, -0.994935, -0.540405, 0.221984, -0.148953, 1.198202, -0.248015],
        ),
    ],
    ids=["ddpmpp-edm", "ncsnpp-edm", "ddpmpp-vp", "ncsnpp-ve", "adm-edm"],
)
def test_outputs_are_those_of_the_released_code(
    config: EDMNetworkConfig, preconditioning: str, expected: list[float]
) -> None:
    denoiser = EDMDenoiser(filled(EDMNetwork(config)), preconditioning)
    x = torch.sin(0.9 * torch.arange(2 * 3 * 8 * 8, dtype=torch.float64))
    with torch.no_grad():
        out = denoiser(x.reshape(2, 3, 8, 8).float(), torch.tensor([0.05, 3.0]))
    torch.testing.assert_close(out.flatten()[::48], torch.tensor(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("schedule", [None, VPSchedule(0.2, 10.0), EDMSchedule(40.0)])
def test_a_state_dict_gives_its_denoiser(tmp_path: Path, schedule: Any) -> None:
    config = replace(TINY, label_dim=10, augment_dim=9)
    path = saved(tmp_path, config)
    model = load_edm(path, EDMConfig(TINY), schedule=schedule)
    assert model.kind == "x0"
    assert model.schedule == (schedule or VPSchedule())
    assert model.in_channels == 3
    assert not model.training
    denoiser = model.network if isinstance(schedule, EDMSchedule) else model.network.network
    written = torch.load(path, weights_only=True)
    for name, tensor in denoiser.network.state_dict().items():
        assert torch.equal(tensor, written[f"model.{name}"]), name
    # The network is asked at the level of its input: σ = t σ_max, or σ/√ᾱ of the VP process.
    told: list[Tensor] = []
    denoiser.register_forward_pre_hook(lambda module, inputs: told.extend(inputs))
    model(torch.ones(1, 3, 8, 8), torch.tensor([0.1]))
    if isinstance(schedule, EDMSchedule):
        assert told[1].tolist() == pytest.approx([4.0])
    else:
        signal = math.sqrt(float(model.schedule.alpha_bar(0.1)))
        assert told[0].flatten()[0].item() == pytest.approx(1 / signal)
        assert told[1].tolist() == pytest.approx([math.sqrt(1 - signal**2) / signal])


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(saved(tmp_path), weights_only=True)
    save_file(state, tmp_path / "edm.safetensors")
    model = load_edm(tmp_path / "edm.safetensors", EDMConfig(TINY))
    first = model.network.network.network.map_layer0.weight
    assert torch.equal(first, state["model.map_layer0.weight"])


def test_a_pickle_is_not_opened_but_explained(tmp_path: Path) -> None:
    path = tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    path.write_bytes(pickle.dumps({"ema": None}))
    line = r"'.*edm-cifar10-32x32-uncond-vp.pkl', 'rb'\)\)\['ema'\].state_dict\(\), '.*-vp.pt'\)"
    with pytest.raises(ValueError, match=f"pickle.*open.{line}"):
        load_edm(path)


def test_files_that_do_not_fit_say_what_was_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"config .*edm-cifar10.* 'edm'"):
        load_edm(path, "edm")
    with pytest.raises(ValueError, match=r"EDMNetwork: 146 .* 150 "):
        load_edm(path, EDMConfig(replace(TINY, architecture="ncsnpp")))
    torch.save({**state, "model.u": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="1 unexpected: u"):
        load_edm(path, EDMConfig(TINY))
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"edm\.pt .*a list of 1 entries \(int 1\)"):
        load_edm(path, EDMConfig(TINY))
    with pytest.raises(ValueError, match=r"architecture .*'unet'"):
        EDMNetworkConfig(architecture="unet")
    with pytest.raises(ValueError, match=r"preconditioning .*'iddpm'"):
        EDMDenoiser(nn.Identity(), "iddpm")
    with pytest.raises(ValueError, match=r"divisible by 2, got \(1, 3, 7, 8\)"):
        EDMNetwork(TINY)(torch.zeros(1, 3, 7, 8), torch.zeros(1))


@pytest.mark.parametrize("preconditioning", ["edm", "vp", "ve"])
def test_preconditioning_of_exact_networks_is_exact(preconditioning: str) -> None:
    """For images N(0, s²) the best F is linear; around it D must be s²/(s² + σ²) y."""
    spread = 0.4
    sigma = torch.tensor([0.01, 0.3, 4.0, 60.0], dtype=torch.float64)

    class Exact(nn.Module):
        def forward(self, x: Tensor, noise: Tensor) -> Tensor:
            if preconditioning == "edm":
                assert torch.allclose(noise, sigma.log() / 4)
                total = torch.sqrt(sigma**2 + 0.25)
                gain = (spread**2 / (spread**2 + sigma**2) - 0.25 / total**2) * 2 * total / sigma
                return (gain * total).reshape(-1, 1, 1, 1) * x
            if preconditioning == "vp":
                alpha_bar = torch.exp(-9.95 * (noise / 999) ** 2 - 0.1 * noise / 999)
                assert torch.allclose((1 - alpha_bar) / alpha_bar, sigma**2)
                std = (1 - alpha_bar).sqrt()
                gain = std / (alpha_bar * spread**2 + std**2)  # E[z | x] / x
                return gain.reshape(-1, 1, 1, 1) * x
            assert torch.allclose(noise, (sigma / 2).log())
            return (-sigma / (spread**2 + sigma**2)).reshape(-1, 1, 1, 1) * x

    y = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    gain = spread**2 / (spread**2 + sigma**2)
    denoised = EDMDenoiser(Exact(), preconditioning)(y, sigma)
    torch.testing.assert_close(denoised, gain.reshape(-1, 1, 1, 1) * y)


def test_a_denoiser_at_vp_times_purifies_as_the_exact_noise_network() -> None:
    """COUP's chain with the best denoiser of N(0, s²) equals the one with the exact ε."""
    spread = 0.4

    class Denoiser(nn.Module):
        def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
            return (spread**2 / (spread**2 + sigma**2)).reshape(-1, 1, 1, 1) * y

    class Noise(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            alpha_bar = torch.exp(-9.95 * t**2 - 0.1 * t)
            gain = (1 - alpha_bar).sqrt() / (alpha_bar * spread**2 + 1 - alpha_bar)
            return gain.reshape(-1, 1, 1, 1) * x

    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    results = [
        coup_fast.purify(
            images,
            coup_fast.ScoreModel(network, kind, VPSchedule(), time_scale=1.0),
            TinyClassifier().double(),
            method="coup",
        )
        for network, kind in ((AtVPTimes(Denoiser()), "x0"), (Noise(), "eps"))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_loaded_denoisers_purify(tmp_path: Path) -> None:
    path = saved(tmp_path)
    images = torch.rand(2, 3, 8, 8)
    vp = load_edm(path, EDMConfig(TINY))
    edm = load_edm(path, EDMConfig(TINY), schedule=EDMSchedule())
    guided = coup_fast.purify(images, vp, TinyClassifier(), method="coup", num_steps=3)
    assert torch.isfinite(guided).all()
    # One-shot denoising is the same thing at VP times and at σ: equal noise, equal results.
    one = coup_fast.purify(images, vp, method="one-shot", sigma=0.2)
    other = coup_fast.purify(images, edm, method="one-shot", sigma=0.2)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
