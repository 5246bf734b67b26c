"""Whole purification loops as cases: ours and those of others, with the same models, in one run.

Times are of a run from images to images; `steps` divides them. The models' own calls, made as often
as the loop makes them and nothing else, are the limit that no loop can beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coup_fast import Purifier, ScoreModel, methods, ops
from coup_fast.benchmarking import components
from coup_fast.benchmarking.case import (
    FLOAT,
    Build,
    Case,
    Variant,
    VariantUnavailable,
    normals_limit,
    require_close,
)
from coup_fast.benchmarking.loop_rivals import (
    Loop,
    Replay,
    diffusers_loop,
    guide_of,
    plain_loop,
    torchsde_loop,
)
from coup_fast.benchmarking.networks import Constant, Models, load, random_tensor
from coup_fast.noise import step_keys
from coup_fast.schedules import DiscreteSchedule, VPSchedule

OURS, PLAIN, TORCHSDE = "coup_fast", "plain PyTorch", "torchsde sdeint"
OURS_BF16 = "coup_fast, precision='bf16'"
RELEASED, TRAINABLE = "released code (sdeint_adjoint)", "released code, weights trainable"
DIFFUSERS = "diffusers DDPMScheduler"
CALLS = "its network calls alone"

Makers = Mapping[str, Callable[[], Loop]]


@dataclass(frozen=True)
class LoopSpec:
    """A kind of loop with the models called `network`.

    kind: "coup" (guided), "diffpure" (not guided), "ddpm", or "gradient": diffpure's loop and its
    gradient with respect to the images.
    """

    kind: str
    network: str
    steps: int

    @property
    def guided(self) -> bool:
        """Steps are guided by the classifier."""
        return self.kind == "coup"


def our_loop(
    spec: LoopSpec, models: Models, constant: Tensor, **options: Any
) -> Callable[..., Tensor]:
    """The functional purifier with its defaults; without forward noise, as the rivals.

    It takes images, and optionally `noise`. Guided steps of models without cost are guided by
    `constant`, which takes a loop of its own: a purifier wants a classifier.
    """
    t_star = spec.steps / 1000
    if spec.guided and models.classifier is None:
        return steps_loop(t_star, models, constant)
    if spec.kind == "ddpm":
        score_model = ScoreModel(models.network, "eps", DiscreteSchedule(), time_scale=1000.0)
    else:
        score_model = ScoreModel(models.network, "eps", VPSchedule())
    return Purifier(
        score_model,
        models.classifier,
        method="diffpure" if spec.kind == "gradient" else spec.kind,
        t_star=t_star,
        forward_noise=False,
        clamp_output=False,
        **options,
    )


def steps_loop(t_star: float, models: Models, guidance: Tensor | None) -> Callable[..., Tensor]:
    """The steps of COUP's loop with this guidance; takes images and optionally `noise`."""
    plan = methods.coup(VPSchedule(), "eps", t_star=t_star, clamp_output=False)
    table = torch.from_numpy(plan.coeffs).float()

    @torch.no_grad()
    def run(images: Tensor, noise: Tensor | None = None) -> Tensor:
        batch, device = len(images), images.device
        rows = table.to(device).unbind(0)
        keys = step_keys(0, range(batch), 0, len(rows), images[0].numel()).to(device)
        pull = None if guidance is None else guidance[:batch]
        x, time = 2.0 * images - 1.0, torch.zeros(batch, device=device)
        for k, row in enumerate(rows):
            z = None if noise is None else noise[k]
            ops.reverse_step_(x, models.network(x, time), row, keys[k], pull, None, z)
        return x

    return run


def _gradient_of(loop: Loop) -> Loop:
    def run(images: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loop(leaf).sum(), leaf)
        return gradient

    return run


def _makers(spec: LoopSpec, models: Models, constant: Tensor) -> Makers:
    """Each way to run the loop, by name, ours first; calling one makes it ready."""
    steps, guided = spec.steps, spec.guided

    def ours() -> Loop:
        return our_loop(spec, models, constant)

    def plain() -> Loop:
        guide = guide_of(models, guided, constant)
        return plain_loop(models, steps, guide, record=spec.kind == "gradient")

    def solver() -> Loop:
        return torchsde_loop(models, steps, guided, constant)

    def released() -> Loop:
        return torchsde_loop(models, steps, guided, constant, released=True)

    def trainable() -> Loop:
        return torchsde_loop(models, steps, guided, constant, released=True, trainable=True)

    if spec.kind == "ddpm":
        return {OURS: ours, DIFFUSERS: lambda: diffusers_loop(models, steps)}
    if spec.kind == "gradient":  # torchsde's sdeint would record the run, as plain PyTorch does
        return {
            OURS: lambda: _gradient_of(ours()),
            PLAIN: lambda: _gradient_of(plain()),
            RELEASED: lambda: _gradient_of(released()),
            TRAINABLE: lambda: _gradient_of(trainable()),
        }
    makers = {OURS: ours, PLAIN: plain, TORCHSDE: solver, RELEASED: released}
    if models.free:
        return makers
    if constant.device.type == "cuda":
        makers[OURS_BF16] = lambda: our_loop(spec, models, constant, precision="bf16")
    return makers | {TRAINABLE: trainable}


