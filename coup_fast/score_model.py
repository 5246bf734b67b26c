"""Networks as the purifier calls them: `ScoreModel`, and `EnergyModel` for scalar networks.

What a network predicts (`kind`) and its noise schedule are facts about the network. A plan turns
them into steps, so nothing here converts ε to a score or back. Only the input of a flow-matching
network is scaled here, because a plan's rows act on what a network returns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast._torch.attention import TwiceDifferentiableAttention
from coup_fast._torch.calls import Call, NetworkForm, called, output_of
from coup_fast._torch.differentiated import differentiated
from coup_fast._torch.modules import declared_channels, described, grad_leaf, in_dtype_of, mode_of
from coup_fast._torch.transforms import refuse_scripting

if TYPE_CHECKING:
    from coup_fast.schedules import FlowSchedule, Schedule

KINDS = ("eps", "score", "x0", "v", "velocity", "ncsn")
TIME_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)

ClassifierFunction = Callable[[Tensor], Tensor]  # pixels [B, C, H, W] -> logits [B, K]


def in_network_units(t: Tensor, time_scale: float, dtype: torch.dtype) -> Tensor:
    """Times t in [0, 1] in a network's units: multiplied in float64, then rounded to dtype."""
    return (t.to(torch.float64) * time_scale).to(dtype)


def answer_of(network: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor) -> Tensor:
    """The tensor that a score network answers; errors are those of `called` and `output_of`."""
    return output_of(called("score network", network, x=x, t=t), x)


def _formed(
    network: Callable[..., Any],
    call: Call | None,
    time_dtype: torch.dtype | None,
    size_multiple: int | None,
) -> Callable[[Tensor, Tensor], Any]:
    """The network as f(x, t): itself, if nothing says otherwise."""
    if call is not None and not callable(call):
        raise TypeError(f"call must be a function call(network, x, t), got {call!r}")
    if time_dtype is not None:
        checks.choice("time_dtype", time_dtype, TIME_DTYPES)
    if size_multiple is not None:
        size_multiple = checks.integer("size_multiple", size_multiple, 1)
    if call is None and time_dtype is None and size_multiple is None:
        return network
    return NetworkForm(network, call, time_dtype, size_multiple)


def _no_schedule(given: Any) -> TypeError:
    of_diffusers = type(given).__module__.startswith("diffusers")
    cure = "; use coup_fast.models.load_diffusers(network, scheduler=…)" if of_diffusers else ""
    return TypeError(
        "schedule must be a VPSchedule, a DiscreteSchedule, an EDMSchedule or a FlowSchedule, "
        f"got {type(given).__name__}{cure}"
    )


class OnPath(nn.Module):
    """A network of a `FlowSchedule` as a network of the VP state x: it is asked at √(a² + b²) x.

    Args:
        network: called with the path's state and the time it is given.
        schedule: a, b at each time.
        time_scale: of the times.
    """

    def __init__(
        self, network: Callable[..., Any], schedule: FlowSchedule, time_scale: float
    ) -> None:
        super().__init__()
        self.training = mode_of(network)
        self.network = network
        self.schedule = schedule
        self.time_scale = time_scale

    @property
    def in_channels(self) -> int | None:
        """Image channels the network declares, or None."""
        return declared_channels(self.network)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        """x: [B, C, ...], the VP state; t: [B] in network units. Returns the network's output."""
        schedule = self.schedule
        if schedule.source == "attacked":
            return self.network(x, t)
        time = t.to(torch.float64) / self.time_scale
        progress = time if schedule.data_at == 1 else 1 - time
        signal = progress if schedule.source == "noise" else torch.ones_like(progress)
        noise = (1 - progress) * (1.0 if schedule.source == "noise" else schedule.noise_std)
        scale = torch.hypot(signal, noise).to(x.dtype)
        return self.network(x * scale.reshape(-1, *(1,) * (x.ndim - 1)), t)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self.network)})"


