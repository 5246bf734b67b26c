"""DDPM checkpoints of ermongroup/ddim, pesser/pytorch_diffusion and SDEdit (CelebA-HQ).

Ho et al., "Denoising diffusion probabilistic models" (NeurIPS 2020), in PyTorch. GDMP runs such a
network on CIFAR-10, DiffPure's `celebahq-ddpm` another on CelebA-HQ. The files say the whole shape
of their network, so no configuration is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from coup_fast.models.checkpoint_files import read_trained
from coup_fast.models.ddpm_net import DDPMConfig, DDPMUNet
from coup_fast.models.state import build_with
from coup_fast.schedules import DiscreteSchedule
from coup_fast.score_model import ScoreModel

_NAMED = ("temb.dense.0.weight", "temb.dense.1.weight")  # names of every network


def load_ddpm(
    path: str | Path,
    *,
    ema: bool | None = None,
    schedule: DiscreteSchedule | None = None,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """Load a DDPM network in eval mode and float32.

    Args:
        path: `ckpt.pth` of ermongroup/ddim, a list [state dict, optimizer, epoch, step, EMA], or a
            bare state dict, as pesser's `model-790000.ckpt` and SDEdit's `celeba_hq.ckpt` are.
        ema: True takes the EMA of a list, False the parameters themselves. None, the default,
            takes the EMA where the file has one, as its authors sample. Of pesser's bare files,
            those named `ema_…` hold the EMA.
        schedule: on which the network was trained; not in the file. The default, linear from 1e-4
            to 0.02 in 1000 steps, is that of every released configuration.
        device: where the network goes.

    Returns:
        ScoreModel of kind "eps" on the schedule, told the index. The network takes [B, C, H, W] in
        [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint or does not fit; the message says what was found
            and expected.
    """
    schedule = DiscreteSchedule() if schedule is None else schedule
    if not isinstance(schedule, DiscreteSchedule):
        raise TypeError(f"schedule must be a DiscreteSchedule, got {type(schedule).__name__}")
    state = read_trained(path, ema, _NAMED)
    config = _config(state, str(path))
    network = build_with(lambda: DDPMUNet(config), state, str(path), torch.float32)
    model = ScoreModel(network, "eps", schedule, time_scale=float(schedule.num_steps))
    return model.eval().to(device)


def _config(state: Mapping[str, Tensor], what: str) -> DDPMConfig:
    """The shape that names and shapes of a state dict are of; ValueError if of none."""

    def width(level: int) -> int:
        return state[f"down.{level}.block.0.conv1.weight"].shape[0]

    def counted(name: str) -> int:
        return next(n for n in itertools.count() if name.format(n) not in state)

    levels = counted("down.{}.block.0.conv1.weight")
    try:
        return DDPMConfig(
            in_channels=state["conv_in.weight"].shape[1],
            out_channels=state["conv_out.weight"].shape[0],
            channels=state["temb.dense.0.weight"].shape[1],
            widths=tuple(width(level) for level in range(max(levels, 1))),
            num_blocks=counted("down.0.block.{}.conv1.weight"),
            attention=tuple(f"down.{level}.attn.0.q.weight" in state for level in range(levels)),
            learned_resampling=levels == 1 or "down.0.downsample.conv.weight" in state,
        )
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{what} is no DDPM checkpoint of ermongroup/ddim or pesser/pytorch_diffusion: it "
            f"lacks {error}; it has {', '.join(list(state)[:3])}, …"
        ) from error
