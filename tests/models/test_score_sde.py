"""Networks of score_sde: names, shapes, outputs, and files in the release's structure.

Outputs are compared with numbers that the released code gave for the same weights.
"""

from __future__ import annotations

import collections
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import TinyClassifier
from torch import Tensor, nn

import coup_fast
from coup_fast.models import score_sde
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.score_sde import CONFIGS, ScoreSDEConfig, load_score_sde
from coup_fast.models.score_sde_layers import FilteredDownConv, downsample, upsample
from coup_fast.models.score_sde_network import NCSNpp, NCSNppConfig
from coup_fast.schedules import VPSchedule

TINY: dict[str, Any] = {
    "image_size": 8,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_sizes": (4,),
}
NCSNPP: dict[str, Any] = {**TINY, "fir": True, "input_pyramid": "residual"}
EXPLODING: dict[str, Any] = {**NCSNPP, "pixels": True, "scale_by_sigma": True}
FOURIER: dict[str, Any] = {**EXPLODING, "embedding": "fourier"}
PYRAMIDS: dict[str, Any] = {**FOURIER, "input_pyramid": "skip", "output_pyramid": "skip"}
TINY_VP = ScoreSDEConfig("vp", True, NCSNppConfig(**TINY))


def filled(network: nn.Module) -> nn.Module:
    """Weights that any program can make again: tensor n holds 0.6 sin(1.7 i + n)."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(network.state_dict().items()):
            if name != "sigmas":
                index = torch.arange(tensor.numel(), dtype=torch.float64)
                tensor.copy_((0.6 * torch.sin(1.7 * index + number)).reshape(tensor.shape))
    return network.eval()


def checkpoint(config: ScoreSDEConfig, prefix: str = "module.") -> dict[str, Any]:
    """What the release's `save_checkpoint` writes: the EMA is twice the parameters here."""
    network = filled(NCSNpp(config.network))
    trained = [p for p in network.parameters() if p.requires_grad]
    moments = {n: {"step": 7, "exp_avg": torch.zeros_like(p)} for n, p in enumerate(trained)}
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(len(trained)))}
    return {
        "optimizer": {"state": moments, "param_groups": [group]},
        "model": collections.OrderedDict(
            (prefix + name, tensor) for name, tensor in network.state_dict().items()
        ),
        "ema": {
            "decay": 0.9999,
            "num_updates": 7,
            "shadow_params": [2 * p.detach() for p in trained],
        },
        "step": 7,
    }


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    path = tmp_path / "checkpoint_8.pth"
    torch.save(content, path, **options)
    return path


@functools.cache
def meta_network(name: str) -> NCSNpp:
    with torch.device("meta"):
        return NCSNpp(CONFIGS[name].network)


def test_the_network_of_diffpure_and_coup_has_the_released_names_and_size() -> None:
    network = meta_network("vp/cifar10_ddpmpp_deep_continuous")
    state = network.state_dict()
    assert len(state) == 957
    assert sum(p.numel() for p in network.parameters()) == 106_632_579
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["sigmas"] == (1000,)
    assert shapes["all_modules.0.weight"] == (512, 128)
    assert shapes["all_modules.1.weight"] == (512, 512)
    assert shapes["all_modules.2.weight"] == (128, 3, 3, 3)
    assert shapes["all_modules.3.Dense_0.weight"] == (128, 512)
    assert shapes["all_modules.11.Conv_2.weight"] == (128, 128, 1, 1)  # the first downsampling
    assert shapes["all_modules.12.Conv_2.bias"] == (256,)
    assert shapes["all_modules.13.NIN_3.W"] == (256, 256)
    last = len(network.all_modules) - 1
    assert shapes[f"all_modules.{last}.weight"] == (3, 128, 3, 3)
    assert shapes[f"all_modules.{last - 1}.weight"] == (128,)


