"""Sampling methods on the discrete chain: DDPM, DDIM, and rounds of it with growing noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import checks
from ..plan import C, D, Plan, Rows, joined, make_plan, network_row, start_row
from ..plan import ddim as ddim_step
from ..reference import GuidanceNorm
from ..schedules import Schedule
from .ancestral import (
    VARIANCES,
    Level,
    Variance,
    ancestral_row,
    count_of,
    floor_of,
    forward_rows,
    levels,
    start_at,
)
from .network_and_guidance import VP, GuidanceSolver, diffusion_model, eps_of, guidance_options


def ddpm(
    schedule: Schedule,
    kind: str = "eps",
    *,
    t_star: float = 0.5,
    num_steps: int | None = None,
    variance: Variance = "fixed-small",
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    forward_noise: bool = True,
    clip_denoised: bool = False,
    clamp_output: bool = False,
) -> Plan:
    """Forward diffusion, then DDPM ancestral sampling: DiffPure as it runs on CelebA-HQ.

    The source is algorithm 2 of Ho et al. (NeurIPS 2020) with the constants of Nie et al. (ICML
    2022): 500 of 1000 steps (t* = 0.5), fixed small variance, x̂0 not clipped, no noise at i = 0.

    Args:
        schedule: of the network. A network of a `DiscreteSchedule` is told i / N, which is the
            index under `ScoreModel(time_scale=N)`. A network of a `VPSchedule` is told the time
            (i + 1)/1000.
        kind: what the network predicts: "eps", "score", "x0", "v" or "velocity".
        t_star: where to start, in [1/N, 1]; the indices are t_star N - 1 … 0.
        num_steps: in [1, t_star N], for a respaced chain; by default every index is used.
        variance: "fixed-small" (posterior), "fixed-large" (β), or "learned" (a 2C-channel network).
        guidance_scale: λ >= 0, shifts the mean by λ Var g (Dhariwal and Nichol 2021, algorithm 1).
        guidance_norm: as for `coup`.
        guidance_max_norm: as for `coup`.
        guidance_solver: as for `coup`.
        forward_noise: whether to diffuse the image to t_star first.
        clip_denoised: whether to clamp x̂0 to [-1, 1]. The posterior mean then takes x and the
            clamped x̂0.
        clamp_output: whether to clamp the result to valid pixels.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    model = diffusion_model("ddpm", schedule, kind)
    chain = model.discrete()
    count = count_of(chain, t_star)
    num_steps = checks.integer("num_steps", count if num_steps is None else num_steps, 1, count)
    checks.choice("variance", variance, VARIANCES)
    guidance = guidance_options(
        guidance_scale, guidance_norm, guidance_max_norm, guidance_solver, variance
    )
    clip = checks.flag("clip_denoised", clip_denoised)
    steps = levels(chain, count, num_steps)
    floor = floor_of(steps, chain)
    times = model.index_time([level.index for level in steps])
    rows = [
        ancestral_row(level, floor, kind, variance, clip, guidance.scale, eps_of(model, kind, time))
        for level, time in zip(steps, times.tolist(), strict=True)
    ]
    return make_plan(
        "ddpm",
        start_at(chain, count, forward_noise),
        Rows(np.stack(rows), times),
        clamp_output=checks.flag("clamp_output", clamp_output),
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
        learned_variance=variance == "learned",
    )


def _ddim_rows(
    model: VP, kind: str, steps: Sequence[Level], eta: float, clip: bool, scale: float
) -> Rows:
    times = model.index_time([level.index for level in steps])
    rows = []
    for level, time in zip(steps, times.tolist(), strict=True):
        step, std = ddim_step(level.alpha_bar, level.alpha_bar_next, eta)
        noise_in = eps_of(model, kind, time)
        row = network_row(step, level.alpha_bar, kind, noise_in, clip_denoised=clip)
        row[[C, D]] = scale * step.score(level.alpha_bar), std
        rows.append(row)
    return Rows(np.stack(rows), times)


def ddim(
    schedule: Schedule,
    kind: str = "eps",
    *,
    t_star: float = 0.1,
    num_steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    forward_noise: bool = True,
    clip_denoised: bool = False,
    clamp_output: bool = False,
) -> Plan:
    """Forward diffusion, then DDIM-η.

    The source is eq. 12 of Song et al., "Denoising diffusion implicit models" (ICLR 2021). Lee and
    Kim (ICCV 2023) and ADBM purify with t* = 0.1 and η = 0, and ADBM clips x̂0.

    With `clip_denoised=True` ε is left as predicted, as in ADBM and diffusers. The exponential
    solver of `coup` and its relatives, the same step without clipping, and `ddpm` use the ε that
    belongs to the clamped x̂0. Where nothing is clamped the two agree.

    The arguments that are not listed are those of `ddpm`; guidance adds λ g to the score (Dhariwal
    and Nichol 2021, algorithm 2).

    Args:
        eta: in [0, 1]; 0 is deterministic, and 1 has DDPM's small variance.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    model = diffusion_model("ddim", schedule, kind)
    chain = model.discrete()
    count = count_of(chain, t_star)
    num_steps = checks.integer("num_steps", count if num_steps is None else num_steps, 1, count)
    eta = checks.number("eta", eta, 0.0, 1.0)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    clip = checks.flag("clip_denoised", clip_denoised)
    return make_plan(
        "ddim",
        start_at(chain, count, forward_noise),
        _ddim_rows(model, kind, levels(chain, count, num_steps), eta, clip, guidance.scale),
        clamp_output=checks.flag("clamp_output", clamp_output),
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )


def gradual(
    schedule: Schedule,
    kind: str = "eps",
    *,
    rounds: Sequence[int] = (30, 30, 30, 30, 50, 50, 125, 125),
    stride: int = 1,
    eta: float = 1.0,
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clip_denoised: bool = False,
    clamp_output: bool = False,
) -> Plan:
    """Eight rounds of forward diffusion and sampling, with growing noise.

    The source is Lee and Kim, "Robust evaluation of diffusion-based adversarial purification" (ICCV
    2023): T = 30 (four rounds), 50 (two), 125 (two), every index, η = 1 (DDPM), x̂0 not clipped. Ten
    runs vote by majority (`PurifiedClassifier(num_draws=10, vote="majority")`).

    The arguments that are not listed are those of `ddim`.

    Args:
        rounds: T of each round, indices in [1, N]; round T diffuses to index T - 1.
        stride: use every stride-th index (about, where it does not divide T). A round has
            T/stride steps, rounded down. The released attack differentiates another setting as
            its surrogate: rounds (30, 50, 125) in 1, 1 and 5 steps.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    model = diffusion_model("gradual", schedule, kind)
    chain = model.discrete()
    rounds = checks.integers("rounds", rounds, 1, chain.num_steps)
    stride = checks.integer("stride", stride, 1, min(rounds))
    eta = checks.number("eta", eta, 0.0, 1.0)
    guidance = guidance_options(guidance_scale, guidance_norm, guidance_max_norm, guidance_solver)
    clip = checks.flag("clip_denoised", clip_denoised)
    parts = []
    for k, count in enumerate(rounds):
        if k > 0:
            parts.append(forward_rows(chain, count - 1))
        steps = levels(chain, count, count // stride)
        parts.append(_ddim_rows(model, kind, steps, eta, clip, guidance.scale))
    return make_plan(
        "gradual",
        start_row(float(chain.alpha_bar(rounds[0] - 1))),
        joined(parts),
        clamp_output=checks.flag("clamp_output", clamp_output),
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
    )
