"""The options of attacks, as type checkers and editors see them; the attacks say what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

LossName = Literal["ce", "dlr", "margin"]
AttackGradient = Literal["exact", "autograd", "stopped", "unguided", "bpda", "classifier"]
NoiseName = Literal["fresh", "fixed"]
Keep = Literal["last", "best"]
DrawWeighting = Literal["uniform", "em"]
StepSchedule = Literal["constant", "cosine"]
Version = Literal["rand", "standard"]


class AttackOptions(TypedDict, total=False):
    """The options of all attacks, for `preset` and `Attack.replace`.

    step_size, step_schedule and final_step_size belong to `PGD`, rho and momentum to `APGD`,
    gradients and finish_steps to `AdaptiveGuided`, p_init to `Square`, version and queries to
    `AutoAttack`, and the others to every attack. Whether an attack takes an option is checked at
    run time.
    """

    norm: str | float
    eps: float | str
    steps: int
    eot: int
    loss: LossName
    gradient: AttackGradient
    noise: NoiseName
    through_vote: bool
    random_start: bool
    restarts: int
    keep: Keep
    seed: int
    targeted: bool
    normalise_draws: bool
    draw_weights: DrawWeighting
    gradient_averaging: float
    low_frequency: float
    deviation: float
    stop_when_fooled: bool
    step_size: float | str
    step_schedule: StepSchedule
    final_step_size: float | str | None
    rho: float
    momentum: float
    gradients: Sequence[AttackGradient]
    finish_steps: int
    p_init: float
    version: Version
    queries: int
