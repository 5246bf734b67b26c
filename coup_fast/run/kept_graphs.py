"""Graphs of steps that the exact gradient keeps, where memory allows, and so computes only once.

The backward pass of an exact gradient takes step k with its graph from the kept state x_k. The
forward pass can take the step so in the first place: the gradient is the same bit for bit, and a
step less is computed. What decides is memory: a step's graph is measured once for each kind of step
and run, and the last steps' graphs are kept, as many as fit. The last ones, because the backward
pass frees them before it computes any other step again.

Operators exist that round differently where gradients are recorded. So the first step of a kind is
taken both ways, and a kind whose states differ in any bit keeps no graphs: the values of a run are
those of a run without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coup_fast._torch.differentiated import differentiated
from coup_fast.run.aside import aside
from coup_fast.run.assumptions import named_modules
from coup_fast.run.steps import Run, State

MODELS = "the score network or the classifier"  # what a step differentiates, in messages

# Bytes of a step's graph, by kind of step and run; inf where a graph may not be kept.
GraphBytes = dict[Any, float]


class StepGraph(NamedTuple):
    """One step with its graph: from x, and the attacked images if the step reads them, to out."""

    x: Tensor
    attacked: Tensor | None
    out: Tensor


def record(run: Run, k: int, state: State, attacked: Tensor | None) -> tuple[StepGraph, State]:
    """Step k with its graph, and the state after it."""
    with torch.enable_grad(), differentiated(MODELS):
        x = state[0].detach().requires_grad_()
        r = None if attacked is None else attacked.detach().requires_grad_()
        after = run.step(k, (x, *state[1:]), r)
    return StepGraph(x, r, after[0]), after


class KeptGraphs:
    """The graphs of one run's last steps, within `budget` bytes.

    known: what earlier runs have measured; what this one measures is added.
    """

    def __init__(self, run: Run, budget: int, known: GraphBytes) -> None:
        self.run = run
        self.budget = budget
        self.known = known
        self._graphs: dict[int, StepGraph] = {}
        self._first = run.num_steps  # from this step on, graphs are kept
        self._settled = False
        self._options = replace(run.options, graph_memory=0)

    def step(self, k: int, state: State, attacked: Tensor | None) -> State:
        """The state after step k, whose graph is kept if it belongs to those that fit."""
        if self.budget == 0:
            return self.run.step(k, state, attacked)
        if not self._settled:
            self._settle(state)
        if self._key(k, state) not in self.known:
            return self._measured(k, state, attacked)
        if k < self._first:
            return self.run.step(k, state, attacked)
        graph, after = record(self.run, k, state, attacked)
        after = tuple(t.detach() for t in after)
        if self.run.options.verify_states:
            with torch.no_grad(), aside():
                plain = self.run.step(k, state, attacked)
            if not _same(plain, after):
                return plain
        self._graphs[k] = graph
        return after

    def take(self, steps: Iterable[int]) -> dict[int, StepGraph]:
        """The graphs of these steps, which are not kept any longer."""
        taken = {k: self._graphs.pop(k, None) for k in steps}
        return {k: graph for k, graph in taken.items() if graph is not None}

    def __contains__(self, k: int) -> bool:
        return k in self._graphs

    def _measured(self, k: int, state: State, attacked: Tensor | None) -> State:
        """The first step of its kind: with its graph, and without."""
        with torch.no_grad():
            after = self.run.step(k, state, attacked)
        ours = _storages([*state, *after, *_model_tensors(self.run), attacked])
        saved: dict[int, int] = {}

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor), aside():
            graph, recorded = record(self.run, k, state, attacked)
        same = _same(recorded, after)
        del graph, recorded
        self.known[self._key(k, state)] = sum(saved.values()) if same else math.inf
        self._settle(state)
        return after

    def _settle(self, state: State) -> None:
        """Find the first step whose graph is kept: all from there on fit, as far as is known."""
        self._settled = True
        left = float(self.budget)
        self._first = self.run.num_steps
        for k in reversed(range(self.run.num_steps)):
            left -= self.known.get(self._key(k, state), math.inf)
            if left < 0:
                return
            self._first = k

    def _key(self, k: int, state: State) -> Any:
        x = state[0]
        device = x.device.type
        cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        layout = x.is_contiguous(memory_format=torch.channels_last) if x.ndim == 4 else False
        return self.run.kind(k), x.shape, x.dtype, x.device, layout, self._options, cast


def _same(a: State, b: State) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def _storages(tensors: Iterable[Tensor | None]) -> set[int]:
    """What is in memory whether a graph is kept or not."""
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


def _model_tensors(run: Run) -> list[Tensor]:
    found: list[Tensor] = []
    for _, module in named_modules(run.models):
        found += [t for t in module._parameters.values() if t is not None]
        found += [t for t in module._buffers.values() if t is not None]
    return found
