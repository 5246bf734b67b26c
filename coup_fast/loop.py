"""The loops over a chain's steps: recorded by autograd, in place, and watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coup_fast.chain import AnyChain, State


def run_recorded(chain: AnyChain, images: Tensor) -> State:
    """The final state, each step made anew: differentiable where grad is on."""
    return _run(chain, images, chain.step)


def run_in_place(chain: AnyChain, images: Tensor) -> State:
    """The final state, each step written over the one before. Call it with grad off."""
    return _run(chain, images, chain.step_)


def _run(
    chain: AnyChain, images: Tensor, step: Callable[[int, State, Tensor | None], State]
) -> State:
    state, reference = chain.start(images), chain.reference(images)
    for k in range(chain.num_steps):
        state = step(k, state, reference)
        if chain.finished(state):
            break
    return state


class Trajectory:
    """A run shown state by state: [B, C, H, W], the batch's parts joined.

    parts: (images, their chain), at least one.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, AnyChain]]) -> None:
        self.parts = parts
        self.num_steps = parts[0][1].num_steps
        self.states: list[State] = []
        self.references: list[Tensor | None] = []

    def advance(self, k: int) -> Tensor:
        """The state after k steps, a copy; called for k = 0, 1, … in turn."""
        if k == 0:
            self.states = [chain.start(images) for images, chain in self.parts]
            self.references = [chain.reference(images) for images, chain in self.parts]
        else:
            self.states = [
                chain.step(k - 1, state, reference)
                for (_, chain), state, reference in zip(
                    self.parts, self.states, self.references, strict=True
                )
            ]
        return torch.cat([state[0] for state in self.states])

    @property
    def finished(self) -> bool:
        """Whether the remaining steps would change nothing."""
        return all(
            chain.finished(state) for (_, chain), state in zip(self.parts, self.states, strict=True)
        )
