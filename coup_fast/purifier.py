"""The purifier: one loop for every method, and the class that users meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import methods, validation
from coup_fast.backends import choose_ops
from coup_fast.calls import Calls, Classifier, Compiled, check_precision, wants_channels_last
from coup_fast.chain import (
    AdaptiveChain,
    AnyChain,
    Chain,
    Noise,
    State,
    Tables,
    tables_of,
)
from coup_fast.diagnosis import diagnose
from coup_fast.frozen import frozen_parameters
from coup_fast.gradients import exact_run, straight_through
from coup_fast.graphs import Graphs
from coup_fast.loop import Trajectory, run_in_place, run_recorded
from coup_fast.noise import step_keys
from coup_fast.options import PURIFIER_OPTIONS, attribute_of, take_options
from coup_fast.plan import AdaptivePlan, Plan
from coup_fast.score_model import ScoreModel

__all__ = ["Classifier", "Purifier", "purify"]

_compiler_disable: Callable[..., Any] = torch.compiler.disable
_NOT_COMPILED = (
    "the loop of a coup_fast.Purifier is not compiled; compile=True compiles its networks"
)


class Purifier(nn.Module):
    """Cleans attacked images with a score model: COUP, ADP, DiffPure and their relatives.

    Args:
        score_model: a `ScoreModel`.
        classifier: module or callable, pixels [B, C, H, W] -> logits [B, K]; needed by the guided
            methods alone. It is the plain classifier being defended.
        method: a name in `coup_fast.methods`.
        seed: int in [0, 2^64); with an image's sample id and draw it decides that image's noise.
        **options: options of the method (`t_star`, `num_steps`, `guidance_scale`, ...; see its
            function in `coup_fast.methods`), and
            backend: "auto" (compiled operators; plain PyTorch for float64 images or without the
                extension), "compiled" or "reference";
            gradient: of a result with respect to images that require grad. "exact": of the run as
                it was, in the memory of its states and one step (`coup_fast.gradients`);
                "autograd": the same from a graph of the whole run, which can be differentiated
                again; "bpda": the purifier's Jacobian is taken as the identity; "none": the
                result is detached;
            states: where the exact gradient keeps the run's states: "device", "host", or "sqrt":
                every √N-th on the device, the others computed once more;
            verify_states: compare each state that the backward pass computes again with the kept
                one, bit for bit;
            guidance_gradient: "full" differentiates through the guidance to second order;
                "stopped" treats it as a constant, as the released COUP attack does;
            check_values: look for NaN and pixels outside [0, 1] before the run, and for inf and
                NaN after it. Each look waits for the device once; False never waits;
            compile: call the networks through `torch.compile` (True, or the name of one of its
                modes). Values are those of the networks up to rounding. Where the gradient through
                the guidance is "full", the exact gradient differentiates the classifier as it is.
                This is the way to compiled networks: `torch.compile` of a model around a purifier
                leaves the purifier's loop alone;
            cuda_graph: of runs without gradient: capture a step (network, classifier and its
                vector-Jacobian product on a second stream, update) once per kind of run and replay
                it for every step. "auto": on CUDA, from the second run of its kind, where the
                models are modules and can be captured; `graph_reason` says why not. True: at
                once, or an error. A replay knows nothing of what else the models would have
                done: hooks, prints, values of Python attributes at the time of a call;
            precision: of the networks; state, step and noise are float32 in each. "fp32": float32
                with PyTorch's own flags as they are set (by default cuDNN's convolutions may use
                TF32). "tf32": TF32 in products and convolutions; needs a GPU. "bf16": autocast to
                bfloat16 around each network call (works, slowly, on CPUs without bfloat16
                instructions);
            channels_last: the state's memory format, and so that of the networks' inputs: True,
                False (as the images come), or "auto": where the score network's convolutions store
                their weights so (`module.to(memory_format=torch.channels_last)`);
            max_batch: images at a time; a larger batch is run in parts, one after the other, and
                so is its gradient. None: all at once. Each image keeps its noise, so results are
                those of the whole batch, bit for bit if the networks' own do not depend on the
                batch (the convolutions of libraries may, in their last bits).

    Both models are used as they are: parameters are not differentiated, train/eval mode and
    requires_grad flags are left as found (off during a run, in all threads: training a model in
    another one meanwhile records no gradients). Where the images require grad, the result is
    differentiable; otherwise the run holds one state, which each step overwrites: a network that
    keeps its input must keep a copy.

    An image's result depends on the image, the seed, its sample id and its draw; not on its batch,
    as far as that is true of the networks.

    Raises ValueError for an unknown method or option (listing those that exist), or a guided method
    without a classifier; TypeError for a score_model that is not a `ScoreModel`.
    """

    backend: str
    gradient: str
    states: str
    verify_states: bool
    guidance_gradient: str
    check_values: bool
    compile_networks: bool | str
    cuda_graph: bool | str
    precision: str
    channels_last: bool | str
    max_batch: int | None

    def __init__(
        self,
        score_model: ScoreModel,
        classifier: Classifier | None = None,
        *,
        method: str = "coup",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(score_model, ScoreModel):
            raise TypeError(
                f"score_model must be a coup_fast.ScoreModel, got {type(score_model).__name__}; "
                "wrap the network: ScoreModel(network, kind='eps')"
            )
        if classifier is not None and not callable(classifier):
            raise TypeError(
                f"classifier must be a module or a callable, got {type(classifier).__name__}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        for name, value in take_options(options).items():
            setattr(self, attribute_of(name), value)
        self.plan = _plan(method, score_model, options)
        self.score_model = score_model
        self.classifier = classifier
        self.method = method
        self.seed = seed
        self.options = options
        if self._guided and classifier is None:
            raise ValueError(
                f"method {method!r} is guided by a classifier and none is given; pass one, or "
                "guidance_scale=0"
            )
        self._tables: dict[tuple[torch.device, torch.dtype], Tables] = {}
        self._compiled = Compiled()
        self._graphs = Graphs()

    @property
    def _guided(self) -> bool:
        return not isinstance(self.plan, AdaptivePlan) and bool(self.plan.guided.any())

    @property
    def num_noise(self) -> int:
        """Noise tensors that one run needs: the least first dimension of `noise`."""
        return self.plan.num_noise

    def forward(
        self,
        images: Tensor,
        sample_ids: Any = None,
        draw: int | Tensor = 0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Purified images.

        Args:
            images: [B, C, H, W] pixels in [0, 1]; float32, float16, bfloat16 or float64 (which
                runs in float64, on the reference path).
            sample_ids: integers [B] that name the images to the noise; default 0 … B-1.
            draw: int >= 0, or int64 [B]: which of an image's independent noises.
            noise: [M, B, C, H, W] with M >= `num_noise`, used in order of need (forward diffusion
                first) instead of generated noise. It is not differentiated.

        Returns [B, C, H, W] in the dtype, device and layout of images. Values may leave [0, 1]
        where the method as published does not clamp.

        Raises TypeError or ValueError for bad input and RuntimeError for images on a device without
        kernels, all before any network is called; FloatingPointError if the result is not finite.
        With `gradient="exact"` and images that require grad, ValueError for models in a training
        mode that the exact gradient cannot repeat, and what else `exact_run` lists.
        """
        run = self._forward
        if torch.compiler.is_compiling():  # which would unroll the loop, and compile every step
            run = _compiler_disable(run, reason=_NOT_COMPILED)
        return run(images, sample_ids, draw, noise)

    def _forward(
        self, images: Tensor, sample_ids: Any, draw: int | Tensor, noise: Tensor | None
    ) -> Tensor:
        run_noise = self._checked(images, sample_ids, draw, noise)
        if images.numel() == 0:
            return images.detach().clone() if self.gradient == "none" else images.clone()
        with self._frozen():
            parts = [
                self._purified(part, run_noise.of(rows), rows.start)
                for rows, part in self._parts(images)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, images: Tensor) -> list[tuple[slice, Tensor]]:
        """The batch in parts of at most `max_batch` images, with their place in it."""
        size = self.max_batch or len(images)
        if len(images) <= size:
            return [(slice(0, len(images)), images)]
        return [
            (slice(first, first + size), images[first : first + size])
            for first in range(0, len(images), size)
        ]

    def _purified(self, images: Tensor, noise: Noise, first: int) -> Tensor:
        """The result for images that start at position `first` of the batch."""
        chain = self._chain(images, noise)
        with chain.calls.flags():
            state = self._run(chain, images)
        if self.check_values and bool(chain.suspect(state)):
            with torch.no_grad(), chain.calls.flags():
                message = diagnose(chain, images, first)
            if message is not None:
                raise FloatingPointError(message)
        result = state[0].to(images.dtype)
        as_it_came = images.is_contiguous(memory_format=torch.channels_last)
        return result.contiguous() if chain.calls.channels_last and not as_it_came else result

    def _run(self, chain: AnyChain, images: Tensor) -> State:
        """The chain's final state, differentiable as `gradient` says."""
        wanted = torch.is_grad_enabled() and images.requires_grad
        if wanted and self.gradient == "exact":
            return exact_run(
                chain,
                images,
                states=self.states,
                verify=self.verify_states,
                check=self.check_values,
            )
        if wanted and self.gradient == "autograd":
            return run_recorded(chain, images)
        with torch.no_grad():
            state = self._inference(chain, images)
        if wanted and self.gradient == "bpda":
            return (straight_through(images, state[0]), *state[1:])
        return state

    def _inference(self, chain: AnyChain, images: Tensor) -> State:
        """The chain's final state, from graphs where there are any."""
        settings = (self.backend, self.precision, self.channels_last, self.compile_networks)
        captured = self._graphs.run(chain, images, self.cuda_graph, settings)
        return run_in_place(chain, images) if captured is None else captured

    @property
    def graph_reason(self) -> str | None:
        """Why the last run without gradient was not replayed from CUDA graphs; None if it was."""
        return self._graphs.reason

    @torch.no_grad()
    def trajectory(
        self,
        images: Tensor,
        sample_ids: Any = None,
        draw: int | Tensor = 0,
        noise: Tensor | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The states of a run as pixels: (k, [B, C, H, W] in the state's dtype) after k steps.

        k = 0 is the start (after the forward noise, where the method has one), the last the
        result. Takes what `forward` takes; nothing is differentiated or clamped. A method that
        works in diffusion space shows (x+1)/2.
        """
        run_noise = self._checked(images, sample_ids, draw, noise)
        return self._states(images, run_noise)

    def _states(self, images: Tensor, noise: Noise) -> Iterator[tuple[int, Tensor]]:
        parts = [(part, self._chain(part, noise.of(rows))) for rows, part in self._parts(images)]
        states = Trajectory(parts)
        for k in range(states.num_steps + 1):
            with self._frozen(), parts[0][1].calls.flags(), torch.no_grad():
                x = states.advance(k)
                in_pixels = isinstance(self.plan, AdaptivePlan) or k == states.num_steps
            yield k, x if in_pixels else 0.5 * x + 0.5
            if states.finished:
                return

    def chain(
        self,
        images: Tensor,
        sample_ids: Any = None,
        draw: int | Tensor = 0,
        noise: Tensor | None = None,
    ) -> AnyChain:
        """The run that `forward` performs with these arguments, checked and ready, not started."""
        return self._chain(images, self._checked(images, sample_ids, draw, noise))

    def _checked(self, images: Tensor, sample_ids: Any, draw: Any, noise: Tensor | None) -> Noise:
        """The noise of a run with these arguments; raises what `forward` says of them."""
        validation.check_images(images)
        choose_ops(self.backend, images)
        check_precision(self.precision, images)
        validation.check_model("score model", self.score_model, images)
        if self._guided:
            validation.check_model("classifier", self.classifier, images)
        ids = validation.sample_ids_of(images, sample_ids)
        draw = validation.draw_of(images, draw)
        needed = self.plan.num_noise
        if noise is not None:
            validation.check_noise(noise, needed, images, self.method)
            recordable = torch.is_inference_mode_enabled() or not noise.is_inference()
            run_noise = Noise(tensors=noise.detach() if recordable else noise.clone())
        else:
            keys = step_keys(self.seed, ids, draw, needed, images[0].numel() if len(ids) else 0)
            run_noise = Noise(keys=keys)
        if self.check_values:
            validation.check_values(images)
        return run_noise

    def _chain(self, images: Tensor, noise: Noise) -> AnyChain:
        ops, tables = choose_ops(self.backend, images), self._tables_for(images)
        network, classifier = self.score_model.network, self.classifier if self._guided else None
        calls = Calls(
            self.score_model,
            classifier,
            self.precision,
            wants_channels_last(self.channels_last, network),
            self.compile_networks,
            self._compiled.form(network, self.compile_networks),
            self._compiled.form(classifier, self.compile_networks),
        )
        if isinstance(self.plan, AdaptivePlan):
            return AdaptiveChain(self.plan, tables, noise, calls, ops)
        return Chain(self.plan, tables, noise, calls, ops, self.guidance_gradient == "full")

    def _tables_for(self, images: Tensor) -> Tables:
        dtype = torch.promote_types(images.dtype, torch.float32)
        key = (images.device, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # later runs may record gradients with them
                self._tables[key] = tables_of(self.plan, *key, self.score_model.time_scale)
        return self._tables[key]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with frozen_parameters(self.score_model, self.score_model.network, self.classifier):
            yield

    def extra_repr(self) -> str:
        options = {"method": self.method, "seed": self.seed, **self.options}
        options |= {name: getattr(self, attribute_of(name)) for name in PURIFIER_OPTIONS}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _plan(method: str, score_model: ScoreModel, options: dict[str, Any]) -> Plan | AdaptivePlan:
    """The method's plan for this model; an unknown option lists both kinds that exist."""
    if method in methods.METHODS:
        known = methods.options(method)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(map(repr, unknown))}; {method} takes "
                f"{', '.join(known)}, and every purifier {', '.join(PURIFIER_OPTIONS)}"
            )
    plan = methods.plan(method, score_model.schedule, score_model.kind, **options)
    if isinstance(plan, Plan):
        validation.check_times(plan.times, score_model.t_max, method)
    return plan


def purify(
    images: Tensor,
    score_model: ScoreModel,
    classifier: Classifier | None = None,
    *,
    method: str = "coup",
    seed: int = 0,
    sample_ids: Any = None,
    draw: int | Tensor = 0,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Purified images, in one call: `Purifier(score_model, classifier, ...)(images, ...)`.

    Arguments, result and errors are those of `Purifier` and its `forward`.
    """
    purifier = Purifier(score_model, classifier, method=method, seed=seed, **options)
    result: Tensor = purifier(images, sample_ids, draw, noise)
    return result
