"""One run as data: device tables, noise and models, and step k as a pure function.

A run is prepared before its loop starts and holds everything that the loop needs, on the device; no
step waits for the host. `step(k, state, attacked)` depends on its arguments alone, noise included,
so any step can be taken again later with the same bits: for diagnosis, and for exact gradients,
which store states and recompute. A run knows nothing of methods beyond their plan.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coup_fast.plan import AdaptivePlan, AnyPlan, Plan
from coup_fast.run.assumptions import check_answer, version_of
from coup_fast.run.backends import Operators
from coup_fast.run.guidance import guidance_of
from coup_fast.run.model_calls import ModelCalls
from coup_fast.run.options import RunOptions
from coup_fast.run.tables import Noise, Tables

# What a step carries: the image-shaped state first; ADP adds its alive mask and last step sizes.
State = tuple[Tensor, ...]
# What the models return for a step; see the class attribute `evaluated` of a run.
Evaluated = tuple[Tensor | None, ...]


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


def _share_memory(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _all_finite(x: Tensor) -> Tensor:
    """A device bool that is False if anything in x is inf or NaN (or if its sum overflows)."""
    return x.detach().sum().isfinite()


class Run:
    """A run of `reverse_step` rows.

    In every method `attacked` is the attacked images in the state's space, for plans that read
    them.
    """

    evaluated: tuple[str, ...] = (
        *("score network's output", "classifier's confidence gradient", "classifier's margin"),
    )
    beside: Beside = IN_ORDER

    def __init__(
        self,
        plan: AnyPlan,
        tables: Tables,
        noise: Noise,
        calls: ModelCalls,
        ops: Operators,
        options: RunOptions,
    ) -> None:
        self.plan = plan
        self.tables = tables
        self.noise = noise
        self.calls = calls
        self.ops = ops
        self.options = options
        self.num_steps = plan.num_steps
        self.guided: list[bool] = plan.guided.tolist()
        self.timed: list[bool] = np.isfinite(plan.times).tolist()
        self.noise_index = plan.noise_index

    @property
    def models(self) -> tuple[Any, ...]:
        """The callables whose parameters the run uses."""
        return self.calls.score_model, self.calls.score_model.network, self.calls.classifier

    def of(self, images: slice) -> Run:
        """The same run of these images of the batch."""
        part = copy.copy(self)
        part.noise = self.noise.of(images)
        return part

    def start(self, images: Tensor) -> State:
        """Pixels -> the state before step 0: the method's pixel map, and its first noise."""
        first = 0 if self.plan.start_noisy else None
        images = self.calls.layout(images)
        return (self.ops.perturb(images, self.tables.start, *self.noise.at(first)),)

    def attacked(self, images: Tensor) -> Tensor | None:
        """The attacked images in the state's space, for the plans whose rows read them."""
        if not self.plan.uses_attacked:
            return None
        return self.ops.perturb(self.calls.layout(images), self.tables.pixel_map)

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """The network's output, [B, C, ...]; [B, 2C, ...] if the plan uses variance channels."""
        out = self.calls.score(x, time.expand(x.shape[0]))
        check_answer("score network", out, x)
        variance = self.plan.learned_variance
        if not variance and out.shape == x.shape:
            return out
        doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if variance and out.shape != doubled:
            raise ValueError(
                f"{self.plan.method} with learned variance needs network outputs {list(doubled)} "
                f"(mean and variance channels), got {list(out.shape)}"
            )
        if variance:
            return out
        if out.shape != doubled:
            raise ValueError(
                f"the score network returned {list(out.shape)} for a state {list(x.shape)}; it "
                f"must return that shape, or {list(doubled)} with variance channels"
            )
        return out[:, : x.shape[1]]

    def evaluate(self, k: int, x: Tensor) -> Evaluated:
        """Network output, guidance gradient and, for a stable step, margin of step k at state x."""
        out = guidance = margin = None
        if self.timed[k]:
            time = self.tables.times[k]
            before = version_of(x), version_of(time)
            with self.beside if self.guided[k] else IN_ORDER:
                out = self.predict(x, time)
            if (version_of(x), version_of(time)) != before:
                raise self._overwritten(k)
        if self.guided[k]:
            full = self.options.guidance_gradient == "full"
            graph = full and torch.is_grad_enabled() and x.requires_grad
            calls = self.calls
            classify = calls.classify_alone if graph else calls.classify
            stable = self.plan.guidance_norm == "stable"
            quantity = "margin" if stable else "log_confidence"
            guidance, margin = guidance_of(classify, x, self.ops, quantity, graph=graph)
            self.beside.join()
        return out, guidance, margin

    def _overwritten(self, k: int) -> RuntimeError:
        return RuntimeError(
            f"{self.plan.method}: a model changed its input in place at step {k + 1} of "
            f"{self.num_steps} (the state, its time, or an answer that it gave before), which the "
            "run needs as it was; let the model work on a copy"
        )

    def advance(
        self,
        k: int,
        state: State,
        evaluated: Evaluated,
        attacked: Tensor | None,
        in_place: bool = False,
    ) -> State:
        """The state after step k, given what the models returned for it."""
        (x,), (out, guidance, margin) = state, evaluated
        keys, noise = self.noise.at(self.noise_index[k])
        row, norm = self.tables.rows[k], self.plan.guidance_norm
        if in_place:
            self.ops.reverse_step_(x, out, row, keys, guidance, attacked, noise, norm, margin)
            return state
        return (self.ops.reverse_step(x, out, row, keys, guidance, attacked, noise, norm, margin),)

    def step(self, k: int, state: State, attacked: Tensor | None) -> State:
        """The state after step k; differentiable where state or attacked image requires grad."""
        return self.advance(k, state, self.evaluate(k, state[0]), attacked)

    def step_(self, k: int, state: State, attacked: Tensor | None) -> State:
        """`step` for inference: writes over the state, unless a model gave back its memory."""
        evaluated = self.evaluate(k, state[0])
        in_place = not any(_share_memory(value, state[0]) for value in evaluated)
        return self.advance(k, state, evaluated, attacked, in_place)

    def kind(self, k: int) -> tuple[bool, ...]:
        """What step k does. Steps of one kind do the same to different rows of the tables."""
        return self.timed[k], self.guided[k], self.noise_index[k] is not None

    def finished(self, state: State) -> bool:
        """Whether the remaining steps would change nothing; never waits for a device."""
        return False

    def suspect(self, state: State) -> Tensor:
        """A device bool: something is, or looks, wrong with this final state."""
        return ~_all_finite(state[0])


