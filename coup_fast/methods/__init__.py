"""The published methods. Each is a function from constants to a plan, with the published defaults.

    coup_fast.methods.diffpure(VPSchedule(), "eps", t_star=0.125).table()

`METHODS` has them under the names that `Purifier(method=...)` takes, and `plan` builds one by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .. import checks
from ..plan import AnyPlan
from ..schedules import Schedule
from .adp import adp
from .discrete import ddim, ddpm, gradual
from .flowpure import flowpure
from .gdmp import gdmp
from .langevin import langevin
from .one_shot import consistency, one_shot
from .sde import (
    coup,
    coup_l2,
    coup_short,
    diffpure,
    diffpure_imagenet,
    diffpure_l2,
    diffpure_short,
    ldsde,
    vp_ode,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import MethodOptions

METHODS: dict[str, Callable[..., AnyPlan]] = {
    "coup": coup,
    "coup-l2": coup_l2,
    "coup-short": coup_short,
    "diffpure": diffpure,
    "diffpure-l2": diffpure_l2,
    "diffpure-short": diffpure_short,
    "diffpure-imagenet": diffpure_imagenet,
    "vp-ode": vp_ode,
    "ldsde": ldsde,
    "ddpm": ddpm,
    "ddim": ddim,
    "gdmp": gdmp,
    "gradual": gradual,
    "adp": adp,
    "one-shot": one_shot,
    "consistency": consistency,
    "flowpure": flowpure,
    "langevin": langevin,
}
"""The function of each method, by the name that `Purifier(method=...)` takes."""

__all__ = [
    "METHODS",
    "adp",
    "check_options",
    "consistency",
    "coup",
    "coup_l2",
    "coup_short",
    "ddim",
    "ddpm",
    "diffpure",
    "diffpure_imagenet",
    "diffpure_l2",
    "diffpure_short",
    "flowpure",
    "gdmp",
    "gradual",
    "langevin",
    "ldsde",
    "one_shot",
    "options",
    "plan",
    "vp_ode",
]


def options(name: str) -> dict[str, Any]:
    """The options of a method and their defaults. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in METHODS:
        known = f"there are {', '.join(METHODS)}{checks.nearest(name, METHODS)}"
        raise ValueError(f"unknown method {name!r}; {known}")
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, chosen: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse an option that the method does not take.

    Args:
        name: of the method.
        chosen: names of options.
        others: options that the caller takes beside the method's, for the message.

    Raises:
        ValueError: an option does not exist; the message lists those that do.
    """
    known = options(name)
    unknown = [option for option in chosen if option not in known]
    if unknown:
        beside = f", and every purifier {', '.join(others)}" if others else ""
        raise ValueError(
            f"method {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it takes {', '.join(known)}{beside}{checks.nearest(unknown[0], [*known, *others])}"
        )


def plan(name: str, schedule: Schedule, kind: str, **chosen: Unpack[MethodOptions]) -> AnyPlan:
    """The plan of a method for networks of this schedule and kind.

    Args:
        name: of the method.
        schedule: of the network.
        kind: what the network predicts, as in `ScoreModel`.
        **chosen: options of the method.

    Raises:
        ValueError: the method or an option is unknown (the message lists those that exist), or
            values are out of range or contradict each other.
        TypeError: a value is of the wrong kind.
    """
    check_options(name, chosen)
    return METHODS[name](schedule, kind, **chosen)
