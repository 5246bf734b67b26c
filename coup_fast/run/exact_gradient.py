"""The exact gradient of a run in constant memory: states are kept, steps are computed again.

A run's step is a pure function of its number and its state, noise included. So the forward pass
keeps only the states x_k, and the backward pass takes them from the last to the first: compute step
k once more at x_k with its graph, multiply the gradient by its Jacobian, drop the graph. Where the
option `graph_memory` gives memory for it, the forward pass keeps the graphs of the last steps, and
those are not computed again (`coup_fast.run.kept_graphs`). What is differentiated is the
computation that ran: guidance (to second order where it is "full"), the way through the attacked
image that some methods refer to, ADP's step sizes and clamps included.

This module knows runs; it knows neither methods nor the classifier's vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from coup_fast._torch.differentiated import differentiated
from coup_fast._torch.frozen import frozen_parameters
from coup_fast.run.assumptions import refuse_training_mode
from coup_fast.run.kept_graphs import MODELS, GraphBytes, KeptGraphs, StepGraph, record
from coup_fast.run.loop import states
from coup_fast.run.progress import Tell
from coup_fast.run.replay_guards import Fingerprint, check_replay, same_autocast
from coup_fast.run.steps import Run, State

StateLoss = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(k, x_k, x_0, images) -> [B], differentiable: what a state of a run adds to a loss, k >= 1."""

_SECOND_DERIVATIVE = (
    'gradient="exact" recomputes steps in its backward pass and gives first derivatives only; for '
    'second derivatives build the purifier with gradient="autograd", which keeps the whole graph, '
    'and backend="reference", whose operators have them (float64 images run on it anyway)'
)


def _apply(function: Any, *arguments: Any) -> Any:
    """Function.apply, which torch leaves untyped."""
    return function.apply(*arguments)


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
    result: Tensor = _apply(_StraightThrough, images, purified)
    return result


