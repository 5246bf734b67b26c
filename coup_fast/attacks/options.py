"""The options of attacks, as type checkers and editors see them; the attacks say what they mean."""

from __future__ import annotations

from typing import Literal, TypedDict

LossName = Literal["ce", "dlr", "margin"]
AttackGradient = Literal["exact", "autograd", "stopped", "bpda", "classifier"]
NoiseName = Literal["fresh", "fixed"]
Keep = Literal["last", "best"]
Version = Literal["rand", "standard"]


class AttackOptions(TypedDict, total=False):
    """The options of all attacks, for `preset` and `Attack.replace`.

    step_size belongs to `PGD`, rho and momentum to `APGD`, version and queries to `AutoAttack`, and
    the others to every attack. Whether an attack takes an option is checked at run time.
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
    step_size: float | str
    rho: float
    momentum: float
    version: Version
    queries: int
