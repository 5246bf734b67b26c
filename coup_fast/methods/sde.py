"""Methods that integrate the reverse VP-SDE: COUP, DiffPure, its ODE and its Langevin ablation.

One step from t to t' = t - h with noise level ᾱ, σ at t, score s = -ε/σ and guidance g
(the confidence gradient) entering as s + λ g:

    euler        x' = (1 + ½βh) x + βh (s + λg) + √(βh) z
    ODE, euler   x' = (1 + ½βh) x + ½βh (s + λg)
    exponential  x' ~ q(x_t' | x_t, x̂0), the linear part in closed form with x̂0 held

The exponential step. With x̂0 = (x + (1-ᾱ) s)/√ᾱ held over the step instead of the score, the
reverse SDE dx = (½βx + βs) dτ + √β dw (τ running backwards) is linear:
dx = (½β - β/(1-ᾱ)) x dτ + β√ᾱ/(1-ᾱ) x̂0 dτ + √β dw. That is a diffusion bridge, and its exact
solution is the Gaussian posterior of Ho et al. 2020, eq. 7: DDIM with η = 1. For the probability
flow ODE the same exchange gives DDIM with η = 0 (there with ε held). Guidance is part of the score,
so it moves x̂0 by λ (1-ᾱ)/√ᾱ g, which is held with it. As h → 0 all of it is Euler's step to first
order, so both solvers converge to the same law. With few steps they err differently: Euler leaves
the noise of its last step in the image, the exponential step draws towards the mean of what could
be there. That is why it is usable at 10 to 20 steps.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from .. import checks
from ..plan import (
    C,
    D,
    E,
    Plan,
    Prediction,
    Rows,
    blank_row,
    ddim,
    make_plan,
    network_row,
    start_row,
)
from ..reference import GuidanceNorm
from ..schedules import Array, Schedule, VPSchedule
from .network_and_guidance import VP, GuidanceSolver, diffusion_model, eps_of, guidance_options
from .preset import preset

T_END = 1e-5  # where DiffPure and COUP stop
Solver = Literal["euler", "exponential"]
SOLVERS = get_args(Solver)


def time_grid(t_star: float, step_size: float) -> tuple[Array, Array]:
    """Times t_k = t* - k h and lengths h_k; the last step is cut so as to end at T_END.

    The grid of `next_t = min(t + dt, t_end)`: for h = 1e-3, 1000 t* steps, the last of 0.99e-3.
    """
    count = int(np.ceil((t_star - T_END) / step_size - 1e-9))
    times = t_star - step_size * np.arange(count, dtype=np.float64)
    ends = np.append(times[1:], T_END)
    return times, times - ends


def _grid(t_star: float, num_steps: int | None, step_size: float | None) -> tuple[Array, Array]:
    t_star = checks.number("t_star", t_star, T_END, 1.0, above=True)
    if num_steps is not None and step_size is not None:
        raise ValueError(
            "give num_steps or step_size, not both: "
            f"got num_steps={num_steps!r} and step_size={step_size!r}"
        )
    if num_steps is not None:
        limit = int(np.ceil(t_star / T_END)) - 1  # steps longer than T_END, so none vanishes
        step_size = t_star / checks.integer("num_steps", num_steps, 1, limit)
    step_size = 1e-3 if step_size is None else step_size
    return time_grid(t_star, checks.number("step_size", step_size, T_END, 1.0))


def _euler(sde: VPSchedule, t: float, h: float, noise: float) -> tuple[Prediction, float]:
    """Euler-Maruyama (noise 1) or Euler on the probability flow (noise 0)."""
    beta_h = float(sde.beta(t) * h)
    score = 0.5 * (1 + noise) * beta_h
    prediction = Prediction(x=1 + 0.5 * beta_h, eps=float(-score / sde.sigma(t)))
    return prediction, float(noise * np.sqrt(beta_h))


def _in_denoised(step: Prediction, alpha_bar: float) -> Prediction:
    """The same step with ε replaced by (x - √ᾱ x̂0)/σ, so that x̂0 can be clipped."""
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    x0 = float(step.x0 - step.eps * signal / noise)
    return Prediction(x0=x0, x=float(step.x + step.eps / noise))


def _start(model: VP, t_star: float, forward_noise: bool, clamp_output: bool) -> Array:
    """Pixels to the state, diffused to t_star if forward_noise."""
    noised = None
    if checks.flag("forward_noise", forward_noise):
        discrete = model.discrete()
        noised = float(discrete.alpha_bar(t_star * discrete.num_steps - 1))
    return start_row(noised, clamp=checks.flag("clamp_output", clamp_output))


def _reverse_rows(
    model: VP,
    kind: str,
    times: Array,
    lengths: Array,
    noise: float,
    solver: Solver,
    clip_denoised: bool,
    guidance_scale: float,
) -> Rows:
    """Steps of the reverse SDE (noise 1) or of the probability flow (noise 0)."""
    checks.choice("solver", solver, SOLVERS)
    checks.flag("clip_denoised", clip_denoised)
    sde = model.continuous()
    told = model.network_time(times)
    rows = []
    for t, h, time in zip(times.tolist(), lengths.tolist(), told.tolist(), strict=True):
        alpha_bar = float(sde.alpha_bar(t))
        if solver == "exponential":
            step, std = ddim(alpha_bar, float(sde.alpha_bar(t - h)), noise)
        else:
            step, std = _euler(sde, t, h, noise)
        if clip_denoised:
            step = _in_denoised(step, alpha_bar)
        noise_in = eps_of(model, kind, time)
        row = network_row(step, alpha_bar, kind, noise_in, clip_denoised=clip_denoised)
        row[[C, D]] = guidance_scale * step.score(alpha_bar), std
        rows.append(row)
    return Rows(np.stack(rows), told)


def coup(
    schedule: Schedule,
    kind: str = "eps",
    *,
    t_star: float = 0.1,
    num_steps: int | None = None,
    step_size: float | None = None,
    guidance_scale: float = 1.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    forward_noise: bool = False,
    solver: Solver = "euler",
    clip_denoised: bool = False,
    clamp_output: bool = True,
) -> Plan:
    """COUP: the reverse VP-SDE, guided by the classifier's confidence, from the attacked image.

    The source is Zhang et al., "Classifier guidance enhances diffusion-based adversarial
    purification by preserving predictive information" (arXiv 2408.05900, ECAI 2024). The constants
    are those of the released code: t* = 0.1 (ℓ∞ 8/255), h = 1e-3 (100 steps to t = 1e-5, the last
    of 0.99e-3), λ = 1, no forward noise, input and output clamped, noise on the last step too.

    Args:
        schedule: of the network: a `VPSchedule`, a `DiscreteSchedule` that is linear in β, or a
            `FlowSchedule`.
        kind: what the network predicts: "eps", "score", "x0", "v" or "velocity".
        t_star: time to start from, in (1e-5, 1].
        num_steps: how many steps, each of length t_star / num_steps; give this or step_size.
        step_size: the step length h, in [1e-5, 1]; default 1e-3.
        guidance_scale: λ >= 0. With 0 no classifier is needed.
        guidance_norm: "none" leaves each sample's gradient as it is, "normalised" divides it by
            its norm, and "clipped" scales it down to guidance_max_norm where its norm is larger.
        guidance_max_norm: the bound of "clipped", > 0.
        guidance_solver: "explicit" as published, or "stable", which integrates the classifier's
            margin over the step and cannot overshoot (ours and not published; docs/guidance.md).
            It takes the gradient as it is, so guidance_norm has to be "none".
        forward_noise: whether to diffuse the image to t_star first (with DiffPure's discrete ᾱ).
        solver: "euler" as published, or "exponential" for 10 to 20 steps (see the module).
        clip_denoised: whether to clamp the predicted clean image to [-1, 1] at each step. ε is
            then that of the clamped image, (x - √ᾱ x̂0)/σ; `ddim` leaves ε as predicted.
        clamp_output: whether to clamp the result, and an unnoised start, to valid pixels.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    model = diffusion_model("coup", schedule, kind)
    times, lengths = _grid(t_star, num_steps, step_size)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    scale = guidance.scale
    return make_plan(
        "coup",
        _start(model, t_star, forward_noise, clamp_output),
        _reverse_rows(model, kind, times, lengths, 1.0, solver, clip_denoised, scale),
        clamp_output=clamp_output,
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )


coup_l2 = preset(
    "coup-l2",
    coup,
    "COUP with the paper's ℓ₂ 0.5 setting: t* = 0.075, 75 steps (Zhang et al., ECAI 2024).",
    t_star=0.075,
)

coup_short = preset(
    "coup-short",
    coup,
    """COUP (Zhang et al. 2024) in ten steps of the exponential solver; not a published setting.

    Ten is the smallest number of steps that lost nowhere significantly, image by image, against
    the published 100 Euler steps on the bundled models (docs/results.md). For a table that others
    compare with, use `coup`.""",
    num_steps=10,
    solver="exponential",
)

diffpure = preset(
    "diffpure",
    coup,
    """DiffPure: forward diffusion to t*, then the reverse VP-SDE.

    The source is Nie et al., "Diffusion models for adversarial purification" (ICML 2022), section
    3.2, with the setting for CIFAR-10 and ℓ∞: t* = 0.1 and h = 1e-3 (100 steps to t = 1e-5). The
    forward noise has the discrete ᾱ of index 1000 t* - 1. Nothing is clamped. There is no
    guidance, and guidance_scale adds it. The paper uses t* = 0.125 for unseen threats.""",
    guidance_scale=0.0,
    forward_noise=True,
    clamp_output=False,
)

diffpure_l2 = preset(
    "diffpure-l2",
    diffpure,
    "DiffPure with its ℓ₂ 0.5 setting: t* = 0.075, 75 steps (Nie et al. 2022, section 5.2).",
    t_star=0.075,
)

diffpure_short = preset(
    "diffpure-short",
    diffpure,
    """DiffPure (Nie et al. 2022) in ten steps of the exponential solver; not a published setting.

    `coup_short` says why there are ten.""",
    num_steps=10,
    solver="exponential",
)

diffpure_imagenet = preset(
    "diffpure-imagenet",
    diffpure,
    """DiffPure with its ImageNet setting: t* = 0.15, 150 steps (Nie et al. 2022, section 5.2).

    It is meant for the 256x256 guided-diffusion network. `ScoreModel(network,
    schedule=DiscreteSchedule(), time_scale=1000)` tells it floor(1000 t), and its variance channels
    are cut off. The caller has to resize (bilinear, from 224 to 256 and back).""",
    t_star=0.15,
)


def vp_ode(
    schedule: Schedule,
    kind: str = "eps",
    *,
    t_star: float = 0.1,
    num_steps: int | None = None,
    step_size: float | None = None,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    forward_noise: bool = True,
    solver: Solver = "euler",
    clip_denoised: bool = False,
    clamp_output: bool = False,
) -> Plan:
    """Forward diffusion, then the probability-flow ODE: DiffPure's VP-ODE ablation.

    The sources are the ablations of Nie et al. 2022 and the ODE of Song et al. 2021, eq. 13. The
    constants are t* = 0.1 and h = 1e-3 (100 Euler steps to t = 1e-5). The forward noise is
    DiffPure's, and nothing is clamped. The solver "exponential" is DDIM with η = 0.

    Options and errors are those of `coup`.
    """
    model = diffusion_model("vp-ode", schedule, kind)
    times, lengths = _grid(t_star, num_steps, step_size)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    scale = guidance.scale
    return make_plan(
        "vp-ode",
        _start(model, t_star, forward_noise, clamp_output),
        _reverse_rows(model, kind, times, lengths, 0.0, solver, clip_denoised, scale),
        clamp_output=clamp_output,
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )


def ldsde(
    schedule: Schedule,
    kind: str = "eps",
    *,
    t_star: float = 0.1,
    num_steps: int | None = None,
    step_size: float | None = None,
    sigma2: float = 1e-3,
    lambda_ld: float = 1e-2,
    eta: float = 5.0,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clamp_output: bool = False,
) -> Plan:
    """Langevin dynamics about the attacked image, with the score at t = 0.01: DiffPure's LDSDE.

    dx = -½λ [(x - x_adv)/σ² - s_0.01(x)] dt + η√λ dw (Nie et al. 2022, ablations). The constants
    are those of the released code: σ² = 1e-3, λ = 1e-2, η = 5, dt = 1e-2 over t* = 0.1 (10 steps,
    the last of 0.999e-2). There is no forward noise, and nothing is clamped.

    The arguments that are not listed are those of `coup`; guidance adds to the score.

    Args:
        step_size: the step length, default 1e-2.
        sigma2: σ² > 0, variance of the tie to the attacked image.
        lambda_ld: λ > 0, the rate.
        eta: η >= 0, scale of the noise.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    model = diffusion_model("ldsde", schedule, kind)
    if num_steps is None and step_size is None:
        step_size = 1e-2
    _, lengths = _grid(t_star, num_steps, step_size)
    sigma2 = checks.number("sigma2", sigma2, 0.0, np.inf, above=True)
    rate = checks.number("lambda_ld", lambda_ld, 0.0, np.inf, above=True)
    eta = checks.number("eta", eta, 0.0, np.inf)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    score_time = 0.01
    alpha_bar = float(model.continuous().alpha_bar(score_time))
    times = model.network_time(np.full(len(lengths), score_time))
    rows = np.tile(blank_row(), (len(lengths), 1))
    for k, h in enumerate(lengths.tolist()):
        tie = 0.5 * h * rate / sigma2
        step = Prediction(x=1 - tie, eps=float(-0.5 * h * rate / np.sqrt(1 - alpha_bar)))
        rows[k] = network_row(step, alpha_bar, kind, eps_of(model, kind, float(times[k])))
        rows[k, [C, D, E]] = (
            guidance.scale * step.score(alpha_bar),
            eta * np.sqrt(rate * h),
            tie,
        )
    clamp = checks.flag("clamp_output", clamp_output)
    return make_plan(
        "ldsde",
        start_row(clamp=clamp),
        Rows(rows, times),
        clamp_output=clamp,
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )
