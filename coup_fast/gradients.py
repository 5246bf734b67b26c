"""The exact gradient of a run in constant memory: states are kept, steps are computed again.

A chain's step is a pure function of its number and its state, noise included. So the forward pass
keeps the states x_k alone, and the backward pass takes them from the last to the first: compute
step k once more at x_k with its graph, multiply the gradient by its Jacobian, drop the graph. What
is differentiated is the computation that ran: guidance (to second order where it is "full"), the
way through the attacked image that some methods refer to, ADP's step sizes and clamps included.

This module knows chains; it knows neither methods nor the classifier's vote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from coup_fast.chain import AnyChain, State
from coup_fast.frozen import frozen_parameters
from coup_fast.gradient_guards import (
    Fingerprint,
    check_replay,
    models_of,
    refuse_training_mode,
    same_autocast,
)

GRADIENTS = ("exact", "autograd", "bpda", "none")
STATES = ("device", "host", "sqrt")

_SECOND_DERIVATIVE = (
    'gradient="exact" recomputes steps in its backward pass and gives first derivatives only; for '
    'second derivatives build the purifier with gradient="autograd", which keeps the whole graph, '
    'and backend="reference", whose operators have them (float64 images run on it anyway)'
)


def _apply(function: Any, *arguments: Any) -> Tensor:
    """Function.apply, which torch leaves untyped."""
    result: Tensor = function.apply(*arguments)
    return result


class _StraightThrough(torch.autograd.Function):
    """Purified images whose gradient is passed on to the images unchanged."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified.view_as(purified)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(images: Tensor, purified: Tensor) -> Tensor:
    """BPDA with the identity (Athalye et al., ICML 2018): the purifier's Jacobian taken as I."""
    return _apply(_StraightThrough, images, purified)


