"""An NCSN network (ADP) that starts from a trained VP network instead of from random weights.

Both are denoisers of Gaussian noise. At one time t of the VP-SDE they are the same function after a
change of variables, so the weights can be moved over exactly (but for the zeros that pad the first
convolution); training then spreads the one noise level over all of them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from coup_fast.models.naf_net import NAFBlock, NAFNet, PixelNorm
from coup_fast.models.unet import ResidualBlock, UNet, time_embedding
from coup_fast.training.dsm import VPNoise


@torch.no_grad()
def ncsn_from_vp(network: UNet | NAFNet, noise: VPNoise, t: float) -> UNet | NAFNet:
    """The unconditional network h(u) = -eps(sqrt(alpha_bar) (2u - 1), t), u in pixel space.

    At pixels with noise of std sqrt(1 - alpha_bar) / (2 sqrt(alpha_bar)) it predicts -z, as NCSNv2
    does, exactly as well as `network` predicts z at time t.

    Args:
        network: time-conditioned `UNet` or `NAFNet` that predicts the noise. It is not modified.
        noise: its marginals. t: time in (0, 1].

    Raises:
        ValueError: if the network is not conditioned on time.
    """
    if network.time_mlp is None:
        raise ValueError("the network to start from must be conditioned on time (a VP network).")
    start = type(network)(**{**network.config, "time_conditioned": False})
    kept = {k: v for k, v in network.state_dict().items() if k in start.state_dict()}
    start.load_state_dict(kept)
    at = torch.tensor([t * noise.time_scale], dtype=torch.float32)
    time = F.silu(network.time_mlp(time_embedding(at, network.time_features)))
    for conditioned, block in zip(_blocks(network), _blocks(start), strict=True):
        assert conditioned.time is not None
        scale, shift = conditioned.time(time)[0].chunk(2)
        norm = _timed_norm(block)
        norm.weight.mul_(1 + scale)
        norm.bias.mul_(1 + scale).add_(shift)
    signal = noise.alpha_bar(torch.tensor(t)).sqrt().float()
    assert start.stem.bias is not None
    start.stem.bias.sub_(signal * start.stem.weight.sum(dim=(1, 2, 3)))
    start.stem.weight.mul_(2 * signal)
    start.head.weight.neg_()
    assert start.head.bias is not None
    start.head.bias.neg_()
    return start


def _blocks(network: nn.Module) -> list[ResidualBlock | NAFBlock]:
    return [m for m in network.modules() if isinstance(m, ResidualBlock | NAFBlock)]


def _timed_norm(block: ResidualBlock | NAFBlock) -> nn.GroupNorm | PixelNorm:
    """The norm that the time scales and shifts in a network that knows it."""
    return block.norm2 if isinstance(block, ResidualBlock) else block.norm1
