"""Checkpoints of NCSNv2, the network that ADP purifies with, as score models.

Song & Ermon 2020 (ermongroup/ncsnv2), as used by Yoon, Hwang, Lee 2021 (ADP).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.checkpoint_files import read_trained
from coup_fast.models.ncsnv2_net import ACTIVATIONS, NCSNv2
from coup_fast.models.state import State, build_with
from coup_fast.schedules import VPSchedule
from coup_fast.score_model import ScoreModel


class NoiseOfPixels(nn.Module):
    """An NCSNv2 network as a noise network: -h(pixels), at y = x₀ + r z in [-1, 1] coordinates.

    h = σ·score and score = -z/σ, so h estimates -z; it is not told r.
    """

    def __init__(self, network: NCSNv2) -> None:
        super().__init__()
        self.network = network
        self.in_channels = network.in_channels

    def forward(self, y: Tensor, r: Tensor) -> Tensor:
        """y: [B, C, H, W]; r: [B], not used. Returns the estimate of z, shaped as y."""
        out: Tensor = -self.network((y + 1) / 2)
        return out


def load_ncsnv2(
    path: str | Path,
    *,
    kind: str = "ncsn",
    ema: bool = False,
    activation: str = "elu",
    centre: bool = True,
    device: torch.device | str = "cpu",
) -> ScoreModel:
    """Load an NCSNv2 checkpoint as a score model, in eval mode and float32.

    Width, image channels, number of noise levels and depth are read from the file.

    Args:
        path: `checkpoint.pth` of ermongroup/ncsnv2 or ADP, a list [state dict, optimizer, epoch,
            step, EMA parameters] with or without `module.` in the names, or a bare state dict.
        kind: "ncsn" takes the output that is not divided by σ, in pixel space, as ADP uses it.
            "eps" makes the same network a noise network of `VPSchedule()` for every other method
            (exact where its noise levels reach; see `AtVPTimes`).
        ema: whether to take the EMA parameters. ADP's released code does not, hence the default;
            Song & Ermon sample with the EMA.
        activation: elu (all released configurations), relu, lrelu or swish; not in the file.
        centre: False for networks trained with `rescaled` or `logit_transform` data.
        device: where the network goes.

    Returns:
        ScoreModel, whose network has the noise levels on pixels in `.sigmas` [L].

    Raises:
        ValueError: an option is unknown, or the file does not fit; the message says what was found
            and expected.
        FileNotFoundError: there is no such file.
    """
    checks.choice("kind", kind, ("ncsn", "eps"))
    checks.choice("activation", activation, ACTIVATIONS)
    state = read_trained(path, ema, _NEEDED, buffers=["sigmas"])
    layout = _layout(state, str(path))
    network = build_with(
        lambda: NCSNv2(
            state["begin_conv.weight"].shape[1],
            state["begin_conv.weight"].shape[0],
            state["sigmas"].shape[0],
            layout=layout,
            activation=activation,
            centre=centre,
        ),
        state,
        str(path),
        torch.float32,
    )
    if kind == "ncsn":
        return ScoreModel(network, "ncsn", time_scale=1.0).eval().to(device)
    schedule = VPSchedule()
    model = ScoreModel(AtVPTimes(NoiseOfPixels(network), schedule), "eps", schedule, time_scale=1.0)
    return model.eval().to(device)


def _layout(state: State, what: str) -> str:
    """Which of the released classes the names are of; ValueError if of none."""
    if any(name not in state or state[name].ndim != dim for name, dim in _NEEDED.items()):
        found = ", ".join(list(state)[:5])
        raise ValueError(
            f"{what} is no NCSNv2 checkpoint: it lacks {' or '.join(_NEEDED)}; it has {found}, …"
        )
    if any(name.startswith("res31.") for name in state):
        return "deepest"
    return "deeper" if any(name.startswith("res5.") for name in state) else "ncsnv2"


_NEEDED = {"begin_conv.weight": 4, "sigmas": 1}
