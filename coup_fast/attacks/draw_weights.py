"""How the gradients of an image's draws become one: their mean, or the draws that can be fooled.

Under a random defence two draws can be fooled by opposite changes of the image, or one of them by
none. The plain mean follows such draws too and can lead nowhere. `EmWeights` is the selection of
DiffHammer (Wang, Fu, Han, Xiang, "DiffHammer: rethinking the robustness of diffusion-based
adversarial purification", NeurIPS 2024, section 3.1.1): an expectation step that estimates for each
draw how likely it is to belong to the largest set of draws with a common weakness, whose result
weighs the gradients of the maximisation step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from coup_fast.attacks.ball import l2_norms, ordered_sum, unit_norm

DrawWeights = Callable[[Tensor, Tensor], Tensor]
"""(losses [D, B], gradients [D, B, C, H, W]) -> float64 [D, B], >= 0, with the sum 1 over draws."""

_SLOPE = 5.0  # of the logistic function, as in the released code of DiffHammer
_ROUNDS = 5  # of the search for the common change, likewise


class MeanGradient:
    """The gradients of runs, in the order of their numbers, and in the end their weighted mean.

    images: [B, C, H, W]. A run is one image under one draw; run number r is that of image r mod B
    under draw r // B. weigh: None for equal weights, which needs no memory for single draws.
    normalise: whether each draw's gradient is divided by its ℓ2 norm, after it was weighed.
    """

    def __init__(
        self, images: Tensor, draws: int, weigh: DrawWeights | None, normalise: bool
    ) -> None:
        self.draws, self.weigh, self.normalise = draws, weigh, normalise
        self.dtype = images.dtype
        wide = torch.promote_types(images.dtype, torch.float32)
        self.batch = len(images)
        self.total = torch.zeros_like(images, dtype=wide)
        self.single: Tensor | None = None  # of each run
        if weigh is not None:
            self.single = self.total.new_empty(draws * self.batch, *images.shape[1:])

    def add(self, start: int, gradients: Tensor) -> None:
        """The gradients [b, C, H, W] of the runs from number `start` on."""
        if self.single is not None:
            self.single[start : start + len(gradients)] = gradients
            return
        gradients = unit_norm(gradients) if self.normalise else gradients
        position = 0
        while position < len(gradients):  # one draw of consecutive images after the other
            image = (start + position) % self.batch
            count = min(self.batch - image, len(gradients) - position)
            self.total[image : image + count] += gradients[position : position + count]
            position += count

    def result(self, losses: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean in the dtype of the images, and the weights [D, B]. losses: [D, B]."""
        if self.single is None or self.weigh is None or self.batch == 0:
            return (self.total / self.draws).to(self.dtype), None
        single = self.single.reshape(self.draws, *self.total.shape)
        weights = self.weigh(losses, single)
        if weights.shape != losses.shape:
            raise ValueError(
                f"draw_weights must return one weight for each draw and image, "
                f"{list(losses.shape)}, got {list(weights.shape)}"
            )
        if self.normalise:
            for gradients in single:
                gradients.copy_(unit_norm(gradients))
        return _weighted_sum(single, weights).to(self.dtype), weights


@dataclass(frozen=True)
class EmWeights:
    """Weights q / Σq, where q is the chance that a draw shares the weakness of most draws.

    A change Δ of length eps raises the loss of draw i to about L_i + Δ·g_i, and with it the chance
    of a mistake to σ(L_i + Δ·g_i), with σ a logistic function. The common change is the one that
    maximises the sum of these chances over the draws, and q are the chances under it (the paper's
    equations 8 and 9, at the attacked image, with the draws' own gradients).

    What the paper leaves open is decided so. The common change is searched among the steepest steps
    of single draws (as its equation 11 does) and then by repeated steps along the mean gradient
    under the present weights; the best change that was seen counts. σ(z) = 1 / (1 + exp(-5 z)) and
    five such steps are the released code's. With the loss "margin", which is 0 where the answer
    turns, σ is then 1/2 there. The weights have the sum 1, so that draws that are equally likely to
    share a weakness give the plain mean.

    norm: "linf" or "l2". eps: > 0, in pixels.
    """

    norm: str
    eps: float

    def __call__(self, losses: Tensor, gradients: Tensor) -> Tensor:
        """losses: [D, B]. gradients: [D, B, C, H, W]. Returns float64 [D, B].

        An image's weights depend on its draws and not on its place in the batch.
        """
        best = self._chances(losses, gradients, gradients[0])
        for gradient in gradients[1:]:
            best = _better(best, self._chances(losses, gradients, gradient))
        latest = best
        for _ in range(_ROUNDS):
            common = _weighted_sum(gradients, _shares(latest[0]))
            latest = self._chances(losses, gradients, common)
            best = _better(best, latest)
        return _shares(best[0])

    def _chances(
        self, losses: Tensor, gradients: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log q [D, B] after the steepest step along a direction, and the log of its sum [B]."""
        if self.norm == "linf":
            step = direction.sign().double()
        else:
            norms = l2_norms(direction)[:, None, None, None]
            step = direction.double() / norms.clamp_min(1e-300)
        gains = [ordered_sum((step * g.double()).flatten(1)) for g in gradients]
        estimates = losses.double() + self.eps * torch.stack(gains)
        # Image by image: the last digit of exp may depend on the place in a longer tensor.
        chances = [functional.logsigmoid(_SLOPE * e.clone()) for e in estimates.unbind(1)]
        return torch.stack(chances, 1), torch.stack([c.logsumexp(0) for c in chances])


def _shares(chances: Tensor) -> Tensor:
    """log q [D, B] -> q / Σq; without underflow where all of an image's q are tiny."""
    shares = [torch.softmax(chance.clone(), 0) for chance in chances.unbind(1)]
    return torch.stack(shares, 1)


def _better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """For each image the chances whose sum is larger; the first of equals."""
    larger = other[1] > one[1]
    return torch.where(larger, other[0], one[0]), torch.where(larger, other[1], one[1])


def _weighted_sum(gradients: Tensor, weights: Tensor) -> Tensor:
    """[D, B, C, H, W] and [D, B] -> [B, C, H, W], added in the order of the draws."""
    total = torch.zeros_like(gradients[0])
    for gradient, weight in zip(gradients, weights.to(gradients.dtype), strict=True):
        total += weight[:, None, None, None] * gradient
    return total