class _FirstDerivativeOnly(torch.autograd.Function):
    """A gradient that may be used in graphs but not be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(_SECOND_DERIVATIVE)


class _Recomputed:
    """What a run's backward pass needs beside the kept states."""

    def __init__(
        self, run: Run, graph_memory: int, known: GraphBytes, state_loss: StateLoss | None
    ) -> None:
        self.run, self.state_loss = run, state_loss
        self.graphs = KeptGraphs(run, graph_memory, known)
        self.autocast = same_autocast(run.tables.start.device.type)
        self.fingerprint = Fingerprint(run.models, run.noise.tensors)
        self.steps = 0  # those that were taken: ADP may end early
        self.stride = math.ceil(math.sqrt(run.num_steps)) if run.options.states == "sqrt" else 1
        self.end: State = ()  # detached
        self.end_version = 0
        self.end_seen = torch.empty(0)  # by the loss of states; a caller may write into the end

    def forward(
        self, images: Tensor, tell: Tell | None
    ) -> tuple[Tensor, Tensor | None, list[State]]:
        """The final state, the sum of the states' losses, and every `stride`-th state, x_0 first.

        The sum is None where there is no such loss.
        """
        run = self.run
        start, lost = images, None
        kept: list[State] = []
        before: State = ()
        for k, state in states(run, images, self.graphs.step, tell):
            if k > 0 and (k - 1) % self.stride == 0:
                kept.append(self._put_away(before))
            if k == 0:
                start = state[0]
            elif self.state_loss is not None:
                part = self.state_loss(k, state[0], start, images)
                lost = part if lost is None else lost + part
            before, self.steps = state, k
        if self.steps - 1 in self.graphs:  # a caller may write into the result
            state = tuple(t.clone() for t in state)
        self.end = tuple(t.detach() for t in state)
        self.end_version = self.end[0]._version
        if self.state_loss is not None:
            self.end_seen = self.end[0].clone()
        self.fingerprint.check(
            "during the run",
            "a model that its own calls change cannot be computed again; call .eval() on it",
        )
        return state[0], lost, kept

    def _put_away(self, state: State) -> State:
        if self.run.options.states != "host" or state[0].device.type == "cpu":
            return state
        host = []
        for tensor in state:
            memory = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.append(memory.copy_(tensor, non_blocking=True))
        return tuple(host)

    def backward(
        self, images: Tensor, kept: list[State], grad: Tensor | None, grad_lost: Tensor | None
    ) -> Tensor:
        """The gradient of the images, from that of the final state and of the states' losses."""
        self.fingerprint.check(
            "between the forward and the backward pass",
            "the steps that the backward pass computes again would not be those that ran",
        )
        run = self.run
        refuse_training_mode(*run.models)
        with frozen_parameters(*run.models), self.autocast(), run.calls.flags():
            with torch.no_grad():
                attacked = run.attacked(images)
            grad = torch.zeros_like(self.end[0]) if grad is None else grad
            losses = None
            if self.state_loss is not None and grad_lost is not None:
                first = kept[0][0].to(grad.device)
                losses = _LossesOfStates(self.state_loss, first, images, grad_lost)
                grad = grad + losses.backward(self.steps, self.end_seen)
            total: Tensor | None = None
            look = run.options.check_values
            for k, known, following in self._steps_backwards(kept, attacked):
                if isinstance(known, StepGraph):
                    graph = known
                else:
                    graph, _ = record(run, k, known, attacked)
                    verify = run.options.verify_states
                    if following is not None and (look or verify):
                        check_replay(
                            run, k, known, attacked, graph.out.detach(), following, strict=verify
                        )
                    look = False
                grad, part = _step_backward(graph, grad)
                if part is not None:
                    total = part if total is None else total + part
                if losses is not None and k > 0:
                    grad = grad + losses.backward(k, graph.x.detach())
            if losses is None:
                return self._start_backward(images, grad, total)
            gradient = self._start_backward(images, grad + losses.of_start, total)
            return gradient + losses.of_images

    def _steps_backwards(
        self, kept: list[State], attacked: Tensor | None
    ) -> Iterator[tuple[int, StepGraph | State, Tensor | None]]:
        """The last step first: (k, its graph or the state before it, the stored state after it).

        The last is None where a caller has written into it.
        """
        unchanged = self.end[0]._version == self.end_version
        following = self.end[0] if unchanged else None
        for segment in reversed(range(len(kept))):
            first = segment * self.stride
            last = min(first + self.stride, self.steps)
            graphs = self.graphs.take(range(first, last))  # of a segment's last steps, if any
            device = self.end[0].device
            again = [tuple(t.to(device, non_blocking=True) for t in kept[segment])]
            with torch.no_grad():
                for k in range(first, last - len(graphs) - 1):
                    again.append(self.run.step(k, again[-1], attacked))
            for k in reversed(range(first, last)):
                if (graph := graphs.pop(k, None)) is not None:
                    yield k, graph, following
                    following = graph.x.detach()
                else:
                    state = again.pop()
                    yield k, state, following
                    following = state[0]

    def _start_backward(self, images: Tensor, grad: Tensor, total: Tensor | None) -> Tensor:
        """Through the pixel maps: of the start, and of the attacked images where they were read."""
        with torch.enable_grad():
            pixels = images.detach().requires_grad_()
            outputs, grads = [self.run.start(pixels)[0]], [grad]
            if total is not None:
                attacked = self.run.attacked(pixels)
                assert attacked is not None
                outputs.append(attacked)
                grads.append(total)
            (gradient,) = torch.autograd.grad(outputs, pixels, grads)
        return gradient


class _LossesOfStates:
    """The backward pass of the states' losses, one after the other.

    of_start, of_images: the sums of their gradients of x_0 and of the images so far.
    """

    def __init__(self, loss: StateLoss, start: Tensor, images: Tensor, grad: Tensor) -> None:
        self.loss, self.start, self.images, self.grad = loss, start, images, grad
        self.of_start, self.of_images = torch.zeros_like(start), torch.zeros_like(images)

    def backward(self, k: int, state: Tensor) -> Tensor:
        """The gradient of x_k."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (state, self.start, self.images)]
            value = self.loss(k, *leaves)
            grads = torch.autograd.grad(value, leaves, self.grad, materialize_grads=True)
        self.of_start += grads[1]
        self.of_images += grads[2]
        return grads[0]


def _step_backward(graph: StepGraph, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of a step's input state and, where it reads them, of the attacked images."""
    x, attacked, out = graph
    if not out.requires_grad:  # an output clamped or stopped everywhere
        return torch.zeros_like(x), None
    inputs = [x] if attacked is None else [x, attacked]
    with differentiated(MODELS):
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    gradient = torch.zeros_like(x) if grads[0] is None else grads[0]
    return gradient, None if attacked is None else grads[1]


