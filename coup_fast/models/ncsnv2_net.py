"""The RefineNet of NCSNv2, with the parameter names of the released checkpoints.

Song & Ermon, "Improved techniques for training score-based generative models" (NeurIPS 2020),
appendix B: a ResNet whose later stages dilate instead of shrinking, and a RefineNet (Lin et al.,
CVPR 2017) over its stages. It never sees the noise level. Knows nothing of files or methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
    "swish": F.silu,
}


class InstanceNormPlus(nn.Module):
    """InstanceNorm++: instance normalisation that keeps how the channels' means differ."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        variance, mean = torch.var_mean(means, dim=1, keepdim=True)
        means = (means - mean) / torch.sqrt(variance + 1e-5)
        alpha, gamma, beta = (p[:, None, None] for p in (self.alpha, self.gamma, self.beta))
        return gamma * (F.instance_norm(x) + alpha * means) + beta


class ConvMeanPool(nn.Module):
    """A convolution, then the mean of 2x2 squares."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2)


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm x))))).

    shrink: halves height and width. dilation: of all its convolutions; such a block never shrinks,
    and where `shrink` is asked its shortcut is a convolution even between equal widths.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        act: Activation,
        *,
        shrink: bool = False,
        dilation: int = 0,
    ) -> None:
        super().__init__()
        self.act = act
        # Blocks that shrink (or would) widen in their second convolution, others in the first.
        inner = channels if shrink else out_channels

        def conv(width: int, out: int) -> nn.Module:
            spread = max(dilation, 1)
            return nn.Conv2d(width, out, 3, padding=spread, dilation=spread)

        self.normalize1 = InstanceNormPlus(channels)
        self.conv1 = conv(channels, inner)
        self.normalize2 = InstanceNormPlus(inner)
        self.conv2 = (
            ConvMeanPool(inner, out_channels, 3)
            if shrink and not dilation
            else conv(inner, out_channels)
        )
        self.shortcut: nn.Module
        if not shrink and channels == out_channels:
            self.shortcut = nn.Identity()
        elif dilation:
            self.shortcut = conv(channels, out_channels)
        elif shrink:
            self.shortcut = ConvMeanPool(channels, out_channels, 1)
        else:
            self.shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.normalize1(x)))
        h = self.conv2(self.act(self.normalize2(h)))
        out: Tensor = self.shortcut(x) + h
        return out


class ConvUnits(nn.Module):
    """RCU: `blocks` times x + conv(act(conv(act x)))."""

    def __init__(self, channels: int, blocks: int, act: Activation) -> None:
        super().__init__()
        self.blocks, self.act = blocks, act
        for block in range(1, blocks + 1):
            for stage in (1, 2):
                conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                self.add_module(f"{block}_{stage}_conv", conv)

    def forward(self, x: Tensor) -> Tensor:
        convs = list(self.children())
        for first, second in zip(convs[::2], convs[1::2], strict=True):
            x = x + second(self.act(first(self.act(x))))
        return x


class Fusion(nn.Module):
    """MSF: each input convolved, resized bilinearly to a common size, and summed."""

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, 3, padding=1) for c in channels)

    def forward(self, inputs: Sequence[Tensor], size: torch.Size) -> Tensor:
        total: Tensor | None = None
        for conv, x in zip(self.convs, inputs, strict=True):
            h = conv(x)
            if h.shape[2:] != size:
                h = F.interpolate(h, size=size, mode="bilinear", align_corners=True)
            total = h if total is None else total + h
        assert total is not None
        return total


class ChainedPooling(nn.Module):
    """CRP: x plus twice a 5x5 maximum and a convolution, the second from the first's result."""

    def __init__(self, channels: int, act: Activation) -> None:
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = path = self.act(x)
        for conv in self.convs:
            path = conv(F.max_pool2d(path, 5, stride=1, padding=2))
            x = x + path
        return x


class RefineBlock(nn.Module):
    """A stage of RefineNet: convolutional units on each input, fusion, pooling, units."""

    def __init__(
        self, channels: Sequence[int], out_channels: int, act: Activation, *, units: int = 1
    ) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ConvUnits(c, 2, act) for c in channels)
        self.output_convs = ConvUnits(out_channels, units, act)
        if len(channels) > 1:
            self.msf = Fusion(channels, out_channels)
        self.crp = ChainedPooling(out_channels, act)

    def forward(self, *inputs: Tensor) -> Tensor:
        adapted = [units(x) for units, x in zip(self.adapt_convs, inputs, strict=True)]
        h = self.msf(adapted, inputs[0].shape[2:]) if len(adapted) > 1 else adapted[0]
        out: Tensor = self.output_convs(self.crp(h))
        return out


