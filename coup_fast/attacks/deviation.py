"""The deviated-reconstruction loss of DiffAttack, of the states that a purifier runs through.

Kang, Song, Li, "DiffAttack: evasion attacks against diffusion-based adversarial purification"
(NeurIPS 2023, section 3.2): beside a loss of the scores, the attack maximises the mean over the
steps of the distance between the state of the reverse process and the state of the forward process
at the same noise level. The classifier is the last thing that a long chain meets, so its gradient
may vanish on the way back; this loss begins at every step.

The paper leaves the distance open. Here it is the mean squared difference of the pixels in
diffusion space [-1, 1], over all steps. The forward state at the level ᾱ is √ᾱ x + √(1-ᾱ) ε with
the noise ε of the chain's start. A method that starts from the image itself, as COUP does, has no
forward process; there the image stands for all of its states, which is ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coup_fast.plan import Plan
from coup_fast.purifier import Purifier
from coup_fast.run.exact_gradient import StateLoss, exact_final_state_and_loss
from coup_fast.run.loop import states
from coup_fast.run.progress import Tell
from coup_fast.run.steps import Run, State
from coup_fast.schedules import Array, DiscreteSchedule, VPSchedule


class DeviatedPurifier(Purifier):
    """A purifier that also tells how far its states are from those of the forward process.

    Each differentiated call leaves the deviation of its images, times `weight`, for `taken`.
    """

    weight: float
    _left: list[Tensor]

    @classmethod
    def of(cls, purifier: Purifier, weight: float) -> DeviatedPurifier:
        """The same purifier. Raises ValueError for one whose forward states are not known."""
        forward_levels(purifier)
        other = cls.__new__(cls)
        vars(other).update(vars(purifier.with_options()))  # what an nn.Module is
        other.weight, other._left = weight, []
        return other

    def taken(self, draws: int) -> Tensor:
        """weight · deviation [B], the mean over the `draws` copies of each image of the last call.

        It carries the exact gradient, and can be taken once.
        """
        deviations = torch.cat(self._left)
        self._left.clear()
        return self.weight * deviations.reshape(draws, -1).mean(0)

    def _final_state(self, run: Run, images: Tensor, graph_memory: int, tell: Tell | None) -> State:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return super()._final_state(run, images, graph_memory, tell)
        loss = self._loss(run)
        if run.options.gradient == "exact":
            state, deviation = exact_final_state_and_loss(
                run, images, loss, graph_memory, self._kept.graph_bytes, tell
            )
        else:
            start, deviation = images, torch.zeros(())
            for k, state in states(run, images, tell=tell):
                if k == 0:
                    start = state[0]
                else:
                    deviation = loss(k, state[0], start, images) + deviation
        self._left.append(deviation)
        return state

    def _loss(self, run: Run) -> StateLoss:
        """A state's share in the mean over the steps."""
        plan, steps, levels = self.plan, run.num_steps, forward_levels(self)
        signal, noise = plan.start[0] / 2, plan.start[2]  # of the start, √ᾱ x + √(1-ᾱ) ε

        def loss(k: int, state: Tensor, start: Tensor, images: Tensor) -> Tensor:
            x = 2 * images.to(state.dtype) - 1
            level = float(levels[k - 1])
            forward = x
            if noise > 0:
                eps = (start - signal * x) / noise
                forward = level**0.5 * x + (1 - level) ** 0.5 * eps
            reverse = 2 * state - 1 if plan.in_pixels(k) else state
            return (reverse - forward).square().flatten(1).mean(1) / steps

        return loss


def forward_levels(purifier: Purifier) -> Array:
    """ᾱ of the states after each step, [N]; 1 after the last.

    Raises ValueError for a purifier whose forward states this file does not know.
    """
    plan, schedule = purifier.plan, purifier.score_model.schedule
    known = isinstance(schedule, VPSchedule | DiscreteSchedule) and isinstance(plan, Plan)
    if not known or not np.isfinite(plan.times).all():
        raise ValueError(
            "deviation needs one round of a chain with variance-preserving noise, whose forward "
            f"states are known; got the method {plan.method!r} of a network with a "
            f"{type(schedule).__name__}"
        )
    assert isinstance(schedule, VPSchedule | DiscreteSchedule)
    return np.append(schedule.alpha_bar_told(plan.times[1:]), 1.0)
