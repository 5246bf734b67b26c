"""Networks of score_sde, as used by DiffPure and COUP: their configurations and checkpoint files.

Song et al., "Score-based generative modeling through SDEs" (ICLR 2021); the files are those of the
authors' PyTorch release, `checkpoint_N.pth`. Every network comes back as a noise network of a
variance-preserving schedule, whatever it was trained on, so that every diffusion method takes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.score_sde_network import NCSNpp, NCSNppConfig
from coup_fast.models.state import (
    State,
    as_state,
    build_with,
    check_fits,
    describe,
    unwrapped,
)
from coup_fast.schedules import VPSchedule
from coup_fast.score_model import ScoreModel

BETA_MIN, BETA_MAX = 0.1, 20.0  # of every VP and sub-VP configuration


@dataclass(frozen=True)
class ScoreSDEConfig:
    """A configuration of the release: the network and what it was trained on.

    process: "vp", "subvp" or "ve". continuous: trained on all times, not on 1000 of them.
    """

    process: str
    continuous: bool
    network: NCSNppConfig


def _configs() -> dict[str, ScoreSDEConfig]:
    ddpmpp = NCSNppConfig()
    ncsnpp = NCSNppConfig(fir=True, input_pyramid="residual")
    configs = {}
    for process in ("vp", "subvp"):
        for name, network in (("ddpmpp", ddpmpp), ("ncsnpp", ncsnpp)):
            deep = replace(network, num_blocks=8)
            prefix = f"{process}/cifar10_{name}"
            configs[f"{prefix}_continuous"] = ScoreSDEConfig(process, True, network)
            configs[f"{prefix}_deep_continuous"] = ScoreSDEConfig(process, True, deep)
            if process == "vp":
                configs[prefix] = ScoreSDEConfig(process, False, network)
    exploding = replace(ncsnpp, pixels=True, scale_by_sigma=True)
    fourier = replace(exploding, embedding="fourier")
    large = replace(
        fourier,
        image_size=256,
        channel_mult=(1, 1, 2, 2, 2, 2, 2),
        num_blocks=2,
        dropout=0.0,
        input_pyramid="skip",
        output_pyramid="skip",
        num_scales=2000,
    )
    for name, network, continuous in (
        ("cifar10_ncsnpp", exploding, False),
        ("cifar10_ncsnpp_continuous", fourier, True),
        ("cifar10_ncsnpp_deep_continuous", replace(fourier, num_blocks=8), True),
        ("bedroom_ncsnpp_continuous", replace(large, sigma_max=378.0), True),
        ("church_ncsnpp_continuous", replace(large, sigma_max=380.0), True),
        ("celebahq_256_ncsnpp_continuous", replace(large, sigma_max=348.0), True),
        ("ffhq_256_ncsnpp_continuous", replace(large, sigma_max=348.0), True),
    ):
        configs[f"ve/{name}"] = ScoreSDEConfig("ve", continuous, network)
    return configs


# By the name of the configuration file in the release.
CONFIGS: dict[str, ScoreSDEConfig] = _configs()


def load_score_sde(
    path: str | Path,
    config: str | ScoreSDEConfig = "vp/cifar10_ddpmpp_deep_continuous",
    *,
    ema: bool = True,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """Load a network of score_sde from its `checkpoint_N.pth`, in eval mode and float32.

    Args:
        path: a training checkpoint (a dict with `model`, `ema`, `optimizer`, `step`), or a bare
            state dict (.pth or .safetensors; it has no EMA, so ema=False). Names may
            have a wrapper's prefix (`module.`, `_orig_mod.`, ...)
        config: name of the configuration in the release (`CONFIGS`); the default is the network
            that DiffPure and COUP use on CIFAR-10. A `ScoreSDEConfig` describes any other.
        ema: True takes the parameters' moving average, as the published results do; False takes
            the parameters.
        device: where the network goes.

    Returns:
        ScoreModel of kind "eps". A "vp" network gets `VPSchedule(0.1, 20)` and time_scale 999, or
        DDPM's `DiscreteSchedule` and time_scale 1000 if it was trained on 1000 times. A "ve" or
        "subvp" network gets `VPSchedule(0.1, 20)` and time_scale 1, and is asked at its noise
        level of the same signal-to-noise ratio (`AtVPTimes`). All diffusion methods take all of
        them. ADP takes none of them, because it needs a network of kind "ncsn".

    The EMA holds the trainable parameters in the network's order, without names. Its length and
    every shape are checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the configuration is unknown, or the file is not such a checkpoint or does not
            fit; the message says what was found and expected.
    """
    if isinstance(config, str):
        config = CONFIGS[checks.choice("config", config, CONFIGS)]
    found = read_state(path)
    training = isinstance(found, Mapping) and "model" in found
    state = (
        as_state(found["model"], f"'model' of {path}") if training else as_state(found, str(path))
    )
    with torch.device("meta"):
        empty = NCSNpp(config.network)
    state = unwrapped(state, empty.state_dict())
    _check(empty, state, f"{'the model of ' if training else ''}{path}")
    if ema:
        state.update(_averages(found, empty, path))
    network = build_with(lambda: NCSNpp(config.network), state, str(path), torch.float32)
    return _score_model(network, config).eval().to(device)


def _check(empty: NCSNpp, state: State, what: str) -> None:
    """`check_fits`, with the names of the configurations that the state would fit."""
    try:
        check_fits(empty, state, what)
    except ValueError as error:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        fitting = [name for name, config in CONFIGS.items() if _shapes(config) == shapes]
        fits = f"it fits {', '.join(fitting)}" if fitting else "it fits no known configuration"
        raise ValueError(f"{error}; {fits}") from error


@functools.cache
def _shapes(config: ScoreSDEConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = NCSNpp(config.network).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def _averages(found: Any, empty: NCSNpp, path: str | Path) -> State:
    """The EMA of a training checkpoint by parameter name."""
    ema = found.get("ema") if "model" in found else None
    averages = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(averages, list | tuple) or not all(isinstance(a, Tensor) for a in averages):
        raise ValueError(
            f"{path} holds no EMA: expected 'ema' with 'shadow_params', a list of tensors; found "
            f"{describe(found)}{'' if ema is None else f', ema {describe(ema)}'}. "
            "ema=False takes the parameters themselves"
        )
    names = [(name, p.shape) for name, p in empty.named_parameters() if p.requires_grad]
    if len(averages) != len(names):
        raise ValueError(
            f"the EMA of {path} has {len(averages)} tensors; the network has {len(names)} "
            "trainable parameters"
        )
    for number, ((name, shape), average) in enumerate(zip(names, averages, strict=True)):
        if average.shape != shape:
            raise ValueError(
                f"the EMA of {path} is of another network or order: tensor {number} is "
                f"{list(average.shape)}, expected {list(shape)} ({name})"
            )
    return {name: average for (name, _), average in zip(names, averages, strict=True)}


def _score_model(network: NCSNpp, config: ScoreSDEConfig) -> ScoreModel:
    schedule = VPSchedule(BETA_MIN, BETA_MAX)
    if config.process == "vp" and config.continuous:
        return ScoreModel(network, "eps", schedule, time_scale=999.0)
    if config.process == "vp":
        return ScoreModel(network, "eps", schedule.discrete(1000), time_scale=1000.0)
    asked: nn.Module = SubVPNoise(network, schedule)
    if config.process == "ve":
        asked = VENoise(network, config.continuous)
    return ScoreModel(AtVPTimes(asked, schedule), "eps", schedule, time_scale=1.0)


class VENoise(nn.Module):
    """A variance-exploding score network as a noise network: f(x₀ + r z, r) ≈ z.

    Args:
        network: the score ∇ log p of pixels in [0, 1] at noise level σ, told σ itself
            (continuous) or the number of its level, 0 the noisiest.
        continuous: which of the two.

    On pixels the noise level is r/2. Outside of the levels that the network was trained on, the
    nearest one is asked for the score.
    """

    def __init__(self, network: NCSNpp, continuous: bool) -> None:
        super().__init__()
        self.network = network
        self.continuous = continuous
        self.in_channels = network.in_channels

    def forward(self, y: Tensor, ratio: Tensor) -> Tensor:
        """y: [B, C, H, W], an image in [-1, 1] plus noise of level ratio [B]. Returns z."""
        config = self.network.config
        sigma = 0.5 * ratio
        label = sigma.clamp(config.sigma_min, config.sigma_max)
        if not self.continuous:
            spacing = math.log(config.sigma_max / config.sigma_min) / (config.num_scales - 1)
            label = torch.round((math.log(config.sigma_max) - label.log()) / spacing)
        score: Tensor = self.network(0.5 * y + 0.5, label)
        return -sigma.to(score.dtype).reshape(-1, *(1,) * (y.ndim - 1)) * score


class SubVPNoise(nn.Module):
    """A sub-VP noise network as one of f(x₀ + r z, r) ≈ z.

    Its state at time s is √a x₀ + (1 - a) z with a = ᾱ(s) (Song et al. 2021, appendix B), so r is
    (1 - a)/√a, which is 2 sinh(-½ log a).
    """

    def __init__(self, network: NCSNpp, schedule: VPSchedule) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.in_channels = network.in_channels

    def forward(self, y: Tensor, ratio: Tensor) -> Tensor:
        """y: [B, C, H, W], an image in [-1, 1] plus noise of level ratio [B]. Returns z."""
        low, slope = self.schedule.beta_min, self.schedule.beta_max - self.schedule.beta_min
        level = 2 * torch.asinh(0.5 * ratio.to(torch.float64))  # -log a
        time = 2 * level / (low + torch.sqrt(low**2 + 2 * slope * level))
        signal = torch.exp(-0.5 * level).to(y.dtype).reshape(-1, *(1,) * (y.ndim - 1))
        out: Tensor = self.network(signal * y, 999 * time.clamp(max=1.0).to(ratio.dtype))
        return out