class AdaptiveRun(Run):
    """ADP: two network calls a step, per-sample step sizes, a sticky stop per sample.

    A stopped sample keeps its state, so its network outputs and step size repeat from there on.
    """

    evaluated = ("score network's output", "score network's output at the look-ahead point")

    def start(self, images: Tensor) -> State:
        """The state before step 0: everything alive."""
        (x,) = super().start(images)
        alive = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        return x, alive, torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)

    def evaluate(self, k: int, x: Tensor) -> Evaluated:
        """h = S(x) and S(x + δh); the look-ahead point is one more row of the step kernel."""
        assert self.tables.look_ahead is not None
        time = self.tables.times[k]
        before = version_of(x), version_of(time)
        h = self.predict(x, time)
        first = version_of(h)
        ahead = self.ops.reverse_step(x, h, self.tables.look_ahead)
        h_ahead = self.predict(ahead, time)
        # Tensors of inference mode have no versions: there, one memory for both counts as written.
        again = version_of(h) != first or (h.is_inference() and _share_memory(h_ahead, h))
        if again or (version_of(x), version_of(time)) != before:
            raise self._overwritten(k)
        return h, h_ahead

    def advance(
        self,
        k: int,
        state: State,
        evaluated: Evaluated,
        attacked: Tensor | None,
        in_place: bool = False,
    ) -> State:
        """The state after step k, given the two scores; never in place."""
        (x, alive, _), (h, h_ahead) = state, evaluated
        assert h is not None
        assert h_ahead is not None
        return self.ops.adaptive_step(x, h, h_ahead, alive, self.tables.rows[k])

    def finished(self, state: State) -> bool:
        """Whether no sample is alive, where that can be asked for nothing: on the CPU."""
        return state[1].device.type == "cpu" and not bool(state[1].any())

    def suspect(self, state: State) -> Tensor:
        """As `Run.suspect`; a NaN step size stops a sample quietly, so it counts."""
        return ~_all_finite(state[0]) | state[2].isnan().any()


RUNS: dict[type[AnyPlan], type[Run]] = {Plan: Run, AdaptivePlan: AdaptiveRun}
