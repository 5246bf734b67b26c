"""Checkpoints of lucidrains/denoising-diffusion-pytorch (v2): network, betas and objective.

A training checkpoint holds everything but the range of the images: the shape of the network is in
its names and shapes, the chain in `betas`, and what it predicts in `loss_weight`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.lucidrains_net import AttentionConfig, LucidrainsConfig, LucidrainsUNet
from coup_fast.models.state import State, as_state, build_with, describe, under, unwrapped
from coup_fast.schedules import DiscreteSchedule
from coup_fast.score_model import ScoreModel

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
_BUFFERS = ("betas", "alphas_cumprod", "loss_weight")  # some of GaussianDiffusion's
_NAMED = ("init_conv.weight", "final_conv.weight")  # names of every network


def load_lucidrains(
    path: str | Path,
    *,
    ema: bool | None = None,
    objective: str | None = None,
    schedule: DiscreteSchedule | None = None,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """Load a network of denoising-diffusion-pytorch in eval mode and float32.

    Args:
        path: `model-N.pt` of its `Trainer`, a state dict of its `GaussianDiffusion`, or one of its
            `Unet` (which needs objective and schedule).
        ema: True takes the moving average, as the package samples, False the parameters
            themselves. None, the default, takes the average where the file has one.
        objective: "pred_noise", "pred_x0" or "pred_v", where the file does not say it.
        schedule: of the betas, where the file does not hold them.
        device: where the network goes.

    Returns:
        ScoreModel on a `DiscreteSchedule`, told the index; of kind "eps", "x0" or "v". The network
        takes images in [-1, 1], which is the package's `auto_normalize`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, does not fit, or leaves something open that no
            argument says; or an argument contradicts it.
    """
    if objective is not None:
        checks.choice("objective", objective, OBJECTIVES)
    diffusion = _diffusion(path, ema)
    state = {name: value for name, value in diffusion.items() if "." in name}
    buffers = {name: value for name, value in diffusion.items() if "." not in name}
    state = unwrapped(state, _NAMED)
    config = _config(state, str(path))
    network = build_with(lambda: LucidrainsUNet(config), state, str(path), torch.float32)
    chain = _chain(buffers, schedule, str(path))
    predicts = _objective(buffers, objective, str(path))
    kind = {"pred_x0": "x0", "pred_v": "v"}.get(predicts, "eps")
    return ScoreModel(network, kind, chain, time_scale=float(chain.num_steps)).eval().to(device)


def _diffusion(path: str | Path, ema: bool | None) -> State:
    """The state dict of the diffusion or of its network, averaged if asked."""
    found: Any = read_state(path)
    if not isinstance(found, Mapping) or "model" not in found:
        if ema:
            raise ValueError(f"{path} holds no EMA: it is {describe(found)}")
        return unwrapped(as_state(found, str(path)), (*_BUFFERS, *_NAMED))
    average = found.get("ema")
    if ema is False or (ema is None and average is None):
        return unwrapped(as_state(found["model"], f"'model' of {path}"), _BUFFERS)
    if average is None:
        raise ValueError(f"{path} holds no EMA: it is {describe(found)}")
    averaged = under(as_state(average, f"'ema' of {path}"), "ema_model.")
    if not averaged:
        raise ValueError(
            f"'ema' of {path} has no names that begin with ema_model.: it is {describe(average)}"
        )
    return unwrapped(averaged, _BUFFERS)


def _chain(
    buffers: Mapping[str, Tensor], schedule: DiscreteSchedule | None, what: str
) -> DiscreteSchedule:
    if "betas" not in buffers:
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"{what} holds no betas: give schedule=, a DiscreteSchedule, such as "
                f"DiscreteSchedule.cosine(1000); got {schedule!r}"
            )
        return schedule
    if schedule is not None:
        raise ValueError(f"{what} holds its betas: leave schedule out")
    return DiscreteSchedule(tuple(buffers["betas"].double().tolist()))


def _objective(buffers: Mapping[str, Tensor], objective: str | None, what: str) -> str:
    """What the network predicts, by the weight of the loss at each index.

    The weight is m/s, m or m/(s + 1) for noise, x₀ and v, with s = ᾱ/(1 - ᾱ) and m = min(s, γ) for
    some γ (min-SNR) or m = s.
    """
    if not {"loss_weight", "alphas_cumprod"} <= set(buffers):
        if objective is None:
            raise ValueError(
                f"{what} does not say what its network predicts: give objective= "
                f"({', '.join(OBJECTIVES)}); pred_v is the package's default since 2023"
            )
        return objective
    level = buffers["alphas_cumprod"].double()
    signal, weight = level / (1 - level), buffers["loss_weight"].double()
    fitting = []
    for name, clipped in zip(
        OBJECTIVES, (weight * signal, weight, weight * (signal + 1)), strict=True
    ):
        wanted = signal.clamp(max=float(clipped.max()))
        if torch.allclose(clipped, wanted, rtol=1e-2, atol=0):
            fitting.append(name)
    if objective is not None and fitting and objective not in fitting:
        raise ValueError(f"objective={objective!r}, where loss_weight of {what} is of {fitting[0]}")
    if objective is None and len(fitting) != 1:
        raise ValueError(
            f"loss_weight of {what} is that of {' and '.join(fitting) or 'no objective'}: give "
            f"objective= ({', '.join(OBJECTIVES)})"
        )
    return objective or fitting[0]


def _config(state: Mapping[str, Tensor], what: str) -> LucidrainsConfig:
    """The shape that names and shapes of a network are of; ValueError if of none."""
    if "time_mlp.0.weights" in state:
        raise ValueError(
            f"{what} has random or learned Fourier features of the time (time_mlp.0.weights), "
            "which the package's continuous-time diffusions use; its GaussianDiffusion is supported"
        )

    def attention(name: str) -> AttentionConfig:
        memory = state[f"{name}.mem_kv"]
        full = f"{name}.to_out.weight" in state
        heads, places = memory.shape[1], memory.shape[2:]
        count, dim = places if full else places[::-1]
        return AttentionConfig(full, heads, dim, count)

    def width(level: int) -> int:
        change = f"downs.{level}.3"
        name = f"{change}.1.weight" if f"{change}.1.weight" in state else f"{change}.weight"
        return state[name].shape[0]

    try:
        levels = next(
            n for n in itertools.count() if f"downs.{n}.0.block1.proj.weight" not in state
        )
        inputs, out = state["init_conv.weight"].shape[1], state["final_conv.weight"].shape[0]
        twice = inputs == 2 * out
        return LucidrainsConfig(
            in_channels=out if twice else inputs,
            out_channels=out,
            self_condition=twice,
            channels=state["time_mlp.1.weight"].shape[1],
            init_channels=state["init_conv.weight"].shape[0],
            widths=tuple(width(level) for level in range(levels)),
            down=tuple(attention(f"downs.{level}.2") for level in range(levels)),
            mid=attention("mid_attn"),
            up=tuple(attention(f"ups.{level}.2") for level in range(levels)),
        )
    except (KeyError, IndexError, ValueError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else "its shapes do not add up"
        raise ValueError(
            f"{what} holds no U-Net of denoising-diffusion-pytorch 2.x: {lacks}; it has "
            f"{', '.join(list(state)[:3])}, … (files of 0.x and 1.x have other names)"
        ) from error