def loop_case(spec: LoopSpec, batch: int, device: torch.device) -> Case:
    """The loops of `spec` on `batch` images."""
    models = load(spec.network, device, batch if spec.network == "none" else 1)
    shape = (batch, *models.shape)
    images = torch.sigmoid(random_tensor(shape, 2, device))
    constant = random_tensor(shape, 3, device)

    def variant(name: str, make: Callable[[], Loop]) -> Variant:
        def build() -> Callable[[], object]:
            loop = make()
            return lambda: loop(images)

        return Variant(name, build)

    def watch(runs: int) -> dict[str, dict[str, float]]:
        def seen_makers(seen: Models) -> Makers:
            # What a graph replays cannot be watched: host gaps of the eager loop are in its rest.
            eager: Callable[[], Loop] = partial(our_loop, spec, seen, constant, cuda_graph=False)
            makers = {**_makers(spec, seen, constant), OURS: eager}
            makers.pop(OURS_BF16, None)
            return makers

        alone = _steps_alone(spec, images, constant)
        return components.measure(models, seen_makers, alone, images, runs)

    limits: dict[str, Build] = {}
    if models.free:
        noise = normals_limit(batch, math.prod(models.shape), device)
        limits |= {name: _repeated(build, spec.steps) for name, build in noise.items()}
    elif spec.kind != "gradient":
        limits[CALLS] = lambda: _calls_alone(spec, models, images)
    tensors = 4 if spec.guided else 3  # x, eps (, G) and the result
    title = {"gradient": "diffpure loop and gradient"}.get(spec.kind, f"{spec.kind} loop")
    return Case(
        f"{title}, {models.label}",
        batch,
        "x".join(map(str, models.shape)),
        images.numel(),
        spec.steps * tensors * FLOAT * images.numel(),
        device,
        lambda: _check(spec, models, images[:2], constant),
        tuple(variant(name, make) for name, make in _makers(spec, models, constant).items()),
        limits,
        spec.steps,
        watch if spec.kind in ("coup", "diffpure") and not models.free else None,
    )


def _repeated(build: Build, times: int) -> Build:
    def built() -> Callable[[], object]:
        function = build()
        return lambda: [function() for _ in range(times)]

    return built


def _calls_alone(spec: LoopSpec, models: Models, images: Tensor) -> Callable[[], object]:
    """The network, and for a guided loop the classifier's gradient, once per step."""
    guide = guide_of(models, spec.guided, images)
    x, time = 2.0 * images - 1.0, torch.full((len(images),), 50.0, device=images.device)

    @torch.no_grad()
    def run() -> None:
        for _ in range(spec.steps):
            models.network(x, time)
            if guide is not None:
                guide(x)

    return run


def _steps_alone(
    spec: LoopSpec, images: Tensor, constant: Tensor
) -> dict[str, Callable[[], object]]:
    """All steps of our loop and of the plain one, given what the models return."""
    free = Models("", (0, 0, 0), Constant(constant), None)
    ours = steps_loop(spec.steps / 1000, free, constant if spec.guided else None)
    plain = plain_loop(free, spec.steps, guide_of(free, spec.guided, constant))
    return {OURS: lambda: ours(images), PLAIN: lambda: plain(images)}


def _check(spec: LoopSpec, models: Models, images: Tensor, constant: Tensor) -> None:
    """Every loop gives our result under the same noise, and so the same gradient where exact."""
    if spec.kind == "ddpm":
        _check_ddpm(spec, models, images, constant)
        return
    z = random_tensor((spec.steps, *images.shape), 4, images.device)
    ours = our_loop(spec, models, constant)
    if spec.kind == "gradient":
        plain = plain_loop(models, spec.steps, None, draw=_in_order(z), record=True)
        exact = _gradient_of(lambda leaf: ours(leaf, noise=z))(images)
        loose = 100.0 if images.device.type == "cuda" else 1.0
        bound = loose * 2e-5 * float(exact.abs().max())
        require_close("plain PyTorch's gradient", _gradient_of(plain)(images), exact, bound)
        return
    expected = ours(images, noise=z)
    loose = 100.0 if images.device.type == "cuda" else 1.0  # networks may run in TF32 there
    bound = loose * 1e-5 * float(expected.abs().max())
    plain = plain_loop(models, spec.steps, guide_of(models, spec.guided, constant), _in_order(z))
    require_close(PLAIN, plain(images), expected, bound)
    for name, released in ((TORCHSDE, False), (RELEASED, True)):
        path = Replay(list(z))
        try:
            loop = torchsde_loop(
                models, spec.steps, spec.guided, constant, released=released, path=path
            )
        except VariantUnavailable:
            return
        # torchsde adds up its times in float32, and 1/σ is steep at the end
        require_close(name, loop(images), expected, 20 * bound)


def _in_order(noise: Tensor) -> Callable[[Tensor], Tensor]:
    remaining = iter(noise)
    return lambda x: next(remaining)


def _check_ddpm(spec: LoopSpec, models: Models, images: Tensor, constant: Tensor) -> None:
    generator, again = (torch.Generator(images.device).manual_seed(5) for _ in range(2))
    try:
        result = diffusers_loop(models, spec.steps, generator)(images)
    except VariantUnavailable:
        return
    drawn = [
        torch.randn(images.shape, generator=again, device=images.device) for _ in range(spec.steps)
    ]
    expected = our_loop(spec, models, constant)(images, noise=torch.stack(drawn))
    # diffusers' float32 tables: 1 - ᾱ has five digits at low noise
    require_close(DIFFUSERS, result, expected, 5e-4 * float(expected.abs().max()))
