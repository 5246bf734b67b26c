"""Unconditional pipelines of Hugging Face diffusers as score models. Needs diffusers.

A pipeline is its `UNet2DModel` and what its scheduler's configuration says of the noise it was
trained on. How the scheduler samples (steps, spacing, clipping, variance) is the method's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.schedules import DiscreteSchedule, FlowSchedule, VPSchedule
from coup_fast.score_model import ScoreModel

DISCRETE = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
EXPLODING = ("ScoreSdeVeScheduler",)
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SUPPORTED = DISCRETE + EXPLODING + FLOWS
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
_KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class NoiseOfScore(nn.Module):
    """A variance-exploding score network on pixels as a noise network, y = x₀ + r z in [-1, 1].

    Pixels are (y + 1)/2 and their noise r/2, so z is estimated by -(r/2)·score. Outside of the
    noise that the network knows, it is asked at the nearest level.

    Args:
        network: called with pixels and σ; returns the score. sigma_min, sigma_max: its range.
    """

    def __init__(self, network: nn.Module, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.network = network
        self.in_channels = _config(network)["in_channels"]
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, y: Tensor, r: Tensor) -> Tensor:
        """y: [B, C, H, W]; r: [B]. Returns the estimate of z, shaped as y."""
        sigma = r / 2
        score: Tensor = self.network(
            (y + 1) / 2, sigma.clamp(self.sigma_min, self.sigma_max)
        ).sample
        return -sigma.to(score.dtype).reshape(-1, 1, 1, 1) * score


def load_diffusers(
    source: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> ScoreModel:
    """Load a pipeline of diffusers as a score model, in eval mode.

    Args:
        source: a folder of `save_pretrained`, a hub id ("google/ddpm-cifar10-32"), or a pipeline.
            `DDPMPipeline` and others of a UNet2DModel with one of the schedulers `DISCRETE` or
            `FLOWS`, and `ScoreSdeVePipeline`.
        dtype: of the network.
        device: where it goes.
        **options: of `DiffusionPipeline.from_pretrained` (revision, cache_dir,
            local_files_only, ...).

    Returns:
        For a discrete scheduler, a ScoreModel on its `DiscreteSchedule` that is told the index.
        Its kind is "eps", "x0" for prediction_type "sample", or "v" for "v_prediction".
        Every diffusion method takes it; those that integrate an SDE (`coup`, `diffpure`, ...)
        need linear betas. `variance="learned"` uses a learned variance.
        For `ScoreSdeVeScheduler`, the same network as a noise network (kind "eps") of
        `VPSchedule()` (`AtVPTimes`), which every diffusion method takes. Its noise levels on
        pixels, sigma_min … sigma_max, are asked at √((1-ᾱ)/ᾱ)/2.
        For a flow-match scheduler, a velocity network of a `FlowSchedule` that is told
        num_train_timesteps times the share of noise (of the data, with invert_sigmas). Its shift
        and its spacing only say how the scheduler would sample.

    Raises:
        ImportError: diffusers is missing.
        FileNotFoundError: there is no pipeline.
        ValueError: the pipeline, or a field of its configuration, is not supported; it is named.
    """
    pipeline = _pipeline(source, options)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    name, config = type(scheduler).__name__, dict(scheduler.config)
    _check_unet(unet, config)
    if next(unet.parameters()).dtype != dtype:
        unet = unet.to(dtype)
    if name in EXPLODING:
        schedule = VPSchedule()
        known = NoiseOfScore(unet, float(config["sigma_min"]), float(config["sigma_max"]))
        model = ScoreModel(AtVPTimes(known, schedule), "eps", schedule, time_scale=1.0)
        return model.eval().to(device)
    if name in FLOWS:
        flow = FlowSchedule(data_at=1 if config.get("invert_sigmas") else 0)
        steps = float(config["num_train_timesteps"])
        return ScoreModel(unet, "velocity", flow, time_scale=steps).eval().to(device)
    if name not in DISCRETE:
        raise ValueError(f"scheduler {name} is not supported; {', '.join(SUPPORTED)} are")
    chain = discrete_schedule(config)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _KINDS:
        raise ValueError(
            f"prediction_type must be one of {', '.join(_KINDS)}, the scheduler has {prediction!r}"
        )
    model = ScoreModel(unet, _KINDS[prediction], chain, time_scale=float(chain.num_steps))
    return model.eval().to(device)


def discrete_schedule(config: Mapping[str, Any]) -> DiscreteSchedule:
    """The chain of a scheduler's configuration, in float64 (diffusers rounds to float32).

    Raises ValueError, naming the field, for a chain that is not supported.
    """
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr=True is not supported: the last step would keep no signal"
        )
    steps = int(config["num_train_timesteps"])
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
        if betas.shape != (steps,):
            raise ValueError(
                f"trained_betas has shape {list(betas.shape)}, but num_train_timesteps is {steps}"
            )
        return DiscreteSchedule(tuple(betas.tolist()))
    name = config["beta_schedule"]
    first, last = float(config["beta_start"]), float(config["beta_end"])
    if name == "linear":
        return DiscreteSchedule.linear(first, last, steps)
    if name == "squaredcos_cap_v2":
        return DiscreteSchedule.cosine(steps)
    if name == "scaled_linear":
        betas = np.linspace(np.sqrt(first), np.sqrt(last), steps) ** 2
    elif name == "sigmoid":
        betas = (last - first) / (1 + np.exp(-np.linspace(-6, 6, steps))) + first
    else:
        raise ValueError(
            f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, the scheduler has {name!r}"
        )
    return DiscreteSchedule(tuple(betas.tolist()))


def _pipeline(source: Any, options: dict[str, Any]) -> Any:
    """The pipeline of a folder, hub id or object; only of the two parts that are supported."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "load_diffusers needs diffusers: pip install 'coup-fast[diffusers]'"
        ) from error
    if not isinstance(source, str | Path):
        if not hasattr(source, "unet") or not hasattr(source, "scheduler"):
            raise ValueError(
                "source must be a folder, a hub id, or a pipeline with a unet and a scheduler, "
                f"got {type(source).__name__}"
            )
        return source
    try:
        index = DiffusionPipeline.load_config(str(source), **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{source} is neither a folder with a pipeline of diffusers (model_index.json) nor a "
            f"hub id that can be had: {reason}"
        ) from error
    # Parts are [library, class]; another library would be code of the repository's own.
    parts = {
        name: value[1] if value[0] == "diffusers" else ".".join(map(str, value))
        for name, value in index.items()
        if isinstance(value, list | tuple) and len(value) == 2 and value[1] is not None
    }
    supported = ("UNet2DModel", *SUPPORTED)
    wrong = [f"{name} {kind}" for name, kind in parts.items() if kind not in supported]
    if wrong or set(parts) != {"unet", "scheduler"}:
        raise ValueError(
            f"{source} is a {index.get('_class_name')} of {', '.join(parts.values())}; supported "
            f"are pipelines of a unet, UNet2DModel, and a scheduler, "
            f"{', '.join(SUPPORTED)}"
        )
    load: Any = DiffusionPipeline.from_pretrained
    return load(str(source), **options)


def _check_unet(unet: nn.Module, scheduler: Mapping[str, Any]) -> None:
    """That the network is unconditional and returns what the scheduler's configuration says."""
    config = _config(unet)
    for field in ("class_embed_type", "num_class_embeds"):
        if config.get(field) is not None:
            raise ValueError(
                f"{field}={config[field]!r}: class-conditional networks need a label, which "
                "purification does not have"
            )
    channels, out = config["in_channels"], config["out_channels"]
    variance = scheduler.get("variance_type", "fixed_small")
    if out == 2 * channels and variance != "learned_range":
        raise ValueError(
            f"out_channels={out} is twice in_channels, which variance_type='learned_range' means; "
            f"the scheduler has {variance!r}"
        )
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels={out} should be in_channels={channels} or twice that")


def _config(network: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(network, "config", None)
    if not isinstance(config, Mapping) or "in_channels" not in config:
        raise ValueError(f"unet must be a UNet2DModel, got {type(network).__name__}")
    return config