@pytest.mark.parametrize(
    ("name", "entries", "parameters"),
    [
        ("vp/cifar10_ddpmpp_continuous", 565, 61_804_419),
        ("vp/cifar10_ncsnpp_continuous", 571, 62_693_251),
        ("ve/cifar10_ncsnpp_continuous", 572, 62_758_915),
        ("ve/ffhq_256_ncsnpp_continuous", 646, 65_574_549),
    ],
)
def test_sizes_of_other_released_networks(name: str, entries: int, parameters: int) -> None:
    network = meta_network(name)
    assert len(network.state_dict()) == entries
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "times", "expected"),
    [
        (
            TINY,
            [99.9, 700.0],
            [0.491378, -0.042758, -0.633644, 0.304505, 0.569884, -0.333229, -0.627466, 0.460618],
        ),
        (
            NCSNPP,
            [99.9, 700.0],
            [-0.963755, -0.722838, 0.797234, 0.179052, -0.362518, -0.891616, 0.475945, 0.161441],
        ),
        (
            FOURIER,
            [0.05, 7.0],
            [0.12798, -2.017107, 16.112663, -3.979755, -0.030424, 0.003458, 0.075379, -0.028689],
        ),
        (
            PYRAMIDS,
            [0.05, 7.0],
            [
                -8.538611,
                -13.136804,
                2.796612,
                -20.130667,
                -0.142421,
                -0.068869,
                0.153763,
                -0.111337,
            ],
        ),
        (
            EXPLODING,
            [300.0, 800.0],
            [-0.2867, -0.238175, 0.339215, -0.049659, -15.086514, -22.519822, 10.268959, -2.239131],
        ),
    ],
    ids=["ddpmpp", "ncsnpp", "ncsnpp-fourier", "ncsnpp-pyramids", "ncsnpp-levels"],
)
def test_outputs_are_those_of_the_released_code(
    config: dict[str, Any], times: list[float], expected: list[float]
) -> None:
    network = filled(NCSNpp(NCSNppConfig(**config)))
    x = torch.sin(0.9 * torch.arange(2 * 3 * 8 * 8, dtype=torch.float64))
    with torch.no_grad():
        out = network(x.reshape(2, 3, 8, 8).float(), torch.tensor(times))
    # Divided by σ the outputs grow, and so do float32's errors.
    bound = 2e-5 if config is TINY or config is NCSNPP else 3e-6 * float(out.abs().max())
    torch.testing.assert_close(out.flatten()[::48], torch.tensor(expected), rtol=1e-5, atol=bound)