class ScoreModel(nn.Module):
    """A score network with what the purifier must know about it.

    Args:
        network: module or plain callable f(x, t) with x [B, C, H, W] in the network's dtype and t
            [B] in network units. It returns [B, C, H, W], or [B, 2C, H, W] with the variance
            channels last. Of an object the tensor `.sample` (diffusers) or `.logits` is taken, and
            of a tuple the one tensor of that shape.
        kind: what the network predicts: "eps" (the noise), "score" (∇ log p_t), "x0" (the
            denoised image), "v" (√ᾱ ε - √(1-ᾱ) x₀, Salimans and Ho; `v_prediction` of diffusers),
            "velocity" (dx_t/dt of flow matching) or "ncsn" (the unscaled output of a
            noise-conditional score network or an energy's -∇E, as ADP uses it, in pixel space).
        schedule: the forward process that the network was trained for; default `VPSchedule()`, and
            `FlowSchedule()` for a velocity.
        time_scale: the network is called with t times this, for t in [0, 1]. The default is what
            published networks of the schedule take: 999 t (`VPSchedule`), the index
            (`DiscreteSchedule`: its number of steps), σ (`EDMSchedule`: its sigma_max), or t itself
            (`FlowSchedule`; flow networks of diffusers take 1000 t).
        t_max: the largest t that the network was trained for, in (0, 1]. A plan that calls it at a
            later time is refused. None means all of [0, 1]. A `FlowSchedule` takes no t_max.
        time_dtype: the dtype of the t that the network gets: float32, float64, int32 or int64.
            Networks that look their time up take torch.int64. Plans whose times are not whole
            numbers in network units are then refused.
        call: call(network, x, t) -> what the network returns; for networks that want a keyword, t
            in another shape, or a label: `call=lambda network, x, t: network(x, t[:, None])`. A
            function that has a name can be pickled, a lambda cannot.
        size_multiple: the network takes heights and widths that this divides. The edges of other
            images are mirrored up to such a size, and the network's answer is cropped.

    A module network becomes a submodule, so its parameters move and save with this one. It is never
    modified. Its input is cast to the dtype of its parameters, and only its input: the state stays
    float32 (float64 for float64 images). The time is multiplied in float64, so that the times i/N
    of a discrete schedule reach the network as the whole numbers i. The network gets it as float32
    (float64 with a float64 x).
    """

    network: Callable[[Tensor, Tensor], Any]
    time_dtype: torch.dtype | None = None
    __prepare_scriptable__ = refuse_scripting  # torch.jit.script asks it of every module

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Any],
        kind: str = "eps",
        schedule: Schedule | None = None,
        time_scale: float | None = None,
        t_max: float | None = None,
        *,
        time_dtype: torch.dtype | None = None,
        call: Call | None = None,
        size_multiple: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(
                f"network must be a module or a callable f(x, t), got {type(network).__name__}"
            )
        if isinstance(network, ScoreModel):
            raise TypeError("network is a ScoreModel already; pass it on, or its .network")
        checks.choice("kind", kind, KINDS)
        from coup_fast.schedules import FlowSchedule, Schedule, VPSchedule, check_pair

        if not isinstance(schedule, Schedule | None):
            raise _no_schedule(schedule)
        asked_at: VPSchedule | None = getattr(network, "asked_at", None)  # of `models.AtVPTimes`
        if schedule is None:
            schedule = FlowSchedule() if kind == "velocity" else asked_at or VPSchedule()
        check_pair(kind, schedule)
        flow = isinstance(schedule, FlowSchedule)
        if time_scale is None:
            time_scale = 1.0 if asked_at is not None else schedule.usual_time_scale
        if asked_at is not None and (schedule, time_scale) != (asked_at, 1):
            raise ValueError(
                f"{type(network).__name__} is asked at the times of {asked_at} and needs it as "
                f"schedule, and time_scale=1, got {schedule} and time_scale={time_scale!r}"
            )
        if flow and t_max is not None:
            raise ValueError(f"t_max={t_max!r} has no meaning for a FlowSchedule; leave it out")
        self.training = mode_of(network)
        self.time_dtype = time_dtype
        self.kind = kind
        self.schedule = schedule
        self.time_scale = checks.number("time_scale", time_scale, 0, above=True)
        self.network = _formed(network, call, time_dtype, size_multiple)
        if isinstance(schedule, FlowSchedule):
            self.network = OnPath(self.network, schedule, self.time_scale)
        self.t_max = None if t_max is None else checks.number("t_max", t_max, 0, 1, above=True)

    @property
    def in_channels(self) -> int | None:
        """Image channels the network declares, or None."""
        return declared_channels(self.network)

    def forward(self, x: Tensor, t: Tensor, converted: bool = False) -> Tensor:
        """The network's raw output at x [B, C, ...] and times t [B] in [0, 1].

        Args:
            x: in the network's space; [-1, 1] with noise for diffusion networks.
            t: float [B].
            converted: whether x has the network's dtype and t its units already, as in a run's
                loop.

        Raises:
            TypeError: the network returns no tensor, and nothing of which one can be told.
            Exception: what the network raises, with a line that says how it was called.
        """
        if not converted:
            t = in_network_units(t, self.time_scale, torch.promote_types(x.dtype, torch.float32))
            x = in_dtype_of(self.network, x)
        return answer_of(self.network, x, t)

    def __repr__(self) -> str:
        facts = f"kind={self.kind!r}, schedule={self.schedule}, time_scale={self.time_scale:g}"
        facts += "" if self.t_max is None else f", t_max={self.t_max:g}"
        given: Any = self.network.network if isinstance(self.network, OnPath) else self.network
        if isinstance(given, NetworkForm):
            facts, given = facts + given.facts(), given.network
        return f"{type(self).__name__}({described(given)}, {facts})"


