"""GDMP: DDPM steps drawn towards the attacked image, with the MSE's gradient in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .. import checks
from ..plan import X_VAR, Z_VAR, D, E, Plan, Rows, V, joined, make_plan, start_row
from ..reference import GuidanceNorm
from ..schedules import Schedule
from .ancestral import (
    VARIANCES,
    Variance,
    ancestral_row,
    count_of,
    fixed_variance,
    floor_of,
    forward_rows,
    levels,
)
from .network_and_guidance import GuidanceSolver, diffusion_model, eps_of, guidance_options

GDMP_BATCH = 100  # the authors' batch size, part of their mean-reduced loss


def gdmp(
    schedule: Schedule,
    kind: str = "eps",
    *,
    t_star: float = 0.036,
    rounds: int = 4,
    mse_scale: float = 60000.0,
    ptb: float = 8.0,
    image_shape: Sequence[int] = (3, 32, 32),
    variance: Variance = "fixed-large",
    guidance_scale: float = 0.0,
    guidance_norm: GuidanceNorm = "none",
    guidance_max_norm: float | None = None,
    guidance_solver: GuidanceSolver = "explicit",
    clip_denoised: bool = True,
    clamp_output: bool = True,
) -> Plan:
    """GDMP: DDPM steps drawn towards the attacked image by the gradient of an MSE.

    The source is algorithm 1 of Wang et al., "Guided diffusion model for adversarial purification"
    (arXiv 2205.14969), with the released CIFAR-10 constants: 4 rounds of forward diffusion to index
    36 and steps 35 … 0, x̂0 clipped, fixed large variance, output clamped.

    The mean moves by -Var_i S_i ∇MSE(x, x_ref), where x_ref = √ᾱ_i x_adv + √(1-ᾱ_i) z₂ and
    S_i = 3 · 60000 · 255/(2 · 8) · √(1-ᾱ_i)/√ᾱ_i. In closed form, with
    κ = 2 Var_i S_i/(B·C·H·W): v = c₂ - κ, e = κ√ᾱ_i on x_adv, d = √(Var_i + κ²(1-ᾱ_i)), and one z
    stands for both noises. The released loss is a mean over the batch, so its strength depends on
    the batch. Here the authors' B = 100 is built in, so that results do not depend on how the
    caller batches.

    Args:
        schedule: as for `ddpm`.
        kind: as for `ddpm`.
        t_star: 1000 t_star is the index that a round diffuses to, and the steps of a round.
        rounds: how many rounds, at least 1.
        mse_scale: the released guide scale, >= 0.
        ptb: the attack's ε in units of 1/255, in (0, 255].
        image_shape: C, H, W of the loss's mean; published: (3, 32, 32). Other images under the
            default keep the strength per pixel that CIFAR-10 images had.
        variance: as for `ddpm`.
        guidance_scale: λ >= 0, of a classifier, beside the MSE.
        guidance_norm: as for `coup`.
        guidance_max_norm: as for `coup`.
        guidance_solver: as for `coup`.
        clip_denoised: as for `ddpm`.
        clamp_output: as for `ddpm`.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other; the message names it,
            what was given and what is possible.
    """
    model = diffusion_model("gdmp", schedule, kind)
    chain = model.discrete()
    count = count_of(chain, t_star)
    rounds = checks.integer("rounds", rounds, 1, 1000)
    mse_scale = checks.number("mse_scale", mse_scale, 0.0, math.inf)
    ptb = checks.number("ptb", ptb, 0.0, 255.0, above=True)
    numel = math.prod(checks.integers("image_shape", image_shape, 1, 2**31))
    checks.choice("variance", variance, VARIANCES)
    guidance = guidance_options(
        guidance_scale, guidance_norm, guidance_max_norm, guidance_solver, variance
    )
    clip = checks.flag("clip_denoised", clip_denoised)

    steps = levels(chain, count, count)
    floor = floor_of(steps, chain)
    times = model.index_time([level.index for level in steps])
    rows = []
    for level, time in zip(steps, times.tolist(), strict=True):
        noise_in = eps_of(model, kind, time)
        row = ancestral_row(level, floor, kind, variance, clip, guidance.scale, noise_in)
        signal, noise = math.sqrt(level.alpha_bar), math.sqrt(1 - level.alpha_bar)
        strength = 3 * mse_scale * 255 / (2 * ptb) * noise / signal
        kappa = 2 * strength / (GDMP_BATCH * numel)  # per unit of variance
        if variance == "learned":
            row[[X_VAR, E, Z_VAR]] = -kappa, kappa * signal, kappa * noise
        else:
            kappa *= fixed_variance(level, floor, variance)
            row[V] -= kappa
            row[[E, D]] = kappa * signal, math.hypot(row[D], kappa * noise)
        rows.append(row)
    one_round = Rows(np.stack(rows), times)
    top = min(count, chain.num_steps - 1)
    parts = [one_round, *[forward_rows(chain, top), one_round] * (rounds - 1)]
    return make_plan(
        "gdmp",
        start_row(float(chain.alpha_bar(top))),
        joined(parts),
        clamp_output=checks.flag("clamp_output", clamp_output),
        guidance_norm=guidance.norm,
        guidance_max_norm=guidance.max_norm,
        learned_variance=variance == "learned",
    )
