"""Plans as people see them: in a line, and as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..schedules import Array
from .columns import START_COLUMNS

if TYPE_CHECKING:
    from .plans import AnyPlan


def summary(plan: AnyPlan) -> str:
    """A plan in a few words."""
    steps, calls, noises = plan.num_steps, plan.num_network_calls, plan.num_noise
    words = [f"{steps} step{'s' * (steps != 1)}"]
    if calls != steps:
        words.append(f"{calls} network call{'s' * (calls != 1)}")
    if calls:
        low, high = (f"{time:.4g}" for time in (np.nanmin(plan.times), np.nanmax(plan.times)))
        words.append(f"t = {high}" if low == high else f"t in [{low}, {high}]")
    words.append(f"{noises} noise tensor{'s' * (noises != 1)}")
    words += ["guided by the classifier"] if plan.needs_classifier else []
    return f"{plan.method!r}: {', '.join(words)}"


def html(plan: AnyPlan) -> str:
    """A plan as a table for notebooks; long plans without the rows in their middle."""
    from html import escape  # here, because few need it and it takes a millisecond

    noisy, guided, times = plan.noise_index, plan.guided, plan.times
    first = "yes" if plan.start_noisy else ""
    rows = [["start", "", first, "", describe(START_COLUMNS, plan.start)]]
    shown = 5  # at either end
    middle = range(shown, plan.num_steps - shown) if plan.num_steps > 3 * shown else range(0)
    for k in range(plan.num_steps):
        if k in middle:
            if k == middle.start:
                rows.append(["…", "", "", "", f"{len(middle)} more rows"])
            continue
        time = "no network" if np.isnan(times[k]) else f"{times[k]:.6g}"
        flags = ["yes" if flag else "" for flag in (noisy[k] is not None, guided[k])]
        rows.append([str(k), time, *flags, describe(plan.columns, plan.coeffs[k])])
    head = "".join(f"<th>{name}</th>" for name in ("row", "t", "noisy", "guided", "coefficients"))
    cell = '<td style="text-align: left">{}</td>'
    body = [f"<tr>{''.join(cell.format(escape(text)) for text in row)}</tr>" for row in rows]
    return (
        f"<table><caption>{escape(summary(plan))}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def describe(names: tuple[str, ...], row: Array) -> str:
    """The coefficients of a row that do something, with their names."""
    neutral = {"out_scale": 1.0}
    shown = [
        f"{name}={value:.8g}"
        for name, value in zip(names, row, strict=True)
        if np.isfinite(value) and value != neutral.get(name, 0.0)
    ]
    return " ".join(shown) or "nothing"