class _ExactGradient(torch.autograd.Function):
    """Images -> final state, and the sum of the states' losses [B] or None.

    States travel as saved tensors, so autograd frees and guards them.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, recomputed: _Recomputed, tell: Tell | None
    ) -> tuple[Tensor, Tensor | None]:
        end, lost, kept = recomputed.forward(images, tell)
        ctx.recomputed = recomputed
        ctx.width = len(recomputed.end)
        ctx.save_for_backward(images, *(tensor for state in kept for tensor in state))
        ctx.set_materialize_grads(False)
        return end, lost

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_lost: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        given = [g for g in (grad, grad_lost) if g is not None]
        if not given or not ctx.needs_input_grad[0]:
            return None, None, None
        images, *flat = ctx.saved_tensors
        kept = [tuple(flat[i : i + ctx.width]) for i in range(0, len(flat), ctx.width)]
        with torch.inference_mode(False), torch.no_grad():
            gradient = ctx.recomputed.backward(images, kept, grad, grad_lost)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _apply(_FirstDerivativeOnly, gradient, images, *given)
        return gradient, None, None


def exact_final_state(
    run: Run,
    images: Tensor,
    graph_memory: int = 0,
    known: GraphBytes | None = None,
    tell: Tell | None = None,
) -> State:
    """The final state of a run; its first tensor carries the exact gradient of that run.

    run: with its models' parameters frozen by the caller. images: [B, C, H, W], requiring grad.
    graph_memory: bytes for graphs that are kept. known: what such graphs take, as far as earlier
    runs have measured it; what this one measures is added. tell: as `coup_fast.run.loop.states` has
    it, of the forward pass.

    By the run's options: `states`: "device" keeps all N states where they are, "host" in (pinned)
    host memory, "sqrt" every √N-th on the device, at the price of computing the others once more.
    `verify_states`: every state that the backward pass computes again is compared with the stored
    one, bit for bit, and a step whose graph is kept is taken without it as well. `check_values`:
    the first state that it computes again is compared, to catch models that do not repeat
    themselves; that waits for the device once.

    The values are those of a run without gradients, bit for bit. The backward pass may be asked
    for twice (retain_graph=True), and by several runs in any order.

    Raises RuntimeError for a model that changes its input or its own tensors; in the backward pass
    ValueError for models that are in a training mode by then, and RuntimeError if they changed
    since, or do not repeat themselves, and for a derivative of the gradient.
    """
    return _final_state(run, images, graph_memory, known, tell, None)[0]


def exact_final_state_and_loss(
    run: Run,
    images: Tensor,
    state_loss: StateLoss,
    graph_memory: int = 0,
    known: GraphBytes | None = None,
    tell: Tell | None = None,
) -> tuple[State, Tensor]:
    """`exact_final_state`, and the sum over k >= 1 of what `state_loss` makes of each state, [B].

    Its gradient is exact as well: walking backwards, each state's own gradient is added to what
    comes from the states after it, and what the loss reads of x_0 and of the images at the end.
    """
    state, lost = _final_state(run, images, graph_memory, known, tell, state_loss)
    assert lost is not None
    return state, lost


def _final_state(
    run: Run,
    images: Tensor,
    graph_memory: int,
    known: GraphBytes | None,
    tell: Tell | None,
    state_loss: StateLoss | None,
) -> tuple[State, Tensor | None]:
    recomputed = _Recomputed(run, graph_memory, {} if known is None else known, state_loss)
    end, lost = _apply(_ExactGradient, images, recomputed, tell)
    return (end, *recomputed.end[1:]), lost
