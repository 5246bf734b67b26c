"""One run as data: device tables, noise and models, and step k as a pure function.

A chain is built before its loop starts and holds everything the loop needs, on the device; no
step waits for the host. `step(k, state, reference)` depends on its arguments alone, noise
included, so any step can be run again later with the same bits: for diagnosis, and for exact
gradients that store states and recompute. The chain knows nothing of methods beyond their plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coup_fast.backends import Operators
from coup_fast.calls import Calls
from coup_fast.guidance import confidence_gradient
from coup_fast.plan import AdaptivePlan, Plan, V, W, blank_row, start_row
from coup_fast.score_model import network_time

# What a step carries: the image-shaped state first; ADP adds its alive mask and last step sizes.
State = tuple[Tensor, ...]


class Rows(Protocol):
    """What can be asked for its rows: a tensor, a tuple of them, or a look-up on the device."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


class Beside(Protocol):
    """Where the score network runs while the classifier does: within this context, until joined."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def join(self) -> None: ...


class InOrder:
    """One after the other, on the stream where everything runs."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def join(self) -> None:
        """Nothing has branched off."""


IN_ORDER = InOrder()


@dataclass(frozen=True)
class Noise:
    """A run's noise tensors, numbered in order of need: generated from keys, or given."""

    keys: Rows | None = None  # int64 [M, B, 2]
    tensors: Tensor | None = None  # [M, B, C, H, W]

    def at(self, index: int | None) -> tuple[Tensor | None, Tensor | None]:
        """(keys, noise) of noise tensor `index` as the operators take them; None: no noise."""
        if index is None:
            return None, None
        keys = None if self.keys is None else self.keys[index]
        return keys, None if self.tensors is None else self.tensors[index]

    def of(self, images: slice) -> Noise:
        """The noise of these images of the batch."""
        keys = None if self.keys is None else self.keys[:, images]
        return Noise(keys, None if self.tensors is None else self.tensors[:, images])


@dataclass(frozen=True)
class Tables:
    """A plan's numbers on a device, one row each."""

    start: Tensor  # [8], perturb
    pixel_map: Tensor  # [8], perturb: the attacked image in diffusion space
    rows: Rows  # reverse_step [19] each, or adaptive_step [8] each
    look_ahead: Tensor | None  # reverse_step [19]: x + δ m, ADP's second point
    times: Rows  # [1] each, as the network is called with them; nan where the row calls none
    noise_index: tuple[int | None, ...]  # the noise tensor of each row


