"""A method of diffusion networks that is another one with other defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from ..plan import Plan, named
from ..schedules import Schedule
from .network_and_guidance import diffusion_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import MethodOptions

P = ParamSpec("P")


def preset(
    name: str, base: Callable[P, Plan], doc: str, **defaults: Unpack[MethodOptions]
) -> Callable[P, Plan]:
    """`base` under another name with these defaults; its signature says so."""
    plan_of: Callable[..., Plan] = base
    others: Mapping[str, Any] = defaults

    def method(schedule: Schedule, kind: str = "eps", **options: Any) -> Plan:
        diffusion_model(name, schedule, kind)  # the base would refuse them under its own name
        return named(plan_of(schedule, kind, **{**others, **options}), name)

    signature = inspect.signature(base, eval_str=False)
    parameters = [
        p.replace(default=others[p.name]) if p.name in others else p
        for p in signature.parameters.values()
    ]
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    method.__name__ = method.__qualname__ = name.replace("-", "_")
    method.__module__ = base.__module__
    method.__doc__ = f"{doc}\n\n    Options and errors are those of `{base.__name__}`."
    return cast("Callable[P, Plan]", method)