# Residual stages (name, width in units of ngf, shrinks or would, dilation), then refine stages
# (name, width, residual stage they read), as the released classes name them.
_Stages = list[tuple[str, int, bool, int]]
_Refine = list[tuple[str, int, str]]
_STEM: _Stages = [("res1", 1, False, 0), ("res2", 2, True, 0)]
_WIDE: _Stages = [("res4", 4, True, 2), ("res5", 4, True, 4)]
_HEAD: _Refine = [("refine4", 1, "res2"), ("refine5", 1, "res1")]
_LAYOUTS: dict[str, tuple[_Stages, _Refine]] = {
    "ncsnv2": (
        [*_STEM, ("res3", 2, True, 2), ("res4", 2, True, 4)],
        [
            ("refine1", 2, "res4"),
            ("refine2", 2, "res3"),
            ("refine3", 1, "res2"),
            ("refine4", 1, "res1"),
        ],
    ),
    "deeper": (
        [*_STEM, ("res3", 2, True, 0), *_WIDE],
        [("refine1", 4, "res5"), ("refine2", 2, "res4"), ("refine3", 2, "res3"), *_HEAD],
    ),
    "deepest": (
        [*_STEM, ("res3", 2, True, 0), ("res31", 2, True, 0), *_WIDE],
        [
            ("refine1", 4, "res5"),
            ("refine2", 2, "res4"),
            ("refine31", 2, "res31"),
            ("refine3", 2, "res3"),
            *_HEAD,
        ],
    ),
}
LAYOUTS = tuple(_LAYOUTS)


class NCSNv2(nn.Module):
    """Pixels [B, C, H, W] in [0, 1] plus noise -> σ times the score at noise σ, whatever σ is.

    Args:
        in_channels: image channels C. ngf: width of the first stage.
        num_sigmas: length of the `sigmas` buffer, the noise levels it was trained on.
        layout: "ncsnv2" (images of 28 to 64 pixels), "deeper" (128) or "deepest" (256).
        activation: a name in `ACTIVATIONS`.
        centre: map pixels to [-1, 1] first, as the released networks do unless they were trained on
            rescaled data.

    The released networks divide the output by σ; ADP does not, and neither does this one.
    """

    sigmas: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        ngf: int = 128,
        num_sigmas: int = 232,
        *,
        layout: str = "ncsnv2",
        activation: str = "elu",
        centre: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.centre = in_channels, centre
        self.act = act = ACTIVATIONS[activation]
        stages, refine = _LAYOUTS[layout]
        self.stage_names = [name for name, *_ in stages]
        self.refine_names = [(name, source) for name, _, source in refine]
        self.register_buffer("sigmas", torch.zeros(num_sigmas))
        self.begin_conv = nn.Conv2d(in_channels, ngf, 3, padding=1)
        self.normalizer = InstanceNormPlus(ngf)
        self.end_conv = nn.Conv2d(ngf, in_channels, 3, padding=1)
        widths, width = {}, ngf
        for name, units, shrink, dilation in stages:
            out = widths[name] = units * ngf
            first = ResidualBlock(width, out, act, shrink=shrink, dilation=dilation)
            second = ResidualBlock(out, out, act, dilation=dilation)
            self.add_module(name, nn.Sequential(first, second))
            width = out
        previous: list[int] = []
        for name, units, source in refine:
            last = name == refine[-1][0]
            block = RefineBlock(
                [widths[source], *previous], units * ngf, act, units=3 if last else 1
            )
            self.add_module(name, block)
            previous = [units * ngf]

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W] pixels, height and width even; t is not used. Shaped as x."""
        h = self.begin_conv(2 * x - 1 if self.centre else x)
        stages = {}
        for name in self.stage_names:
            h = stages[name] = self.get_submodule(name)(h)
        refined: list[Tensor] = []
        for name, source in self.refine_names:
            refined = [self.get_submodule(name)(stages[source], *refined)]
        out: Tensor = self.end_conv(self.act(self.normalizer(refined[0])))
        return out
