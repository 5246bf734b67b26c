"""Rows as text for the terminal: one table per case, its limits in the heading."""

from __future__ import annotations

from collections.abc import Sequence

from coup_fast.benchmarking.case import COPY
from coup_fast.benchmarking.rows import Row

_HEADERS = ["variant", "median", "fastest", "ns/element", "x first", "of copy speed"]
_LOOP_HEADERS = ["variant", "median a step", "fastest", "x first", "of limit"]


def duration(seconds: float) -> str:
    """Three significant digits, in microseconds or milliseconds."""
    micro = 1e6 * seconds
    return f"{micro / 1000:.3g} ms" if micro >= 1000 else f"{micro:.3g} us"


def _percent(limit: float | None, seconds: float) -> str | None:
    return None if limit is None else f"{100 * limit / seconds:.0f} %"


def _cells(row: Row) -> list[str | None]:
    name = row.variant if row.part == "whole" else f"  {row.variant}, {row.part} alone"
    if row.timing is None:
        headers = _HEADERS if row.steps == 1 else _LOOP_HEADERS
        return [name, *["-"] * (len(headers) - 1)]
    timing, limits = row.timing, row.limits or {}
    ratio = None if row.ratio is None else f"{row.ratio:.2f}"
    if row.steps == 1:
        return [
            name,
            duration(timing.median),
            duration(timing.fastest),
            f"{row.ns_per_element:.3f}",
            ratio,
            _percent(limits.get(COPY), timing.median),
        ]
    highest = max(limits.values(), default=None)
    return [
        name,
        duration(timing.median / row.steps),
        duration(timing.fastest / row.steps),
        ratio,
        _percent(highest, timing.median),
    ]


def _group(rows: Sequence[Row]) -> str:
    first = rows[0]
    size = f", {first.images} x {first.size}" if first.size else ""
    threads = (first.stamp or {}).get("threads")
    on = "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
    limits = next((row.limits for row in rows if row.limits), {})
    parts = [f"{name} {duration(limits[name] / first.steps)}" for name in limits]
    steps = f"{first.steps} steps; a step's limits" if first.steps > 1 else "limits"
    lines = [f"{first.case}{size}{on}", f"  {steps}: {', '.join(parts)}"]
    headers = _HEADERS if first.steps == 1 else _LOOP_HEADERS
    from coup_fast.evaluation.tables import render_table

    lines.append(render_table(headers, [_cells(row) for row in rows]))
    lines += [f"  {row.variant}: {row.unavailable}" for row in rows if row.unavailable]
    unsteady = sum(row.timing is not None and row.timing.unsteady for row in rows)
    if unsteady:
        lines.append(f"  the machine was busy: {unsteady} of {len(rows)} medians are unsteady")
    return "\n".join(lines)


def _components(rows: Sequence[Row]) -> str | None:
    from coup_fast.evaluation.tables import render_table

    seen = [row for row in rows if row.components]
    if not seen:
        return None
    names = list(seen[0].components or {})
    table = [
        [row.variant, *(duration((row.components or {})[name] / row.steps) for name in names)]
        for row in seen
    ]
    return render_table(["where a step's time goes", *names], table)


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one case, size and number of threads together, in order of appearance."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.case, row.images, (row.stamp or {}).get("threads"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def tables(rows: Sequence[Row]) -> str:
    """All tables, blank lines between them."""
    blocks = []
    for group in grouped(rows):
        blocks += [_group(group), _components(group)]
    return "\n\n".join(block for block in blocks if block)
