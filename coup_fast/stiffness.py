"""How steep a classifier is, and whether the guidance of a purifier takes steps too long for it.

A guidance scale λ does not transfer from one classifier to another: what decides is c a²/4, with c
the coefficient of a step (λ included) and a the norm of the margin's gradient. Beyond 2 an explicit
step overshoots (docs/guidance.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coup_fast._torch.frozen import frozen_parameters
from coup_fast.plan import Plan
from coup_fast.purifier import Purifier
from coup_fast.run.backends import choose_ops
from coup_fast.run.guidance import guidance_of
from coup_fast.run.stiffness import coefficients, is_stiff, norms, steepness_along
from coup_fast.run.validation import check_images
from coup_fast.score_model import ClassifierFunction

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Stiffness:
    """The guided states of a run, each with its step's coefficient and its classifier's slope.

    Attributes:
        coefficients: c of each guided step, λ included, float64 [K]; with a learned variance, the
            largest that it can be.
        steepness: a = ‖∇ₓ m‖ at the state before each guided step, float64 [K, B], x in diffusion
            space. m is the margin, the top logit less log-sum-exp of the others.
    """

    coefficients: Tensor
    steepness: Tensor

    @property
    def stiff(self) -> Tensor:
        """Where c a²/4 > 2, bool [K, B]: an explicit step overshoots there."""
        return is_stiff(self.coefficients[:, None], self.steepness)

    @property
    def share(self) -> float:
        """The share of states that are stiff, in [0, 1]."""
        return float(self.stiff.double().mean())

    def quantiles(self) -> dict[str, float]:
        """The median of a and its 10 and 90 % quantiles, by their level."""
        return _quantiles(self.steepness)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: images, guided steps, quantiles of a, and the share of stiff states."""
        steps, images = self.steepness.shape
        return {
            "images": images,
            "guided_steps": steps,
            "steepness": self.quantiles(),
            "stiff_share": self.share,
        }


def steepness(classifier: ClassifierFunction, images: Tensor) -> Tensor:
    """a = ‖∇ₓ m‖ of each image: how fast the classifier's margin can grow in diffusion space.

    The margin m is the top logit less log-sum-exp of the others, and x = 2u - 1.

    Args:
        classifier: pixels [B, C, H, W] in [0, 1] -> logits [B, K].
        images: [B, C, H, W] pixels in [0, 1].

    Returns:
        float64 [B].

    Raises:
        TypeError: images are no floating-point tensor.
        ValueError: images have another shape, or the classifier returns other than logits.
        RuntimeError: the logits have no gradient.
    """
    check_images(images)
    x = 2 * images.detach().to(torch.promote_types(images.dtype, torch.float32)) - 1
    with frozen_parameters(classifier):
        gradient, _ = guidance_of(classifier, x, choose_ops("auto", x), "margin")
    return norms(gradient)


def stiffness(
    purifier: Purifier, images: Tensor, sample_ids: Any = None, draw: int | Tensor = 0
) -> Stiffness:
    """Run a guided purifier and look at each state whether an explicit step of guidance overshoots.

    The run is that of `purifier(images, sample_ids, draw)`, and its guidance's classifier is called
    once more at each guided step. For `guidance_solver="stable"` the answer is about the explicit
    steps that it takes the place of.

    Args:
        purifier: with guidance, and with guidance_norm "none".
        images: as the purifier takes them, at least one.
        sample_ids: as the purifier takes them.
        draw: as the purifier takes it.

    Raises:
        ValueError: the purifier has no guidance, or scales it by its norm, or there are no images;
            and what the purifier raises.
    """
    plan = purifier.plan
    if not isinstance(plan, Plan) or not plan.needs_classifier:
        raise ValueError(f"{plan.method} with these options takes no guidance; nothing is stiff")
    if plan.guidance_norm not in ("none", "stable"):
        raise ValueError(
            f'guidance_norm="{plan.guidance_norm}" scales each gradient by its norm, so that '
            'c a²/4 says nothing; use a purifier with guidance_norm="none"'
        )
    run = purifier.prepare(images, sample_ids, draw)
    if len(images) == 0:
        raise ValueError(f"stiffness needs at least one image, got images {list(images.shape)}")
    with frozen_parameters(*run.models), run.calls.flags(), torch.no_grad():
        found = steepness_along(run, images.detach())
    return Stiffness(torch.from_numpy(coefficients(plan)), found.cpu())


def _quantiles(values: Tensor) -> dict[str, float]:
    levels = torch.tensor(QUANTILES, dtype=values.dtype, device="cpu")
    found = torch.quantile(values.flatten().cpu(), levels).tolist()
    return {f"{level:g}": value for level, value in zip(QUANTILES, found, strict=True)}
