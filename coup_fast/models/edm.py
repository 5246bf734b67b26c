"""Denoisers of EDM: their preconditioning, configurations and files.

Karras et al., "Elucidating the design space of diffusion-based generative models" (NeurIPS 2022).
A denoiser D(y, σ) estimates x₀ from y = x₀ + σ z, in [-1, 1] coordinates; around the raw network F
it is D = c_skip y + c_out F(c_in y, c_noise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.edm_network import EDMNetwork, EDMNetworkConfig
from coup_fast.models.state import as_state, build_with, unwrapped
from coup_fast.schedules import EDMSchedule, VPSchedule
from coup_fast.score_model import ScoreModel

PRECONDITIONINGS = ("edm", "vp", "ve")
_NAMED = ("map_layer0.weight", "map_layer1.weight")  # names of every network, below any wrapper


@dataclass(frozen=True)
class EDMConfig:
    """A released network: its shape and its preconditioning, "edm" or, of the baselines, Song's."""

    network: EDMNetworkConfig
    preconditioning: str = "edm"


def _configs() -> dict[str, EDMConfig]:
    small, song = EDMNetworkConfig(), (1, 2, 2, 2)
    configs = {}
    for data, side, kinds in (
        ("cifar10", 32, ("uncond", "cond")),
        ("ffhq", 64, ("uncond",)),
        ("afhqv2", 64, ("uncond",)),
    ):
        for kind in kinds:
            for form, architecture in (("vp", "ddpmpp"), ("ve", "ncsnpp")):
                name = f"{data}-{side}x{side}-{kind}-{form}"
                network = replace(small, architecture=architecture, image_size=side)
                wide = network if side == 32 else replace(network, channel_mult=song)
                configs[f"edm-{name}"] = EDMConfig(wide)
                configs[f"baseline-{name}"] = EDMConfig(replace(network, channel_mult=song), form)
    configs["edm-imagenet-64x64-cond-adm"] = EDMConfig(
        EDMNetworkConfig(
            architecture="adm",
            image_size=64,
            channels=192,
            channel_mult=(1, 2, 3, 4),
            num_blocks=3,
            attention_sizes=(32, 16, 8),
            dropout=0.1,
        )
    )
    return configs


# By the name of the released file.
CONFIGS: dict[str, EDMConfig] = _configs()


class EDMDenoiser(nn.Module):
    """D(y, σ), the estimate of x₀ [B, C, H, W] from y = x₀ + σ z and σ [B] > 0.

    Args:
        network: F.
        preconditioning: "edm" (table 1 of the paper), or what Song et al.'s networks need: "vp",
            with β from 0.1 to 20 and 1000 labels, or "ve".
        sigma_data: standard deviation of the images, for "edm".
    """

    def __init__(
        self, network: nn.Module, preconditioning: str = "edm", sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = checks.choice("preconditioning", preconditioning, PRECONDITIONINGS)
        self.sigma_data = sigma_data
        self.in_channels = getattr(network, "in_channels", None)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise at σ [B], float64."""
        sigma = sigma.to(torch.float64)
        one = torch.ones_like(sigma)
        if self.preconditioning == "ve":
            return one, sigma, one, torch.log(0.5 * sigma)
        if self.preconditioning == "vp":
            level = torch.log1p(sigma**2)  # -log ᾱ
            time = 2 * level / (0.1 + torch.sqrt(0.1**2 + 2 * 19.9 * level))
            return one, -sigma, torch.rsqrt(sigma**2 + 1), 999 * time
        data = self.sigma_data
        total = torch.sqrt(sigma**2 + data**2)
        return (data / total) ** 2, sigma * data / total, 1 / total, torch.log(sigma) / 4

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        """y: [B, C, H, W]; σ: [B]. Returns x̂₀, shaped as y."""
        skip, out, scale, noise = self.coefficients(sigma)
        skip, out, scale = (
            c.to(y.dtype).reshape(-1, *(1,) * (y.ndim - 1)) for c in (skip, out, scale)
        )
        raw: Tensor = self.network(scale * y, noise.to(sigma.dtype))
        return skip * y + out * raw


def load_edm(
    path: str | Path,
    config: str | EDMConfig = "edm-cifar10-32x32-uncond-vp",
    *,
    schedule: VPSchedule | EDMSchedule | None = None,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """Load a denoiser of EDM from its state dict, in eval mode and float32.

    The released `.pkl` files run code when they are opened, so this function opens none. In a
    checkout of NVlabs/edm, and if you trust the file, this line makes a file for this function:

        python -c "import pickle, torch; torch.save(
            pickle.load(open('NAME.pkl', 'rb'))['ema'].state_dict(), 'NAME.pt')"

    Args:
        path: the state dict (.pt or .safetensors) of the released object; names begin with
            `model.`
        config: name of the released file (`CONFIGS`), or an `EDMConfig` for any other. Whether the
            network is conditional, and on how many labels, is read from the file.
        schedule: with a VPSchedule (the default one if None) the denoiser becomes a network of
            that VP process, asked at its noise level (`AtVPTimes`), and every diffusion method
            takes it. With an EDMSchedule it is asked at σ = t sigma_max, and `one-shot` takes it.
        device: where the network goes.

    Returns:
        ScoreModel of kind "x0". A class-conditional network runs without its class, which its
        training never did, so prefer an unconditional one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the configuration is unknown, or the file is a pickle, no state dict, or does
            not fit; the message says what was found and expected.
    """
    if isinstance(config, str):
        config = CONFIGS[checks.choice("config", config, CONFIGS)]
    path = Path(path)
    if path.suffix == ".pkl" and path.is_file():
        line = (
            "import pickle, torch; torch.save(pickle.load(open("
            f"{str(path)!r}, 'rb'))['ema'].state_dict(), {str(path.with_suffix('.pt'))!r})"
        )
        raise ValueError(
            f"{path} is a pickle, which runs code when it is opened. If you trust it, save its "
            f'state dict in a checkout of NVlabs/edm: python -c "{line}"'
        )
    state = unwrapped(as_state(read_state(path), str(path)), _NAMED)
    shape = replace(
        config.network,
        label_dim=_columns(state, "map_label.weight"),
        augment_dim=_columns(state, "map_augment.weight"),
    )
    network = build_with(lambda: EDMNetwork(shape), state, str(path), torch.float32)
    denoiser = EDMDenoiser(network, config.preconditioning)
    if isinstance(schedule, EDMSchedule):
        model = ScoreModel(denoiser, "x0", schedule, time_scale=schedule.sigma_max)
    else:
        schedule = schedule or VPSchedule()
        model = ScoreModel(AtVPTimes(denoiser, schedule), "x0", schedule, time_scale=1.0)
    return model.eval().to(device)


def _columns(state: Mapping[str, Tensor], name: str) -> int:
    """Inputs of a linear layer of the state dict, 0 where it is not there."""
    return state[name].shape[1] if name in state and state[name].ndim == 2 else 0
