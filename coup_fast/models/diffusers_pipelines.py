"""Unconditional pipelines of Hugging Face diffusers as score models. Needs diffusers.

A pipeline is its `UNet2DModel` and what its scheduler's configuration says of the noise that it was
trained on. Which scheduler samples, and how (steps, spacing, clipping, variance), makes no
difference here, because the method decides that.
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

# Their configuration holds the betas of the chain that the network was trained on.
DISCRETE = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
    *("DDPMParallelScheduler", "DDIMParallelScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler"),
)
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
    scheduler: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> ScoreModel:
    """Load a pipeline of diffusers as a score model, in eval mode.

    Args:
        source: a pipeline of a UNet2DModel and one of the schedulers that the models page lists:
            an object, a folder of `save_pretrained` or a hub id ("google/ddpm-cifar10-32"). Or a
            bare UNet2DModel, as an object or as a folder, with `scheduler`.
        scheduler: a scheduler of diffusers or its folder, in place of the pipeline's; it says what
            the network was trained on.
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
        FileNotFoundError: there is no pipeline, network or scheduler.
        ValueError: the pipeline, or a field of its configuration, is not supported; it is named.
    """
    unet, scheduler = _parts(source, scheduler, options)
    name, config = type(scheduler).__name__, dict(scheduler.config)
    _check_scheduler(name, config)
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
    chain = discrete_schedule(config)
    prediction = config.get("prediction_type", "epsilon")
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


def _parts(source: Any, scheduler: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The network and the scheduler of a folder, hub id or object."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "load_diffusers needs diffusers: pip install 'coup-fast[diffusers]'"
        ) from error
    if isinstance(scheduler, str | Path):
        scheduler = _read_scheduler(str(scheduler), options)
    elif scheduler is not None and not isinstance(getattr(scheduler, "config", None), Mapping):
        raise ValueError(
            "scheduler must be a scheduler of diffusers or its folder, got "
            f"{type(scheduler).__name__}"
        )
    pipeline = source
    if isinstance(source, str | Path):
        named = _pipeline_index(str(source), options)
        if named is None:
            load: Any = diffusers.UNet2DModel.from_pretrained
        else:
            _check_index(source, named, scheduler is not None)
            load = diffusers.DiffusionPipeline.from_pretrained
        pipeline = load(str(source), **options)
    unet = getattr(pipeline, "unet", pipeline)
    scheduler = getattr(pipeline, "scheduler", None) if scheduler is None else scheduler
    if not isinstance(unet, nn.Module):
        raise ValueError(
            "source must be a folder, a hub id, a pipeline with a unet and a scheduler, or a "
            f"UNet2DModel, got {type(source).__name__}"
        )
    if scheduler is None:
        raise ValueError(
            f"{type(unet).__name__} does not say on which noise it was trained: give its "
            "scheduler, such as scheduler=DDPMScheduler()"
        )
    return unet, scheduler


def _read_scheduler(source: str, options: dict[str, Any]) -> Any:
    """The scheduler of a folder or hub id, of those that are supported."""
    import diffusers

    subfolder = {"subfolder": "scheduler"} if (Path(source) / "model_index.json").exists() else {}
    try:
        config: Any = diffusers.DDPMScheduler.load_config(source, **options | subfolder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"scheduler={source!r} is no folder with a scheduler_config.json: "
            f"{' '.join(str(error).split())}"
        ) from error
    name = config.get("_class_name")
    _check_scheduler(name, {})
    return getattr(diffusers, name).from_config(config)


def _pipeline_index(source: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """What model_index.json says of a folder or hub id; None: it holds one UNet2DModel instead."""
    import diffusers

    try:
        index: Any = diffusers.DiffusionPipeline.load_config(source, **options)
        return dict(index)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    try:
        config: Any = diffusers.UNet2DModel.load_config(source, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder with a pipeline of diffusers (model_index.json) or a "
            f"network (config.json) nor a hub id that can be had: {reason}"
        ) from error
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"{source} holds a {config.get('_class_name')}; of single networks UNet2DModel is "
            "supported"
        )
    return None


def _check_index(source: Any, index: Mapping[str, Any], scheduler_given: bool) -> None:
    """That a pipeline has the two parts that are supported; another library would be own code."""
    parts = {
        name: value[1] if value[0] == "diffusers" else ".".join(map(str, value))
        for name, value in index.items()
        if isinstance(value, list | tuple) and len(value) == 2 and value[1] is not None
    }
    if set(parts) == {"unet", "scheduler"} and parts["unet"] == "UNet2DModel":
        if not scheduler_given:
            _check_scheduler(parts["scheduler"], {})
        return
    raise ValueError(
        f"{source} is a {index.get('_class_name')} of {', '.join(parts.values())}; supported are "
        "pipelines of a unet, UNet2DModel, and a scheduler"
    )


def _check_scheduler(name: Any, config: Mapping[str, Any]) -> None:
    """That a scheduler says on which chain the network was trained, and what it predicts."""
    if name in FLOWS:
        return
    prediction = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas") or "flow" in str(prediction):
        raise ValueError(
            f"scheduler {name} is set to flow matching (use_flow_sigmas or prediction_type="
            f"{prediction!r}), and holds no path; give the scheduler that the network was trained "
            f"with, {' or '.join(FLOWS)}"
        )
    if name not in SUPPORTED:
        raise ValueError(f"scheduler {name} is not supported; {', '.join(SUPPORTED)} are")
    if prediction not in _KINDS:
        raise ValueError(
            f"prediction_type must be one of {', '.join(_KINDS)}, the scheduler has {prediction!r}"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"timestep_type={config['timestep_type']!r}: the network is told a noise level and not "
            "an index, which is not supported"
        )


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
    variance = scheduler.get("variance_type") or "fixed_small"
    if out == 2 * channels and variance != "learned_range":
        raise ValueError(
            f"out_channels={out} is twice in_channels, which variance_type='learned_range' means; "
            f"the scheduler has {variance!r}"
        )
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels={out} should be in_channels={channels} or twice that")


def _config(network: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(network, "config", None)
    if (
        not isinstance(config, Mapping)
        or "in_channels" not in config
        or "cross_attention_dim" in config  # a UNet2DConditionModel
    ):
        raise ValueError(f"unet must be a UNet2DModel, got {type(network).__name__}")
    return config
