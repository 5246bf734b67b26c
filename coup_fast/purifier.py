"""The purifier: the class that users meet, and `purify` in one call."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coup_fast import checks, methods
from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.modules import described
from coup_fast.options import PurifierOptions, listed
from coup_fast.plan import AnyPlan
from coup_fast.run import validation
from coup_fast.run.diagnosis import diagnose
from coup_fast.run.driver import Drivable
from coup_fast.run.exact_gradient import exact_final_state, straight_through
from coup_fast.run.first_look import look_at_run, looks_of
from coup_fast.run.loop import final_state, parts_of, states_of_parts
from coup_fast.run.options import (
    RUN_OPTIONS,
    AutoFlag,
    Backend,
    Compile,
    Gradient,
    GuidanceGradient,
    Precision,
    RunOption,
    RunOptions,
    States,
    split_options,
)
from coup_fast.run.prepare import Kept, prepare
from coup_fast.run.progress import ProgressOption, Tell, checked, watching
from coup_fast.run.steps import RUNS, Run, State
from coup_fast.score_model import ClassifierFunction, ScoreModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Purifier", "purify"]

_compiler_disable: Callable[..., Any] = torch.compiler.disable
_NOT_COMPILED = (
    "the loop of a coup_fast.Purifier is not compiled; compile=True compiles its networks"
)


@listed
class Purifier(Drivable, nn.Module):
    """Cleans attacked images with a score model: COUP, ADP, DiffPure and their relatives.

    Args:
        score_model: a `ScoreModel`.
        classifier: module or callable, pixels [B, C, H, W] -> logits [B, K]. It is the plain
            classifier that is defended, and only guided methods need it.
        method: a name in `coup_fast.methods`.
        seed: int in [0, 2^64); with an image's sample id and draw it decides that image's noise.
        **options: options of the run (`coup_fast.options.PurifierOptions`) and of the method
            (`coup_fast.options.MethodOptions`).

    Both models are used as they are. Their parameters are not differentiated, and train/eval mode
    and requires_grad flags stay as they are. The flags are off during a run, in all threads, so
    training a model in another thread meanwhile records no gradients. If the images require grad,
    the result is differentiable. Otherwise the run holds one state, which each step overwrites, so
    a network that keeps its input must keep a copy.

    Options of the run are attributes. A call goes by those that are set when it begins. Several
    threads may call, and set options, at the same time.

    An image's result depends on the image, the seed, its sample id and its draw. It does not depend
    on its batch, as far as that is true of the networks. Without `sample_ids` an image's id is its
    position.

    Raises:
        ValueError: the method or an option is unknown (the message lists those that exist), an
            option is out of range, or a guided method has no classifier.
        TypeError: score_model is not a `ScoreModel`, or an option is of the wrong kind.
    """

    backend = RunOption[Backend]("backend")
    gradient = RunOption[Gradient]("gradient")
    states = RunOption[States]("states")
    verify_states = RunOption[bool]("verify_states")
    graph_memory = RunOption[int]("graph_memory")
    guidance_gradient = RunOption[GuidanceGradient]("guidance_gradient")
    check_values = RunOption[bool]("check_values")
    compile_networks = RunOption[Compile]("compile")  # `nn.Module.compile` is a method
    cuda_graph = RunOption[AutoFlag]("cuda_graph")
    precision = RunOption[Precision]("precision")
    channels_last = RunOption[AutoFlag]("channels_last")
    max_batch = RunOption[int | None]("max_batch")

    def __init__(
        self,
        score_model: ScoreModel,
        classifier: ClassifierFunction | None = None,
        *,
        method: str = "coup",
        seed: int = 0,
        **options: Unpack[PurifierOptions],
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

    def with_options(self, **options: Unpack[PurifierOptions]) -> Purifier:
        """A purifier of the same models and seed with other values of these options.

        Options of the run (`gradient`, `precision`, …) leave the plan as it is. Options of the
        method make it anew.

        Raises:
            TypeError: as `Purifier` does for the same options.
            ValueError: as `Purifier` does for the same options.
        """
        own, of_method = split_options(options)
        joined, plan = self.options | of_method, self.plan
        if of_method:
            plan = _plan(self.method, self.score_model, self.classifier, joined)
        other = self.with_plan(plan)
        other.run_options = replace(self.run_options, **own)
        other.options = joined
        return other

    def with_plan(self, plan: AnyPlan) -> Purifier:
        """A purifier of the same models, seed and options that runs this plan.

        Args:
            plan: what a function of `coup_fast.methods` returns, or a plan of your own.

        Raises:
            TypeError: plan is no plan.
            ValueError: the plan needs a classifier that there is not, or times that the score model
                was not trained for.
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
            sample_ids: integers [B] that name the images to the noise. The default is 0 … B-1, so
                successive calls give the same noise to different images (a warning says so, once).
                "content" takes a hash of each image's pixels (as float32), so the same image has
                the same noise everywhere. The hash changes with every changed bit: an attacker who
                knows the seed can look for images with favourable noise, and an attack's gradient
                does not see it. So attacks and evaluations name images by numbers.
            draw: int >= 0, or int64 [B]: which of an image's independent noises to take.
            noise: [M, B, C, H, W] with M >= `num_noise`, used in order of need (forward diffusion
                first) instead of generated noise. It is not differentiated.
            progress: a function that is called as progress(step, num_steps) after each finished
                step, in the thread of the call. Steps go from 1 to num_steps, over all rounds of
                the method and all parts of `max_batch`. A run that ends early (ADP) reports its
                last step at once. An error that it raises ends the call. The result has the same
                bits with it. On a GPU each step is waited for, in captured loops too. Backward
                passes report nothing. True shows a bar of tqdm, where stderr is a terminal or a
                notebook.

        Doubtful models cause warnings; docs/assumptions.md has the list.

        Returns:
            [B, C, H, W] in the dtype, device and layout of images. Values may leave [0, 1] where
            the method as published does not clamp.

        Raises:
            TypeError: bad input, before any network is called.
            ValueError: bad input, before any network is called, or a model with batch norm or
                dropout in training mode.
            RuntimeError: the images are on a device without kernels, or a model changes its input
                or itself. With `gradient="exact"` also what `exact_final_state` lists.
            FloatingPointError: the result is not finite.
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
        """The run that `forward` performs with these arguments: checked, ready and not started."""
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
        by_graph = run.options.gradient in ("exact", "autograd")
        self._check_end(run, images, first, state, _wants_gradient(images) and by_graph)
        result = state[0].to(images.dtype)
        as_it_came = images.is_contiguous(memory_format=torch.channels_last)
        return result.contiguous() if run.calls.channels_last and not as_it_came else result

    def _check_end(
        self, run: Run, images: Tensor, first: int, state: State, differentiated: bool
    ) -> None:
        """Look at the final state and, once for each kind of run, at the models."""
        if not run.options.check_values:
            return
        with run.calls.flags():
            if bool(run.suspect(state)):
                with torch.no_grad():
                    message = diagnose(run, images, first)
                if message is not None:
                    raise FloatingPointError(message)
            look_at_run(run, images.detach(), self._kept.looks, differentiated=differentiated)

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

        k = 0 is the start (after the forward noise, where the method has one), and the last state
        is the result. The arguments are those of `forward`. Nothing is differentiated or clamped. A
        method that works in diffusion space shows (x+1)/2. Errors and warnings are those of
        `forward`; what a run is looked at for when it has ended is said after the last state.
        """
        run = self.prepare(images, sample_ids, draw, noise)
        parts = parts_of(images, run.options.max_batch)
        runs = [(run.of(rows), part) for rows, part in parts]
        states = states_of_parts(runs)

        def shown() -> Iterator[tuple[int, Tensor]]:
            latest: list[State] = []
            while True:
                with frozen_parameters(*run.models), run.calls.flags(), torch.no_grad():
                    item = next(states, None)
                    if item is None:
                        break
                    k, latest = item
                    x = torch.cat([state[0] for state in latest])
                    pixels = x if run.plan.in_pixels(k) else 0.5 * x + 0.5
                yield k, pixels
            for (part, its_images), (rows, _), state in zip(runs, parts, latest, strict=True):
                with frozen_parameters(*run.models):
                    self._check_end(part, its_images, rows.start, state, differentiated=False)

        return shown()

    def __repr__(self) -> str:
        usual = vars(RunOptions())
        own = {k: v for k, v in vars(self.run_options).items() if k == "gradient" or v != usual[k]}
        facts = {"method": self.method, "seed": self.seed, **self.options}
        if (t_star := methods.options(self.method).get("t_star")) is not None:
            facts.setdefault("t_star", t_star)
        facts |= own
        said = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in facts.items())
        return (
            f"{type(self).__name__}({said})\n"
            f"  plan: {self.plan}\n"
            f"  score_model: {self.score_model}\n"
            f"  classifier: {None if self.classifier is None else described(self.classifier)}"
        )


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
    validation.check_whole_times(plan.times, score_model, plan.method)
    if plan.needs_classifier and classifier is None:
        raise ValueError(
            f"method {plan.method!r} is guided by a classifier and none is given; pass one, or "
            "guidance_scale=0"
        )


@listed
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
    **options: Unpack[PurifierOptions],
) -> Tensor:
    """Purified images, in one call: `Purifier(score_model, classifier, ...)(images, ...)`.

    Arguments, result and errors are those of `Purifier` and its `forward`.
    """
    purifier = Purifier(score_model, classifier, method=method, seed=seed, **options)
    purifier._kept.looks = looks_of(score_model, classifier)  # or each call would look again
    result: Tensor = purifier(images, sample_ids, draw, noise, progress=progress)
    return result
