"""Checkpoints of guided diffusion and improved diffusion as score models.

Dhariwal & Nichol 2021 (`256x256_diffusion_uncond.pt`, which DiffPure and GDMP run on ImageNet) and
Nichol & Dhariwal 2021 (`cifar10_uncond_50M_500K.pt`). The configurations are the flags of the
released scripts, under their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coup_fast import checks
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.guided_diffusion_net import GuidedDiffusionUNet
from coup_fast.models.guided_diffusion_shape import FLAG_OF, check_shape, shape_of
from coup_fast.models.state import as_state, build_with, unwrapped
from coup_fast.schedules import DiscreteSchedule
from coup_fast.score_model import ScoreModel

# The defaults of guided-diffusion's scripts. The network, then the chain it was trained on.
DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "channel_mult": "",
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "learn_sigma": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "use_fp16": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
# Flags that say how a network is trained or sampled, not what it is; accepted and of no effect.
WITHOUT_EFFECT = ("use_checkpoint", "use_kl", "rescale_learned_sigmas", "sigma_small")
_NAMED = ("time_embed.0.weight", "time_embed.2.weight")  # names of every network

_IMPROVED = {"num_res_blocks": 3, "learn_sigma": True, "diffusion_steps": 4000}
CONFIGS: dict[str, dict[str, Any]] = {
    # 256x256_diffusion_uncond.pt: 552,814,086 parameters.
    "imagenet256": {
        "image_size": 256,
        "num_channels": 256,
        "attention_resolutions": "32,16,8",
        "num_head_channels": 64,
        "learn_sigma": True,
        "resblock_updown": True,
    },
    # Improved diffusion's cifar10_uncond_50M_500K.pt: 52,546,438 parameters.
    "cifar10": _IMPROVED
    | {
        "image_size": 32,
        "dropout": 0.3,
        "noise_schedule": "cosine",
        "rescale_timesteps": True,
    },
    # Improved diffusion's imagenet64_uncond_100M_1500K.pt: 121,063,942 parameters.
    "imagenet64": _IMPROVED | {"noise_schedule": "cosine", "rescale_timesteps": True},
}
_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def guided_diffusion_flags(
    config: str | Mapping[str, Any] | None = None, **flags: Any
) -> dict[str, Any]:
    """The complete flags of a configuration; see `load_guided_diffusion`.

    Raises:
        ValueError: an unknown configuration or flag, or one that is not supported.
    """
    if isinstance(config, str):
        config = CONFIGS[checks.choice("config", config, CONFIGS)]
    given = {**(config or {}), **flags}
    known = (*DEFAULTS, *WITHOUT_EFFECT, "timestep_respacing")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"guided diffusion has no flag {', '.join(unknown)}; it has {', '.join(known)}"
        )
    complete = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    if complete["class_cond"]:
        raise ValueError(
            "class_cond=True: class-conditional networks need a label, which purification does "
            "not have; use the unconditional checkpoint"
        )
    checks.choice("noise_schedule", complete["noise_schedule"], ("linear", "cosine"))
    respacing = str(given.get("timestep_respacing", ""))
    if respacing not in ("", str(complete["diffusion_steps"])):
        raise ValueError(
            f"timestep_respacing={respacing!r} says how to sample: give the method num_steps"
        )
    return complete


def build_guided_diffusion(
    config: str | Mapping[str, Any] | None = None, **flags: Any
) -> GuidedDiffusionUNet:
    """The network of a configuration, randomly initialised; errors as `guided_diffusion_flags`."""
    return GuidedDiffusionUNet(**_arguments(guided_diffusion_flags(config, **flags)))


def _arguments(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `GuidedDiffusionUNet` that complete flags give, for images of 3 channels."""
    size = int(chosen["image_size"])
    mult = _numbers(chosen["channel_mult"]) or _CHANNEL_MULT.get(size)
    if mult is None:
        raise ValueError(
            f"image_size {size} needs a channel_mult; there are defaults for "
            f"{', '.join(map(str, _CHANNEL_MULT))}"
        )
    return {
        "in_channels": 3,
        "out_channels": 6 if chosen["learn_sigma"] else 3,
        "model_channels": chosen["num_channels"],
        "channel_mult": mult,
        "num_res_blocks": chosen["num_res_blocks"],
        "attention_levels": {
            int(size // side) for side in _numbers(chosen["attention_resolutions"])
        },
        "num_heads": chosen["num_heads"],
        "num_head_channels": chosen["num_head_channels"],
        "num_heads_upsample": chosen["num_heads_upsample"],
        "scale_shift": chosen["use_scale_shift_norm"],
        "resblock_updown": chosen["resblock_updown"],
        "new_attention_order": chosen["use_new_attention_order"],
        "dropout": chosen["dropout"],
    }


# Flags that no name or shape tells, with what a wrong answer would change.
_ASKED = {
    "use_new_attention_order": "True only where the training's flags said so",
    "noise_schedule": "'linear' or 'cosine'",
    "diffusion_steps": "1000, or 4000 for improved diffusion",
    "predict_xstart": "True only where the training's flags said so",
}


def _check_asked(flags: Mapping[str, Any], what: str | Path) -> None:
    """That `flags` say what the file cannot. Raises ValueError, naming all that is missing."""
    missing = [f"{name} ({hint})" for name, hint in _ASKED.items() if name not in flags]
    if not {"num_heads", "num_head_channels"} & set(flags):
        missing.insert(0, "num_heads or num_head_channels")
    if flags.get("diffusion_steps", 1000) != 1000 and "rescale_timesteps" not in flags:
        missing.append("rescale_timesteps (whether times are told in thousandths)")
    if missing:
        raise ValueError(f"{what} does not say everything about its network: give {_and(missing)}")
    if "attention_resolutions" in flags and "image_size" not in flags:
        raise ValueError(
            "attention_resolutions counts pixels of image_size: give both, or neither (the file "
            "says where the network attends)"
        )


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def load_guided_diffusion(
    path: str | Path,
    config: str | Mapping[str, Any] | None = "imagenet256",
    *,
    torso: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **flags: Any,
) -> ScoreModel:
    """Load a guided-diffusion or improved-diffusion checkpoint as a score model, in eval mode.

    Args:
        path: a state dict file of the released code, e.g. `256x256_diffusion_uncond.pt`.
        config: "imagenet256" (Dhariwal & Nichol 2021, unconditional ImageNet 256), "cifar10" or
            "imagenet64" (Nichol & Dhariwal 2021, unconditional, L_hybrid and L_vlb), a mapping of
            the released scripts' flags (DiffPure's `model:` section), whose defaults are those of
            the scripts. None takes from the file what its names and shapes say; **flags must name
            the rest (num_heads or num_head_channels, noise_schedule, ...).
        torso: dtype of the inner convolutions; the rest is float32. The default is float16 if the
            flags say `use_fp16`, else float32. The presets stay in float32; give `torch.float16`
            on a GPU for the released setting.
        device: where the network goes.
        **flags: flags beyond the configuration, or in place of its flags.

    Returns:
        ScoreModel of kind "eps" ("x0" for `predict_xstart`) on a `DiscreteSchedule`. The network
        takes [B, 3, H, W] in [-1, 1] and returns [B, 6, H, W] where the variance is learned.
        Methods use it with `variance="learned"` and otherwise cut the variance channels off.

    Raises:
        ValueError: the flags contradict each other or the file, or some are missing; they are
            named. The file holds another network.
        FileNotFoundError: no such file.
    """
    chosen = guided_diffusion_flags(config, **flags)
    if torso is None:
        torso = torch.float16 if chosen["use_fp16"] else torch.float32
    elif not torso.is_floating_point:
        raise ValueError(f"torso must be a floating-point dtype, got {torso}")
    state = unwrapped(as_state(read_state(path), str(path)), _NAMED)
    found = shape_of(state, str(path))
    if config is None:
        _check_asked(flags, path)
        chosen["channel_mult"] = flags.get("channel_mult") or found["channel_mult"]
    arguments = _arguments(chosen)
    arguments["in_channels"] = found["in_channels"]  # which no flag says
    arguments["out_channels"] = arguments["out_channels"] * found["in_channels"] // 3
    if config is None:
        of_file = {name for name, flag in FLAG_OF.items() if flag not in flags}
        arguments |= {name: value for name, value in found.items() if name in of_file}
    size = None if config is None and "image_size" not in flags else int(chosen["image_size"])
    check_shape(arguments, found, size, str(path))
    network = build_with(lambda: GuidedDiffusionUNet(**arguments), state, str(path), torch.float32)
    steps = int(chosen["diffusion_steps"])
    schedule = (
        DiscreteSchedule.cosine(steps)
        if chosen["noise_schedule"] == "cosine"
        else DiscreteSchedule.linear(0.1 / steps, 20 / steps, steps)
    )
    model = ScoreModel(
        network.convert_torso(torso),
        "x0" if chosen["predict_xstart"] else "eps",
        schedule,
        time_scale=1000.0 if chosen["rescale_timesteps"] else float(steps),
    )
    return model.eval().to(device)


def _numbers(values: Any) -> tuple[float, ...]:
    """(32, 16, 8) of "32,16,8" or of a sequence of numbers; () of ""."""
    if isinstance(values, str):
        return tuple(float(value) for value in values.split(",") if value.strip())
    return tuple(float(value) for value in values)
