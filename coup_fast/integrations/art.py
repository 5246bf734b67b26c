"""A purifier as a preprocessing defence of the Adversarial Robustness Toolbox (ART).

    PyTorchClassifier(..., preprocessing_defences=[Purification(purifier)])

ART differentiates through `estimate_forward`, so its attacks get the purifier's own gradient: the
exact one, unless the purifier is built with another.
"""

from __future__ import annotations

from typing import Any

from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor

from coup_fast import checks
from coup_fast.purifier import Purifier
from coup_fast.run.sample_ids import fresh_draw


class Purification(PreprocessorPyTorch):  # type: ignore[misc]  # ART ships no types
    """Purifies what the classifier is to see, at prediction and not in training.

    Args:
        purifier: takes the pixels that ART hands over, [B, C, H, W] in [0, 1] (`clip_values`).
        fresh_draws: every call uses the next draw, as a randomised defence does, from one on that
            is another for each object, process and rank (`coup_fast.run.sample_ids.fresh_draw`;
            `next_draw` tells and sets it); False: every call uses draw 0. An image's sample id is
            its position in ART's batch.
        device_type: "cpu" or "gpu", ART's name for CUDA.
    """

    def __init__(
        self, purifier: Purifier, *, fresh_draws: bool = True, device_type: str = "cpu"
    ) -> None:
        super().__init__(
            device_type=device_type, is_fitted=True, apply_fit=False, apply_predict=True
        )
        self.purifier = purifier
        self.fresh_draws = checks.flag("fresh_draws", fresh_draws)
        self.next_draw = fresh_draw() if fresh_draws else 0

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """(purified images, y as it came)."""
        draw = self.next_draw
        self.next_draw += self.fresh_draws
        return self.purifier(x, draw=draw), y