def test_fir_resampling_is_zero_insertion_and_a_filter() -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    kernel = torch.outer(taps, taps)[None, None]

    def filtered(image: Tensor) -> Tensor:
        flat = image.reshape(-1, 1, *image.shape[2:])
        return nn.functional.conv2d(flat, kernel).reshape(*image.shape[:2], *_valid(image))

    def _valid(image: Tensor) -> tuple[int, int]:
        return image.shape[2] - 3, image.shape[3] - 3

    spread = torch.zeros(2, 3, 12, 8, dtype=torch.float64)
    spread[:, :, ::2, ::2] = x
    padded = nn.functional.pad(spread, (2, 1, 2, 1))
    torch.testing.assert_close(upsample(x, fir=True), 4 * filtered(padded))
    smooth = filtered(nn.functional.pad(x, (1, 1, 1, 1)))
    torch.testing.assert_close(downsample(x, fir=True), smooth[:, :, ::2, ::2])
    layer = FilteredDownConv(3, 5).double()
    smooth = filtered(nn.functional.pad(x, (2, 2, 2, 2)))
    conv = layer.Conv2d_0
    expected = nn.functional.conv2d(smooth, conv.weight, conv.bias)[:, :, ::2, ::2]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_gives_its_ema_or_its_parameters(
    tmp_path: Path, prefix: str, legacy: bool
) -> None:
    content = checkpoint(TINY_VP, prefix)
    path = saved(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    model = load_score_sde(path, TINY_VP)
    assert (model.kind, model.schedule, model.time_scale) == ("eps", VPSchedule(), 999.0)
    assert not model.training
    assert model.in_channels == 3
    for name, tensor in model.network.state_dict().items():
        original = content["model"][prefix + name].float()
        assert torch.equal(tensor, original if name == "sigmas" else 2 * original), name
    plain = load_score_sde(path, TINY_VP, ema=False)
    for name, tensor in plain.network.state_dict().items():
        assert torch.equal(tensor, content["model"][prefix + name].float()), name


def test_the_ema_skips_the_fixed_fourier_frequencies(tmp_path: Path) -> None:
    config = ScoreSDEConfig("ve", True, NCSNppConfig(**FOURIER))
    content = checkpoint(config)
    assert len(content["ema"]["shadow_params"]) == len(content["model"]) - 2
    network = load_score_sde(saved(tmp_path, content), config).network.network.network
    assert torch.equal(network.all_modules[0].W, content["model"]["module.all_modules.0.W"])
    first = content["model"]["module.all_modules.1.weight"]
    assert torch.equal(network.all_modules[1].weight, 2 * first)


def test_a_state_dict_alone_has_no_ema(tmp_path: Path) -> None:
    state = checkpoint(TINY_VP)["model"]
    path = saved(tmp_path, state)
    with pytest.raises(ValueError, match=r"EMA.*shadow_params.*ema=False"):
        load_score_sde(path, TINY_VP)
    model = load_score_sde(path, TINY_VP, ema=False)
    first = state["module.all_modules.0.weight"]
    assert torch.equal(model.network.all_modules[0].weight, first)


def test_files_that_do_not_fit_say_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(change: Any, match: str, config: ScoreSDEConfig | str = TINY_VP) -> None:
        content = checkpoint(TINY_VP)
        change(content)
        with pytest.raises(ValueError, match=match):
            load_score_sde(saved(tmp_path, content), config)

    wider = ScoreSDEConfig("vp", True, NCSNppConfig(**{**TINY, "channels": 16}))
    monkeypatch.setattr(score_sde, "CONFIGS", {"vp/wider": wider})
    averages = "shadow_params"
    refused(lambda c: c["ema"][averages].pop(), "EMA .* 153 .* 154 ")
    refused(
        lambda c: c["ema"][averages].reverse(),
        r"tensor 0 is \[3\], .*\[32, 8\] \(all_modules\.0\.weight\)",
    )
    refused(lambda c: c.pop("ema"), "EMA.*optimizer, model, step")
    refused(lambda c: c["ema"].pop(averages), r"ema .*\(decay, num_updates\)")
    refused(lambda c: c["model"].pop("module.sigmas"), "1 missing: sigmas")
    refused(lambda c: c["model"].update({"module.more": torch.ones(1)}), "1 unexpected: more")
    refused(lambda c: c["model"].update({"step": torch.ones(1)}), "154 missing|155 missing")
    refused(lambda c: c.update(model=[1, 2]), r"'model' of .* a list of 2 entries \(int 1, int 2\)")
    refused(lambda c: None, "NCSNpp.*of another shape.*no known", "vp/wider")
    refused(lambda c: None, "config .*vp/wider.* 'cifar10'", "cifar10")
    refused(lambda c: c.update(step=Path("x")), r"checkpoint_8\.pth cannot be read")
    monkeypatch.setattr(score_sde, "CONFIGS", {"vp/wider": wider, "vp/tiny": TINY_VP})
    refused(lambda c: None, "fits vp/tiny", "vp/wider")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_score_sde(tmp_path / "absent.pth", TINY_VP)


def test_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match=r"embedding .*positional, fourier.*'learned'"):
        NCSNppConfig(embedding="learned")
    with pytest.raises(ValueError, match=r"divisible by 2, got \(1, 3, 7, 8\)"):
        NCSNpp(NCSNppConfig(**TINY))(torch.zeros(1, 3, 7, 8), torch.zeros(1))


class GaussianScore(nn.Module):
    """The exact network for images N(0, spread²) in [-1, 1]: of pixels (ve) or of sub-VP."""

    def __init__(self, process: str, spread: float = 0.4) -> None:
        super().__init__()
        self.config = NCSNppConfig(sigma_min=1e-3)
        self.in_channels, self.process, self.spread = 3, process, spread

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.double().reshape(-1, 1, 1, 1)
        if self.process == "subvp":
            alpha_bar = torch.exp(-9.95 * (t / 999) ** 2 - 0.1 * t / 999)
            std = 1 - alpha_bar
            return std * x / (alpha_bar * self.spread**2 + std**2)
        if self.process == "ve-levels":
            t = 50 * (1e-3 / 50) ** (t / 999)
        return -(x - 0.5) / (0.25 * self.spread**2 + t**2)


