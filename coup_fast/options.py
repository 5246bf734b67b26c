"""The options of `coup_fast.purify` and `coup_fast.Purifier`: their types, and what they mean.

Type checkers and editors read `PurifierOptions` wherever options are handed on:

    options: PurifierOptions = {"t_star": 0.1, "solver": "exponential"}
    purifier = coup_fast.Purifier(score_model, classifier, method="coup", **options)

The types allow what any method takes; whether this method takes it is checked at run time. `help`
of a `listed` function shows these docstrings beside the defaults of each method.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any, TypedDict, TypeVar

from coup_fast import methods
from coup_fast.methods.adp import NoiseVariant
from coup_fast.methods.ancestral import Variance
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
        guidance_norm: "none", "normalised" (each sample's gradient divided by its norm) or
            "clipped" (scaled down to guidance_max_norm where its norm is larger).
        guidance_max_norm: the largest norm of a sample's gradient, > 0, with "clipped" only.
        forward_noise: diffuse the image to t_star before the first step.
        solver: "euler" as published, or "exponential" for 10 to 20 steps.
        clip_denoised: clamp the predicted clean image to [-1, 1] at each step.
        clamp_output: clamp the result to valid pixels.
        sigma2: σ² > 0, the variance of the tie to the attacked image.
        lambda_ld: λ > 0, the rate of the Langevin dynamics.
        eta: scale of the noise: in [0, 1] for ddim and gradual, >= 0 for ldsde.
        variance: "fixed-small" (posterior), "fixed-large" (β) or "learned" (2C-channel networks).
        rounds: how often to diffuse and denoise (gdmp), or the number of indices of each round
            (gradual).
        mse_scale: the released guide scale of the gradient towards the attacked image, >= 0.
        ptb: the attack's ε in units of 1/255, in (0, 255].
        image_shape: C, H, W of the images over which the squared error is averaged.
        stride: use every stride-th index of a round, at least 1.
        sigma: noise level on pixels: >= 0 for adp; > 0 for one-shot, where None means 0.25 unless
            t_star is given.
        noise_variant: "gaussian", or "binary": ±σ√(2/π).
        step_lambda: λ > 0, from which the step size follows.
        delta: δ > 0, how far ahead the second score is taken.
        tau: τ >= 0; a sample stops for good once its step size is at most τ.
        alpha_min: smallest step size, >= 0.
        alpha_max: largest step size, >= alpha_min.
        pixel_map_every_step: map pixels for the network at every step, as released; False: at the
            first step only.
    """

    t_star: float | None
    num_steps: int | None
    step_size: float | None
    guidance_scale: float
    guidance_norm: GuidanceNorm
    guidance_max_norm: float | None
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
        backend: "auto" (compiled operators; plain PyTorch for float64 images or without the
            extension), "compiled" or "reference".
        gradient: of a result with respect to images that require grad. "exact": of the run as it
            was, in the memory of its states and one step (`coup_fast.run.exact_gradient`);
            "autograd": the same from a graph of the whole run, which can be differentiated again;
            "bpda": the purifier's Jacobian is taken as the identity; "none": the result is
            detached.
        states: where the exact gradient keeps the run's states: "device", "host", or "sqrt": every
            √N-th on the device, the others computed once more.
        verify_states: compare each state that the backward pass computes again with the kept one,
            bit for bit.
        graph_memory: bytes that a call's exact gradient may fill with the graphs of its last steps,
            which the backward pass then does not compute again. The gradient is the same bit for
            bit. What a step's graph takes is measured once for each kind of run; steps that round
            differently where gradients are recorded keep none. 0 keeps none.
            `coup_fast.attacks.eot_gradient` fills what its memory budget leaves.
        guidance_gradient: "full" differentiates through the guidance to second order; "stopped"
            treats it as a constant, as the released COUP attack does.
        check_values: look for NaN and pixels outside [0, 1] before the run, and for inf and NaN
            after it. Each look waits for the device once; False never waits.
        compile: call the networks through `torch.compile` (True, or the name of one of its modes).
            Values are those of the networks up to rounding. Where the gradient through the
            guidance is "full", the exact gradient differentiates the classifier as it is. This is
            the way to compiled networks: `torch.compile` of a model around a purifier leaves the
            purifier's loop alone.
        cuda_graph: of runs without gradient: capture a step (network, classifier and its
            vector-Jacobian product on a second stream, update) once per kind of run and replay it
            for every step. "auto": on CUDA, from the second run of its kind, where the models are
            modules and can be captured; `graph_reason` says why not. True: at once, or an error. A
            replay knows nothing of what else the models would have done: hooks, prints, values of
            Python attributes at the time of a call.
        precision: of the networks; state, step and noise are float32 in each. "fp32": float32 with
            PyTorch's own flags as they are set (by default cuDNN's convolutions may use TF32).
            "tf32": TF32 in products and convolutions; needs a GPU. "bf16": autocast to bfloat16
            around each network call (works, slowly, on CPUs without bfloat16 instructions).
        channels_last: the state's memory format, and so that of the networks' inputs: True, False
            (as the images come), or "auto": where the score network's convolutions store their
            weights so (`module.to(memory_format=torch.channels_last)`).
        max_batch: images at a time; a larger batch is run in parts, one after the other, and so is
            its gradient. None: all at once. Each image keeps its noise, so results are those of
            the whole batch, bit for bit if the networks' own do not depend on the batch (the
            convolutions of libraries may, in their last bits).
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


def listed(function: T) -> T:
    """A decorator that adds to a docstring all options, with the methods that take them."""
    if function.__doc__ is not None:  # as it is under python -OO
        function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\n{_listing()}"
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