class _FirstDerivativeOnly(torch.autograd.Function):
    """A gradient that may be used in graphs but not be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(_SECOND_DERIVATIVE)


class _Run:
    """What one run's backward pass needs beside its states."""

    def __init__(self, chain: AnyChain, states: str, verify: bool, check: bool) -> None:
        self.chain = chain
        self.states = states
        self.verify = verify
        self.check = check
        self.models = models_of(chain)
        self.autocast = same_autocast(chain.tables.start.device.type)
        self.fingerprint = Fingerprint(self.models, chain.noise.tensors)
        self.steps = 0  # those that ran: ADP may end early
        self.stride = math.ceil(math.sqrt(chain.num_steps)) if states == "sqrt" else 1
        self.end: State = ()  # detached
        self.end_version = 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[State]]:
        """The final state and every `stride`-th state on the way to it, x_0 first."""
        chain, kept = self.chain, []
        state, reference = chain.start(images), chain.reference(images)
        for k in range(chain.num_steps):
            if k % self.stride == 0:
                kept.append(self._put_away(state))
            version = state[0]._version
            following = chain.step(k, state, reference)
            if state[0]._version != version:
                raise RuntimeError(
                    f"{chain.method}: a model changed its input in place at step {k + 1} of "
                    f"{chain.num_steps}; the exact gradient needs the states as they were. "
                    "Let the model work on a copy"
                )
            state = following
            self.steps = k + 1
            if chain.finished(state):
                break
        self.end = tuple(t.detach() for t in state)
        self.end_version = self.end[0]._version
        self.fingerprint.check(
            "during the run",
            "a model that its own calls change cannot be computed again; call .eval() on it",
        )
        return state[0], kept

    def _put_away(self, state: State) -> State:
        if self.states != "host" or state[0].device.type == "cpu":
            return state
        host = []
        for tensor in state:
            memory = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.append(memory.copy_(tensor, non_blocking=True))
        return tuple(host)

    def backward(self, images: Tensor, kept: list[State], grad: Tensor) -> Tensor:
        """The gradient of the images; `grad` is that of the final state."""
        self.fingerprint.check(
            "between the forward and the backward pass",
            "the steps that the backward pass computes again would not be those that ran",
        )
        refuse_training_mode(*self.models)
        with frozen_parameters(*self.models), self.autocast(), self.chain.calls.flags():
            with torch.no_grad():
                reference = self.chain.reference(images)
            total: Tensor | None = None
            for k, state, following in self._steps_backwards(kept, reference):
                grad, part = self._step_backward(k, state, following, reference, grad)
                if part is not None:
                    total = part if total is None else total + part
            return self._start_backward(images, grad, total)

    def _steps_backwards(
        self, kept: list[State], reference: Tensor | None
    ) -> Iterator[tuple[int, State, Tensor | None]]:
        """(k, the state before step k, the stored one after it where known), last step first."""
        unchanged = self.end[0]._version == self.end_version
        following = self.end[0] if unchanged else None
        for segment in reversed(range(len(kept))):
            first = segment * self.stride
            last = min(first + self.stride, self.steps)
            device = self.end[0].device
            states = [tuple(t.to(device, non_blocking=True) for t in kept[segment])]
            with torch.no_grad():
                for k in range(first, last - 1):
                    states.append(self.chain.step(k, states[-1], reference))
            for k in reversed(range(first, last)):
                state = states.pop()
                yield k, state, following
                following = state[0]

    def _step_backward(
        self,
        k: int,
        state: State,
        following: Tensor | None,
        reference: Tensor | None,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of step k's input state and, where it reads it, of the reference."""
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            r = None if reference is None else reference.detach().requires_grad_()
            out = self.chain.step(k, (x, *state[1:]), r)[0]
            last = k == self.steps - 1
            if following is not None and (self.verify or (self.check and last)):
                check_replay(
                    self.chain, k, state, reference, out.detach(), following, strict=self.verify
                )
            if not out.requires_grad:  # an output clamped or stopped everywhere
                return torch.zeros_like(x), None
            inputs = [x] if r is None else [x, r]
            grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        gradient = torch.zeros_like(x) if grads[0] is None else grads[0]
        return gradient, None if r is None else grads[1]

    def _start_backward(self, images: Tensor, grad: Tensor, total: Tensor | None) -> Tensor:
        """Through the pixel maps: of the start, and of the reference where it was read."""
        with torch.enable_grad():
            pixels = images.detach().requires_grad_()
            outputs, grads = [self.chain.start(pixels)[0]], [grad]
            if total is not None:
                reference = self.chain.reference(pixels)
                assert reference is not None
                outputs.append(reference)
                grads.append(total)
            (gradient,) = torch.autograd.grad(outputs, pixels, grads)
        return gradient


class _ExactGradient(torch.autograd.Function):
    """Images -> final state. States travel as saved tensors, so autograd frees and guards them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, run: _Run) -> Tensor:
        end, kept = run.forward(images)
        ctx.run = run
        ctx.width = len(run.end)
        ctx.save_for_backward(images, *(tensor for state in kept for tensor in state))
        ctx.set_materialize_grads(False)
        return end

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None
        images, *flat = ctx.saved_tensors
        kept = [tuple(flat[i : i + ctx.width]) for i in range(0, len(flat), ctx.width)]
        with torch.inference_mode(False), torch.no_grad():
            gradient = ctx.run.backward(images, kept, grad)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _apply(_FirstDerivativeOnly, gradient, images, grad)
        return gradient, None


def exact_run(
    chain: AnyChain,
    images: Tensor,
    *,
    states: str = "device",
    verify: bool = False,
    check: bool = True,
) -> State:
    """Run a chain; the first tensor of the result carries the exact gradient of that run.

    Args:
        chain: ready to start, with its models' parameters frozen by the caller.
        images: [B, C, H, W], requiring grad.
        states: "device" keeps all N states where they are, "host" in (pinned) host memory, "sqrt"
            every √N-th on the device, at the price of computing the others once more.
        verify: compare every state that the backward pass computes again with the stored one, bit
            for bit.
        check: compare the last one, to catch models that do not repeat themselves; waits for the
            device once.

    The values are those of a run without gradients, bit for bit. The backward pass may be asked
    for twice (retain_graph=True), and by several runs in any order.

    Raises ValueError for models in a training mode whose steps could not be computed again, and
    RuntimeError for a model that changes its input or its own tensors; in the backward pass
    RuntimeError if the models changed since, or do not repeat themselves, and for a derivative of
    the gradient.
    """
    refuse_training_mode(*models_of(chain))
    run = _Run(chain, states, verify, check)
    end = _apply(_ExactGradient, images, run)
    return (end, *run.end[1:])