class EnergyModel(nn.Module):
    """A scalar network E as a score network: s(x, t) = -∇ₓE(x, t), by autograd.

    Args:
        network: module or plain callable E(x, t) -> [B] (or [B, 1]); sample i's energy must depend
            on sample i alone.

    Use it as the network of a `ScoreModel`: kind "ncsn" for ADP, "score" for the diffusion methods.
    It works under `no_grad` and `inference_mode`. If grad is on and x or a parameter requires it,
    the score is differentiable: training by score matching and gradients through purification both
    use the second derivative of E.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    __prepare_scriptable__ = refuse_scripting

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(
                f"network must be a module or a callable E(x, t), got {type(network).__name__}"
            )
        self.training = mode_of(network)
        self.network = network

    @property
    def in_channels(self) -> int | None:
        """Image channels the network declares, or None."""
        return declared_channels(self.network)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self.network)})"

    def energy(self, x: Tensor, t: Tensor) -> Tensor:
        """E(x, t), [B]. Raises ValueError if the network returns other than one number a sample."""
        energy = self.network(x, t)
        if energy.shape not in ((x.shape[0],), (x.shape[0], 1)):
            raise ValueError(
                f"an energy network returns one number per sample, [{x.shape[0]}] or "
                f"[{x.shape[0]}, 1] here; got {list(energy.shape)}"
            )
        return energy.reshape(x.shape[0])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """-∇ₓE at x [B, C, ...] and times t [B] in network units; shaped as x."""
        want_graph = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        twice = TwiceDifferentiableAttention() if want_graph else nullcontext()
        by_autograd = differentiated("the energy network")
        with torch.inference_mode(False), torch.enable_grad(), by_autograd, twice:
            point = x if want_graph and x.requires_grad else grad_leaf(x)
            energy = self.energy(point, t.clone() if t.is_inference() else t)
            if not energy.requires_grad:
                raise RuntimeError(
                    "the energy carries no gradient with respect to its input; compute it with "
                    "torch operations and without torch.no_grad()"
                )
            (gradient,) = torch.autograd.grad(energy.sum(), point, create_graph=want_graph)
        return -gradient
