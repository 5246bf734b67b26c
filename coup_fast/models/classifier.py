"""A small image classifier: three convolutions and two linear layers; needs torch alone.

It takes pixels in [0, 1] and normalises nothing, has no batch statistics (an image's logits do not
depend on its batch or on train/eval mode beyond dropout), and its SiLU is smooth, so that the
Hessian of its confidence, which an exact gradient through guided purification needs, exists
everywhere.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Classifier(nn.Module):
    """Pixels [B, C, size, size] in [0, 1] -> logits [B, num_classes].

    Args:
        in_channels: image channels C.
        num_classes: number of classes K.
        size: height and width, divisible by 4.
        width: channels of the first convolution; the others have twice as many.
        hidden: width of the layer before the logits.
        dropout: rate before the last layer, in training mode only.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        size: int = 28,
        width: int = 32,
        hidden: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"size must be divisible by 4, got {size}.")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "size": size,
            "width": width,
            "hidden": hidden,
            "dropout": dropout,
        }
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, size, size] float in [0, 1]; returns logits [B, K]."""
        logits: Tensor = self.layers(images)
        return logits
