"""The options of `coup_fast.purify` and `coup_fast.Purifier`: their types, and what they mean.

Type checkers and editors read `PurifierOptions` wherever options are handed on:

    options: PurifierOptions = {"t_star": 0.1, "solver": "exponential"}
    purifier = coup_fast.Purifier(score_model, classifier, method="coup", **options)

The types allow what any method takes. Whether the chosen method takes it is checked at run time. A
method that you add to `METHODS` may have options that are not here; type checkers let them pass in
a `dict[str, Any]`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from inspect import Parameter
from typing import Any, TypedDict, TypeVar

from coup_fast import methods
from coup_fast.methods.adp import NoiseVariant
from coup_fast.methods.ancestral import Variance
from coup_fast.methods.network_and_guidance import GuidanceSolver
from coup_fast.methods.sde import Solver
from coup_fast.reference import GuidanceNorm
from coup_fast.run.options import (
    AutoFlag,
    Backend,
    Compile,
    Gradient,
    GuidanceGradient,
    Precision,
    RunOptions,
    States,
)

__all__ = ["MethodOptions", "PurifierOptions"]

T = TypeVar("T", bound=Callable[..., Any])


class MethodOptions(TypedDict, total=False):
    """The options of all methods; `coup_fast.methods.options(name)` has those of one.

    Attributes:
        t_star: time to start from, in (0, 1].
        num_steps: steps of a run, at least 1; None: as many as published.
        step_size: length of a step in time, instead of num_steps; None: the published one.
        guidance_scale: λ >= 0, the weight of the classifier's confidence; 0 needs no classifier.
        guidance_norm: "none"; "normalised" divides each sample's gradient by its norm; "clipped"
            scales it down to guidance_max_norm where its norm is larger.
        guidance_max_norm: the largest norm of a sample's gradient, > 0; with "clipped" only.
        guidance_solver: "explicit" as published, or "stable", which cannot overshoot however large
            guidance_scale is (ours and not published; docs/guidance.md).
        forward_noise: diffuse the image to t_star before the first step.
        solver: "euler" as published, or "exponential" for 10 to 20 steps.
        clip_denoised: clamp the predicted clean image to [-1, 1] at each step.
        clamp_output: clamp the result to valid pixels.
        sigma2: σ² > 0, the variance of the tie to the attacked image.
        lambda_ld: λ > 0, the rate of the Langevin dynamics.
        eta: scale of the noise; in [0, 1] for ddim and gradual, >= 0 for ldsde; for langevin the
            standard deviation of a step's noise, >= 0.
        variance: "fixed-small" (of the posterior), "fixed-large" (β) or "learned" (by a network
            with 2C output channels).
        rounds: for gdmp, how often to diffuse and denoise, at least 1; for gradual, the number of
            indices of each round, in [1, N].
        mse_scale: scale of the gradient towards the attacked image as released, >= 0.
        ptb: ε of the attack in units of 1/255, in (0, 255].
        image_shape: C, H, W of the images over which the squared error is averaged.
        stride: use every stride-th index of a round, at least 1.
        sigma: noise level on pixels; for adp >= 0; for one-shot > 0, where None means 0.25 unless
            t_star is given; for flowpure that of the path's start, where None means 0.3, or 0 on a
            path from attacked images.
        sigmas: noise levels on pixels, > 0 and falling, one for each call of the denoiser.
        t_start: where on the path to start, in [0, 1): the image gets (1 - t_start) sigma of
            noise; None means 1/2, or 0 on a path from attacked images.
        gradient_scale: weight of the energy's gradient in a step, > 0.
        noise_variant: "gaussian", or "binary", which is ±σ√(2/π).
        step_lambda: λ > 0, to which the step size is proportional.
        delta: δ > 0, how far ahead the second score is taken.
        tau: τ >= 0; a sample stops for good once its step size is at most τ.
        alpha_min: the smallest step size, >= 0.
        alpha_max: the largest step size, >= alpha_min.
        pixel_map_every_step: map pixels for the network at every step, as released; False: at the
            first step only.
    """

    t_star: float | None
    num_steps: int | None
    step_size: float | None
    guidance_scale: float
    guidance_norm: GuidanceNorm
    guidance_max_norm: float | None
    guidance_solver: GuidanceSolver
    forward_noise: bool
    solver: Solver
    clip_denoised: bool
    clamp_output: bool
    sigma2: float
    lambda_ld: float
    eta: float
    variance: Variance
    rounds: int | Sequence[int]
    mse_scale: float
    ptb: float
    image_shape: Sequence[int]
    stride: int
    sigma: float | None
    sigmas: Sequence[float]
    t_start: float | None
    gradient_scale: float
    noise_variant: NoiseVariant
    step_lambda: float
    delta: float
    tau: float
    alpha_min: float
    alpha_max: float
    pixel_map_every_step: bool


class PurifierOptions(MethodOptions, total=False):
    """The options of a run, which every purifier takes, beside those of its method.

    Attributes:
        backend: "auto" runs the compiled operators, and plain PyTorch for float64 images or where
            the extension is missing; "compiled" and "reference" insist on one of the two.
        gradient: how a result is differentiated by images that require grad. "exact" differentiates
            the run as it was, in the memory of its states and one step
            (`coup_fast.run.exact_gradient`). "autograd" does the same from a graph of the whole
            run, which can be differentiated again. "bpda" takes the purifier's Jacobian as the
            identity. "none" detaches the result.
        states: where the exact gradient keeps the run's states: on the "device" or on the "host";
            "sqrt" keeps every √N-th on the device and computes the others once more.
        verify_states: compare each state that the backward pass computes again with the kept one,
            bit for bit.
        graph_memory: bytes that a call's exact gradient may fill with the graphs of its last steps,
            which the backward pass then does not compute again. The gradient is the same bit for
            bit. What a step's graph takes is measured once for each kind of run; steps that round
            differently where gradients are recorded keep none. 0 keeps none.
            `coup_fast.attacks.eot_gradient` fills what its memory budget leaves.
        guidance_gradient: "full" differentiates through the guidance to second order; "stopped"
            treats it as a constant, as the released COUP attack does.
        check_values: look for NaN and pixels outside [0, 1] before the run, for inf and NaN after
            it, at the models after the first run of a kind, and at the last step that the backward
            pass computes again. Each look waits for the device; False never waits.
        compile: call the networks through `torch.compile`; True, or the name of one of its modes.
            Values are those of the networks up to rounding. Where the gradient through the guidance
            is "full", the exact gradient differentiates the classifier as it is. Use this option to
            compile networks: `torch.compile` of a model around a purifier does not compile the
            purifier's loop.
        cuda_graph: for runs without gradient, capture a step (network, classifier and its
            vector-Jacobian product on a second stream, update) once per kind of run and replay it
            for every step. "auto" does so on CUDA from the second run of its kind, where the models
            are modules and can be captured; `graph_reason` says why not. True does so at once, or
            raises an error. A replay does nothing else that the models would have done: hooks,
            prints, and values of Python attributes are those of the capture.
        precision: of the networks; state, step and noise are float32 in each. "fp32" is float32
            with PyTorch's own flags as they are set (by default cuDNN's convolutions may use TF32).
            "tf32" uses TF32 in products and convolutions, and needs a GPU. "bf16" is autocast to
            bfloat16 around each network call; it works, slowly, on CPUs without bfloat16
            instructions.
        channels_last: the memory format of the state and so of the networks' inputs: True, False
            (as the images come), or "auto", which is True where the score network's convolutions
            store their weights so (`module.to(memory_format=torch.channels_last)`).
        max_batch: images at a time, at least 1. A larger batch is run in parts, one after the
            other, and so is its gradient. None runs all at once. Each image keeps its noise, so
            results are those of the whole batch, bit for bit if the networks' own do not depend on
            the batch (those of libraries' convolutions may, in their last bits).
    """

    backend: Backend
    gradient: Gradient
    states: States
    verify_states: bool
    graph_memory: int
    guidance_gradient: GuidanceGradient
    check_values: bool
    compile: Compile
    cuda_graph: AutoFlag
    precision: Precision
    channels_last: AutoFlag
    max_batch: int | None


class _OfMethod:
    """Stands for a default that the method decides."""

    def __repr__(self) -> str:
        return "…"


def listed(function: T) -> T:
    """A decorator that names all options of a function with `**options`, or of a class.

    Its docstring lists them, and its signature has them as parameters, because notebooks complete
    what `inspect.signature` shows and cannot read `Unpack`.
    """
    if function.__doc__ is not None:  # as it is under python -OO
        function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\n{_listing()}"
    called: Any = vars(function)["__init__"] if isinstance(function, type) else function
    signature = inspect.signature(called)
    *own, keywords = signature.parameters.values()
    usual, decided = RunOptions(), _OfMethod()
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=getattr(usual, name, decided))
        for name in PurifierOptions.__annotations__
    ]
    called.__signature__ = signature.replace(parameters=[*own, *options, keywords])
    return function


@lru_cache(maxsize=1)
def _listing() -> str:
    """Every option: what it means, and below that each default and the methods that have it."""
    lines = ["Options that every method takes:"]
    meanings = _meanings(PurifierOptions)
    for field in fields(RunOptions):
        lines += _entry(field.name, meanings[field.name], [f"default {field.default!r}"])
    lines += ["", "Options that some methods take:"]
    of_methods = {method: methods.options(method) for method in methods.METHODS}
    for option, meaning in _meanings(MethodOptions).items():
        takers: dict[str, list[str]] = {}
        for method, defaults in of_methods.items():
            if option in defaults:
                takers.setdefault(repr(defaults[option]), []).append(method)
        defaults_of = [
            f"default {default}: {', '.join(names)}" for default, names in takers.items()
        ]
        lines += _entry(option, meaning, defaults_of)
    return "\n".join(lines)


def _meanings(options: type) -> dict[str, str]:
    """What the docstring of a class above says of each option."""
    text = inspect.cleandoc(options.__doc__ or "")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def _entry(option: str, meaning: str, defaults: Sequence[str]) -> list[str]:
    """The lines on an option."""
    wrapped = partial(textwrap.wrap, width=96, break_on_hyphens=False)
    lines = wrapped(f"{option}: {meaning}", initial_indent=" " * 4, subsequent_indent=" " * 8)
    for default in defaults:
        lines += wrapped(default, initial_indent=" " * 8, subsequent_indent=" " * 12)
    return lines