def tables_of(
    plan: Plan | AdaptivePlan, device: torch.device, dtype: torch.dtype, time_scale: float = 1.0
) -> Tables:
    """The plan's tables, rounded once from float64 to the state's dtype.

    time_scale: of the `ScoreModel` that will be called at these times.
    """

    def host(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")

    def put(values: object) -> Tensor:
        return host(values).to(dtype).to(device)

    def times_of(values: object) -> tuple[Tensor, ...]:
        t = host(values).reshape(-1, 1)
        return tuple(network_time(t, time_scale, dtype).to(device).unbind(0))

    start, pixel_map = put(plan.start), put(start_row())
    rows = tuple(put(plan.coeffs).unbind(0))
    if isinstance(plan, AdaptivePlan):
        look_ahead = blank_row()
        look_ahead[[V, W]] = 1.0, plan.delta
        times = times_of([0.0]) * plan.num_steps
        return Tables(start, pixel_map, rows, put(look_ahead), times, (None,) * plan.num_steps)
    index: list[int | None] = []
    count = int(plan.start_noisy)
    for noisy in plan.noisy.tolist():
        index.append(count if noisy else None)
        count += int(noisy)
    return Tables(start, pixel_map, rows, None, times_of(plan.times), tuple(index))


def _share_memory(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _all_finite(x: Tensor) -> Tensor:
    """A device bool that is False if anything in x is inf or NaN (or if its sum overflows)."""
    return x.detach().sum().isfinite()


class _ModelCalls:
    """What both chains do with their models."""

    evaluated: tuple[str, str]  # names of the two tensors that `evaluate` returns
    beside: Beside = IN_ORDER

    def __init__(
        self,
        plan: Plan | AdaptivePlan,
        tables: Tables,
        noise: Noise,
        calls: Calls,
        ops: Operators,
    ) -> None:
        self.tables = tables
        self.noise = noise
        self.calls = calls
        self.ops = ops
        self.method = plan.method
        self.start_noise = 0 if plan.start_noisy else None

    def start_state(self, images: Tensor) -> Tensor:
        """Pixels -> state: the method's pixel map, and its first noise where it has one."""
        images = self.calls.layout(images)
        return self.ops.perturb(images, self.tables.start, *self.noise.at(self.start_noise))

    def predict(self, x: Tensor, time: Tensor, variance: bool) -> Tensor:
        """The network's output, [B, C, ...]; [B, 2C, ...] if the plan uses variance channels."""
        out = self.calls.score(x, time.expand(x.shape[0]))
        if not variance and out.shape == x.shape:
            return out
        doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if variance and out.shape != doubled:
            raise ValueError(
                f"{self.method} with learned variance needs network outputs {list(doubled)} (mean "
                f"and variance channels), got {list(out.shape)}"
            )
        if variance:
            return out
        if out.shape != doubled:
            raise ValueError(
                f"the score network returned {list(out.shape)} for a state {list(x.shape)}; it "
                f"must return that shape, or {list(doubled)} with variance channels"
            )
        return out[:, : x.shape[1]]


class Chain(_ModelCalls):
    """A plan of `reverse_step` rows."""

    evaluated = ("score network's output", "classifier's confidence gradient")

    def __init__(
        self,
        plan: Plan,
        tables: Tables,
        noise: Noise,
        calls: Calls,
        ops: Operators,
        full_guidance: bool,
    ) -> None:
        super().__init__(plan, tables, noise, calls, ops)
        self.plan = plan
        self.full_guidance = full_guidance
        self.guided: list[bool] = plan.guided.tolist()
        self.timed: list[bool] = np.isfinite(plan.times).tolist()
        self.num_steps = len(self.timed)

    def start(self, images: Tensor) -> State:
        """The state before step 0."""
        return (self.start_state(images),)

    def reference(self, images: Tensor) -> Tensor | None:
        """The attacked images in diffusion space, for the plans whose rows read them."""
        if not self.plan.uses_reference:
            return None
        return self.ops.perturb(self.calls.layout(images), self.tables.pixel_map)

    def evaluate(self, k: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Network output and guidance gradient of step k at state x."""
        out = guidance = None
        if self.timed[k]:
            with self.beside if self.guided[k] else IN_ORDER:
                out = self.predict(x, self.tables.times[k], self.plan.learned_variance)
        if self.guided[k]:
            graph = self.full_guidance and torch.is_grad_enabled() and x.requires_grad
            calls = self.calls
            classify = calls.classify_twice_differentiably if graph else calls.classify
            guidance = confidence_gradient(classify, x, self.ops, graph=graph)
            self.beside.join()
        return out, guidance

    def advance(
        self,
        k: int,
        state: State,
        evaluated: tuple[Tensor | None, Tensor | None],
        reference: Tensor | None,
        in_place: bool = False,
    ) -> State:
        """The state after step k, given what the models returned for it."""
        (x,), (out, guidance) = state, evaluated
        keys, noise = self.noise.at(self.tables.noise_index[k])
        row, norm = self.tables.rows[k], self.plan.guidance_norm
        if in_place:
            self.ops.reverse_step_(x, out, row, keys, guidance, reference, noise, norm)
            return state
        return (self.ops.reverse_step(x, out, row, keys, guidance, reference, noise, norm),)

    def kind(self, k: int) -> tuple[bool, ...]:
        """What step k does: steps of one kind differ in what they read alone."""
        return self.timed[k], self.guided[k], self.tables.noise_index[k] is not None

    def step(self, k: int, state: State, reference: Tensor | None) -> State:
        """The state after step k; differentiable where the state or the reference requires grad."""
        return self.advance(k, state, self.evaluate(k, state[0]), reference)

    def step_(self, k: int, state: State, reference: Tensor | None) -> State:
        """`step` for inference: writes over the state, unless a model gave back its memory."""
        evaluated = self.evaluate(k, state[0])
        in_place = not any(_share_memory(value, state[0]) for value in evaluated)
        return self.advance(k, state, evaluated, reference, in_place)

    def finished(self, state: State) -> bool:
        """Whether the remaining steps would change nothing; never waits for a device."""
        return False

    def suspect(self, state: State) -> Tensor:
        """A device bool: something is, or looks, wrong with this final state."""
        return ~_all_finite(state[0])


class AdaptiveChain(_ModelCalls):
    """ADP: two network calls a step, per-sample step sizes, a sticky stop per sample.

    A stopped sample keeps its state, so its network outputs and step size repeat from there on.
    """

    evaluated = ("score network's output", "score network's output at the look-ahead point")

    def __init__(
        self,
        plan: AdaptivePlan,
        tables: Tables,
        noise: Noise,
        calls: Calls,
        ops: Operators,
    ) -> None:
        super().__init__(plan, tables, noise, calls, ops)
        self.num_steps = plan.num_steps

    def start(self, images: Tensor) -> State:
        """The state before step 0: everything alive."""
        x = self.start_state(images)
        alive = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        return x, alive, torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)

    def reference(self, images: Tensor) -> Tensor | None:
        """ADP does not look back at the attacked images."""
        return None

    def evaluate(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """h = S(x) and S(x + δh); the look-ahead point is one more row of the step kernel."""
        assert self.tables.look_ahead is not None
        time = self.tables.times[k]
        h = self.predict(x, time, False)
        ahead = self.ops.reverse_step(x, h, self.tables.look_ahead)
        return h, self.predict(ahead, time, False)

    def advance(
        self,
        k: int,
        state: State,
        evaluated: tuple[Tensor, Tensor],
        reference: Tensor | None,
    ) -> State:
        """The state after step k, given the two scores."""
        x, alive, _ = state
        return self.ops.adaptive_step(x, *evaluated, alive, self.tables.rows[k])

    def kind(self, k: int) -> tuple[bool, ...]:
        """As `Chain.kind`: every step does the same."""
        return ()

    def step(self, k: int, state: State, reference: Tensor | None) -> State:
        """The state after step k; differentiable where the state requires grad."""
        return self.advance(k, state, self.evaluate(k, state[0]), reference)

    step_ = step

    def finished(self, state: State) -> bool:
        """Whether no sample is alive, where that can be asked for nothing: on the CPU."""
        return state[1].device.type == "cpu" and not bool(state[1].any())

    def suspect(self, state: State) -> Tensor:
        """As `Chain.suspect`; a NaN step size stops a sample quietly, so it counts."""
        return ~_all_finite(state[0]) | state[2].isnan().any()


AnyChain = Chain | AdaptiveChain