@pytest.mark.parametrize("process", ["ve", "ve-levels", "subvp"])
def test_networks_of_other_processes_predict_the_vp_noise(process: str) -> None:
    schedule = VPSchedule()
    exact = GaussianScore(process)
    if process == "subvp":
        asked: nn.Module = score_sde.SubVPNoise(exact, schedule)  # type: ignore[arg-type]
    else:
        asked = score_sde.VENoise(exact, process == "ve")  # type: ignore[arg-type]
    model = coup_fast.ScoreModel(AtVPTimes(asked, schedule), "eps", schedule, time_scale=1.0)
    t = torch.tensor([0.004, 0.02, 0.1, 0.5, 0.9])
    alpha_bar = torch.from_numpy(schedule.alpha_bar(t.numpy())).reshape(-1, 1, 1, 1)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    expected = (1 - alpha_bar).sqrt() * x / (alpha_bar * 0.4**2 + 1 - alpha_bar)
    # Levels of a discrete network are 1.1 % apart.
    bound = 2e-2 if process == "ve-levels" else 1e-5
    torch.testing.assert_close(model(x, t.double()), expected, rtol=bound, atol=1e-5)


def test_a_ve_network_is_asked_for_levels_it_was_trained_on() -> None:
    told: list[Tensor] = []

    class Recorder(GaussianScore):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            told.append(t)
            return super().forward(x, t)

    asked = score_sde.VENoise(Recorder("ve"), continuous=True)  # type: ignore[arg-type]
    asked(torch.zeros(3, 3, 2, 2), torch.tensor([1e-6, 0.5, 1e4]))
    torch.testing.assert_close(told[0], torch.tensor([1e-3, 0.25, 50.0]))


@pytest.mark.parametrize(
    ("process", "continuous", "shape"),
    [
        ("vp", True, TINY),
        ("vp", False, NCSNPP),
        ("subvp", True, NCSNPP),
        ("ve", True, FOURIER),
        ("ve", False, EXPLODING),
    ],
)
def test_every_process_purifies(
    tmp_path: Path, process: str, continuous: bool, shape: dict[str, Any]
) -> None:
    config = ScoreSDEConfig(process, continuous, NCSNppConfig(**shape))
    model = load_score_sde(saved(tmp_path, checkpoint(config)), config, ema=False)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classifier = TinyClassifier()
    for method, options in (("coup", {"num_steps": 3}), ("ddim", {"num_steps": 3})):
        purified = coup_fast.purify(images, model, classifier, method=method, **options)
        assert purified.shape == images.shape
        assert torch.isfinite(purified).all()
        assert not torch.equal(purified, images)
    discrete = process == "vp" and not continuous
    assert model.time_scale == (999.0 if process == "vp" and continuous else 1000.0 * discrete or 1)


def test_labels_are_those_of_training(tmp_path: Path) -> None:
    """A continuous VP network is told 999 t; one of 1000 times is told the index."""
    told: list[Tensor] = []
    for continuous in (True, False):
        config = ScoreSDEConfig("vp", continuous, NCSNppConfig(**TINY))
        model = load_score_sde(saved(tmp_path, checkpoint(config)), config)
        model.network.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
        options = {"t_star": 0.05, "num_steps": 2, "check_values": False}
        coup_fast.purify(torch.rand(1, 3, 8, 8), model, method="diffpure", **options)
    expected = [49.95, 24.975, 50.0, 25.0]
    assert torch.cat(told).tolist() == pytest.approx(expected, rel=1e-6)


def test_gradients_flow_through_the_network() -> None:
    network = filled(NCSNpp(NCSNppConfig(**FOURIER))).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(
        x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    t = torch.tensor([0.5])
    (gradient,) = torch.autograd.grad(network(x, t).sum(), x)
    step = 1e-5 * direction
    with torch.no_grad():
        slope = (network(x + step, t) - network(x - step, t)).sum() / 2e-5
    assert math.isclose(float((gradient * direction).sum()), float(slope), rel_tol=1e-6)
