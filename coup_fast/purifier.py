"""The purifier: the class that users meet, and `purify` in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import checks, methods
from coup_fast._torch.frozen import frozen_parameters
from coup_fast.plan import AnyPlan
from coup_fast.run import validation
from coup_fast.run.diagnosis import diagnose
from coup_fast.run.driver import Drivable
from coup_fast.run.exact_gradient import exact_final_state, straight_through
from coup_fast.run.first_look import look_at_run, looks_of
from coup_fast.run.loop import final_state, joined_states, parts_of
from coup_fast.run.options import RUN_OPTIONS, RunOption, RunOptions, split_options
from coup_fast.run.prepare import Kept, prepare
from coup_fast.run.progress import ProgressOption, Tell, checked, watching
from coup_fast.run.steps import RUNS, Run, State
from coup_fast.score_model import ClassifierFunction, ScoreModel

__all__ = ["Purifier", "purify"]

_compiler_disable: Callable[..., Any] = torch.compiler.disable
_NOT_COMPILED = (
    "the loop of a coup_fast.Purifier is not compiled; compile=True compiles its networks"
)


class Purifier(Drivable, nn.Module):
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
                it was, in the memory of its states and one step (`coup_fast.run.exact_gradient`);
                "autograd": the same from a graph of the whole run, which can be differentiated
                again; "bpda": the purifier's Jacobian is taken as the identity; "none": the
                result is detached;
            states: where the exact gradient keeps the run's states: "device", "host", or "sqrt":
                every √N-th on the device, the others computed once more;
            verify_states: compare each state that the backward pass computes again with the kept
                one, bit for bit;
            graph_memory: bytes that a call's exact gradient may fill with the graphs of its last
                steps, which the backward pass then does not compute again. The gradient is the same
                bit for bit. What a step's graph takes is measured once for each kind of run; steps
                that round differently where gradients are recorded keep none. 0 keeps none.
                `coup_fast.attacks.eot_gradient` fills what its memory budget leaves;
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

    Options of the run are attributes. A call goes by those that are set when it begins; several
    threads may call, and set options, at the same time.

    An image's result depends on the image, the seed, its sample id and its draw; not on its batch,
    as far as that is true of the networks. Without `sample_ids` its id is its position.

    Raises ValueError for an unknown method or option (listing those that exist), or a guided method
    without a classifier; TypeError for a score_model that is not a `ScoreModel`.
    """

    backend = RunOption[str]("backend")
    gradient = RunOption[str]("gradient")
    states = RunOption[str]("states")
    verify_states = RunOption[bool]("verify_states")
    graph_memory = RunOption[int]("graph_memory")
    guidance_gradient = RunOption[str]("guidance_gradient")
    check_values = RunOption[bool]("check_values")
    compile_networks = RunOption[bool | str]("compile")  # `nn.Module.compile` is a method
    cuda_graph = RunOption[bool | str]("cuda_graph")
    precision = RunOption[str]("precision")
    channels_last = RunOption[bool | str]("channels_last")
    max_batch = RunOption[int | None]("max_batch")

    def __init__(
        self,
        score_model: ScoreModel,
        classifier: ClassifierFunction | None = None,
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
        own, of_method = split_options(options)
        self.run_options = RunOptions(**own)
        self.plan = _plan(method, score_model, classifier, of_method)
        self.score_model = score_model
        self.classifier = classifier
        self.method = method
        self.seed = checks.integer("seed", seed, 0, 2**64 - 1)
        self.options = of_method
        self._kept = Kept()

    def with_options(self, **options: Any) -> Purifier:
        """A purifier of the same models and seed with other values of these options.

        Options of the run (`gradient`, `precision`, …) leave the plan as it is. Options of the
        method make it anew.
        """
        own, of_method = split_options(options)
        other = self.with_plan(self.plan)
        other.run_options = replace(self.run_options, **own)
        if of_method:
            other.options = self.options | of_method
            other.plan = _plan(self.method, self.score_model, self.classifier, other.options)
        return other

    def with_plan(self, plan: AnyPlan) -> Purifier:
        """A purifier of the same models, seed and options that runs this plan.

        Raises TypeError for what is no plan, and ValueError for one that needs a classifier that
        there is not, or times that the score model was not trained for.
        """
        if type(plan) not in RUNS:
            raise TypeError(f"plan must be a Plan or an AdaptivePlan, got {type(plan).__name__}")
        _check_plan(plan, self.score_model, self.classifier)
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # submodules, hooks and options are its own from here on
                vars(other)[name] = copy.copy(value)
        other.plan = plan
        kept = self._kept
        other._kept = Kept(compiled=kept.compiled, looks=kept.looks, positions=kept.positions)
        if plan is self.plan:
            other._kept.tables, other._kept.graph_bytes = kept.tables, kept.graph_bytes
        return other

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
        *,
        progress: ProgressOption = None,
    ) -> Tensor:
        """Purified images.

        Args:
            images: [B, C, H, W] pixels in [0, 1]; float32, float16, bfloat16 or float64 (which
                runs in float64, on the reference path).
            sample_ids: integers [B] that name the images to the noise; default 0 … B-1, so calls
                one after the other give the same noise to different images (a warning, once).
                "content": a hash of each image's pixels (as float32), so the same image has the
                same noise everywhere. It changes with every changed bit: an attacker who knows the
                seed can look for images with favourable noise, and an attack's gradient sees
                nothing of it, so attacks and evaluations name images by numbers.
            draw: int >= 0, or int64 [B]: which of an image's independent noises.
            noise: [M, B, C, H, W] with M >= `num_noise`, used in order of need (forward diffusion
                first) instead of generated noise. It is not differentiated.
            progress: called as progress(step, num_steps) after each finished step, in the thread
                of the call: steps 1 to num_steps, over all rounds of the method and all parts of
                `max_batch`. A run that ends early (ADP) tells of its last step at once. What it
                raises ends the call. The result is the same bits with it. On a GPU each step is
                waited for, in captured loops too. Backward passes tell nothing. True: a bar of
                tqdm, where stderr is a terminal or a notebook.

        Returns [B, C, H, W] in the dtype, device and layout of images. Values may leave [0, 1]
        where the method as published does not clamp.

        Raises TypeError or ValueError for bad input and RuntimeError for images on a device without
        kernels, all before any network is called; FloatingPointError if the result is not finite.
        ValueError for models with batch norm or dropout in training mode, RuntimeError for models
        that change their input or themselves, and warnings of what is doubtful (docs/assumptions.md
        has the list); with `gradient="exact"` what else `exact_final_state` lists.
        """
        if (driver := self.driver) is not None:
            sample_ids, draw = driver.noise_of(images, sample_ids, draw)
            purified: Tensor = driver.model(images, sample_ids, draw, noise, progress=progress)
            return purified
        purify_all = self._forward
        if torch.compiler.is_compiling():  # which would unroll the loop, and compile every step
            purify_all = _compiler_disable(purify_all, reason=_NOT_COMPILED)
        return purify_all(images, sample_ids, draw, noise, progress)

    def _forward(
        self,
        images: Tensor,
        sample_ids: Any,
        draw: int | Tensor,
        noise: Tensor | None,
        progress: ProgressOption,
    ) -> Tensor:
        progress = checked(progress)
        run = self.prepare(images, sample_ids, draw, noise)
        if images.numel() == 0:
            detached = run.options.gradient == "none"
            return images.detach().clone() if detached else images.clone()
        parts = parts_of(images, run.options.max_batch)
        memory = run.options.graph_memory // len(parts)
        watched = watching(progress, run.num_steps, len(parts), images.device, self.method)
        with frozen_parameters(*run.models), watched as watch:
            results = [
                self._purified(
                    run.of(rows), part, rows.start, memory, None if watch is None else watch.part(i)
                )
                for i, (rows, part) in enumerate(parts)
            ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def prepare(
        self,
        images: Tensor,
        sample_ids: Any = None,
        draw: int | Tensor = 0,
        noise: Tensor | None = None,
    ) -> Run:
        """The run that `forward` performs with these arguments, checked and ready, not started."""
        if (driver := self.driver) is not None:
            sample_ids, draw = driver.noise_of(images, sample_ids, draw)
        return prepare(
            self.plan,
            self.score_model,
            self.classifier,
            self.run_options,
            images,
            sample_ids,
            draw,
            noise,
            seed=self.seed,
            kept=self._kept,
        )

    def _purified(
        self, run: Run, images: Tensor, first: int, graph_memory: int, tell: Tell | None
    ) -> Tensor:
        """The result for images that start at position `first` of the batch."""
        with run.calls.flags():
            state = self._final_state(run, images, graph_memory, tell)
        if run.options.check_values and bool(run.suspect(state)):
            with torch.no_grad(), run.calls.flags():
                message = diagnose(run, images, first)
            if message is not None:
                raise FloatingPointError(message)
        if run.options.check_values:
            with run.calls.flags():
                by_graph = run.options.gradient in ("exact", "autograd")
                through = _wants_gradient(images) and by_graph
                look_at_run(run, images.detach(), self._kept.looks, differentiated=through)
        result = state[0].to(images.dtype)
        as_it_came = images.is_contiguous(memory_format=torch.channels_last)
        return result.contiguous() if run.calls.channels_last and not as_it_came else result

    def _final_state(self, run: Run, images: Tensor, graph_memory: int, tell: Tell | None) -> State:
        """The state after the last step, differentiable as `gradient` says."""
        wanted, gradient = _wants_gradient(images), run.options.gradient
        if wanted and gradient == "exact":
            return exact_final_state(run, images, graph_memory, self._kept.graph_bytes, tell)
        if wanted and gradient == "autograd":
            return final_state(run, images, tell=tell)
        with torch.no_grad():
            state = self._kept.graphs.final_state(run, images, tell)
            if state is None:
                state = final_state(run, images, run.step_, tell)
        if wanted and gradient == "bpda":
            return (straight_through(images, state[0]), *state[1:])
        return state

    @property
    def graph_reason(self) -> str | None:
        """Why the last run without gradient was not replayed from CUDA graphs; None if it was."""
        return self._kept.graphs.reason

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
        run = self.prepare(images, sample_ids, draw, noise)
        parts = parts_of(images, run.options.max_batch)
        states = joined_states([(run.of(rows), part) for rows, part in parts])

        def shown() -> Iterator[tuple[int, Tensor]]:
            while True:
                with frozen_parameters(*run.models), run.calls.flags(), torch.no_grad():
                    item = next(states, None)
                    if item is None:
                        return
                    k, x = item
                    pixels = x if run.plan.in_pixels(k) else 0.5 * x + 0.5
                yield k, pixels

        return shown()

    def extra_repr(self) -> str:
        options = {"method": self.method, "seed": self.seed, **self.options}
        options |= {name: getattr(self.run_options, name) for name in RUN_OPTIONS}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _wants_gradient(images: Tensor) -> bool:
    return torch.is_grad_enabled() and images.requires_grad


def _plan(
    method: str,
    score_model: ScoreModel,
    classifier: ClassifierFunction | None,
    options: dict[str, Any],
) -> AnyPlan:
    """The method's plan for these models; an unknown option lists both kinds that exist."""
    methods.check_options(method, options, RUN_OPTIONS)
    plan = methods.plan(method, score_model.schedule, score_model.kind, **options)
    _check_plan(plan, score_model, classifier)
    return plan


def _check_plan(
    plan: AnyPlan, score_model: ScoreModel, classifier: ClassifierFunction | None
) -> None:
    """Raises ValueError if these models cannot run the plan."""
    validation.check_times(plan.times, score_model.t_max, plan.method)
    if plan.needs_classifier and classifier is None:
        raise ValueError(
            f"method {plan.method!r} is guided by a classifier and none is given; pass one, or "
            "guidance_scale=0"
        )


def purify(
    images: Tensor,
    score_model: ScoreModel,
    classifier: ClassifierFunction | None = None,
    *,
    method: str = "coup",
    seed: int = 0,
    sample_ids: Any = None,
    draw: int | Tensor = 0,
    noise: Tensor | None = None,
    progress: ProgressOption = None,
    **options: Any,
) -> Tensor:
    """Purified images, in one call: `Purifier(score_model, classifier, ...)(images, ...)`.

    Arguments, result and errors are those of `Purifier` and its `forward`.
    """
    purifier = Purifier(score_model, classifier, method=method, seed=seed, **options)
    purifier._kept.looks = looks_of(score_model, classifier)  # or each call would look again
    result: Tensor = purifier(images, sample_ids, draw, noise, progress=progress)
    return result
