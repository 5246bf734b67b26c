"""Runs benchmark cases and turns the timings into rows, tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coup_fast.benchmarking.cases import Case, VariantUnavailable
from coup_fast.benchmarking.timing import Timing, measure_in_turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIMIT = "copy of the same bytes"
_COLOURS = {
    "fused": "#1b6ca8",
    "fused in place": "#7fb2d9",
    "eager": "#e0872f",
    "torch.compile": "#8c6bb1",
    "exact Philox in plain torch": "#b8b8b8",
}


@dataclass(frozen=True)
class Row:
    """One variant of one case. Times in seconds; `unavailable` says why there are none.

    `ratio` is this variant's time over the fused operator's (same part). `limit` is the time of a
    plain copy that moves as many bytes, measured in turns with the variants.
    """

    case: str
    images: int
    elements: int
    traffic: int
    variant: str
    part: str
    timing: Timing | None = None
    ratio: float | None = None
    limit: float | None = None
    unavailable: str | None = None

    @property
    def ns_per_element(self) -> float | None:
        """Median time divided by elements, in nanoseconds."""
        return None if self.timing is None else 1e9 * self.timing.median / self.elements

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ns_per_element": self.ns_per_element}


def run_case(case: Case, repeats: int, sample_seconds: float, budget_seconds: float) -> list[Row]:
    """Check one case, then time its variants and the copy of the same bytes, in turns.

    Raises AssertionError if the check fails.
    """
    case.check()
    functions: dict[str, Callable[[], object]] = {}
    unavailable: dict[str, str] = {}
    for variant in case.variants:
        key = f"{variant.part}/{variant.name}"
        try:
            functions[key] = variant.build()
        except VariantUnavailable as reason:
            unavailable[key] = str(reason)
    source = torch.ones(max(1, case.traffic // 8), device=case.device)
    target = torch.empty_like(source)
    functions[_LIMIT] = lambda: target.copy_(source)
    timings = measure_in_turns(functions, case.device, repeats, sample_seconds, budget_seconds)
    limit = timings[_LIMIT].median
    rows = []
    for variant in case.variants:
        key = f"{variant.part}/{variant.name}"
        timing = timings.get(key)
        fused = timings[f"{variant.part}/fused"].median
        rows.append(
            Row(
                case=case.name,
                images=case.images,
                elements=case.elements,
                traffic=case.traffic,
                variant=variant.name,
                part=variant.part,
                timing=timing,
                ratio=None if timing is None else timing.median / fused,
                limit=limit if variant.part == "whole" else None,
                unavailable=unavailable.get(key),
            )
        )
    return rows


def _time(seconds: float) -> str:
    micro = 1e6 * seconds
    return f"{micro / 1000:.2f} ms" if micro >= 1000 else f"{micro:.1f} us"


def _cells(row: Row) -> list[str | None]:
    name = row.variant if row.part == "whole" else f"  {row.variant}, {row.part} alone"
    if row.timing is None:
        return [name, "-", "-", "-", "-", "-"]
    timing = row.timing
    limit = None if row.limit is None else f"{100 * row.limit / timing.median:.0f} %"
    return [
        name,
        _time(timing.median),
        _time(timing.fastest),
        f"{row.ns_per_element:.3f}",
        None if row.ratio is None else f"{row.ratio:.2f}",
        limit,
    ]


def tables(rows: Sequence[Row]) -> str:
    """Text for the terminal: one table per case, the copy's time in its heading."""
    from coup_fast.evaluation.tables import render_table

    headers = ["variant", "median", "fastest", "ns/element", "x fused", "of copy speed"]
    blocks = []
    for case, images in dict.fromkeys((row.case, row.images) for row in rows):
        group = [row for row in rows if (row.case, row.images) == (case, images)]
        limit = next(row.limit for row in group if row.limit is not None)
        size = case if "[" in case else f"{case}, {images} x 3x32x32"
        moved = group[0].traffic
        heading = f"{size}: {moved / 1e6:.2f} MB, a copy moves as many bytes in {_time(limit)}"
        lines = [heading, render_table(headers, [_cells(row) for row in group])]
        lines += [f"  {row.variant}: {row.unavailable}" for row in group if row.unavailable]
        unsteady = sum(row.timing is not None and row.timing.unsteady for row in group)
        if unsteady:
            lines.append(f"  the machine was busy: {unsteady} of {len(group)} medians are unsteady")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def plot(rows: Iterable[Row], path: Path, title: str) -> None:
    """Bars of ns per element (logarithmic) per operator and batch; black ticks mark the copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = [row for row in rows if row.part == "whole"]
    names = list(dict.fromkeys(_family(row) for row in whole))
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(3.6 * len(names), 4.2),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, name in zip(panels[0], names, strict=True):
        _bars(axis, [row for row in whole if _family(row) == name])
        axis.set_title(name, fontsize=11)
    panels[0][0].set_ylabel("ns per element (log scale)")
    panels[0][0].yaxis.set_major_formatter("{x:g}")
    legend: dict[str, Any] = {}
    for axis in panels[0]:
        handles, labels = axis.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    names = sorted(legend, key=lambda name: name == _LIMIT)  # bars first
    figure.legend(
        [legend[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _family(row: Row) -> str:
    return row.case.partition(" [")[0]


def _bars(axis: Axes, rows: Sequence[Row]) -> None:
    """One operator's panel: a group of bars per size."""
    sizes = list(dict.fromkeys((row.case, row.images) for row in rows))
    variants = [name for name in _COLOURS if any(row.variant == name for row in rows)]
    width = 0.8 / len(variants)
    for position, name in enumerate(variants):
        for group, size in enumerate(sizes):
            row = next(r for r in rows if (r.case, r.images) == size and r.variant == name)
            if row.ns_per_element is None:
                continue
            left = group - 0.4 + position * width
            axis.bar(
                left,
                row.ns_per_element,
                0.92 * width,
                align="edge",
                color=_COLOURS[name],
                label=name if group == 0 else None,
            )
    for group, size in enumerate(sizes):
        row = next(r for r in rows if (r.case, r.images) == size)
        if row.limit is not None:
            level = 1e9 * row.limit / row.elements
            label = _LIMIT if group == 0 else ""
            axis.hlines(level, group - 0.42, group + 0.42, color="black", lw=1.5, label=label)
    axis.set_yscale("log")
    axis.set_xticks(range(len(sizes)), [_size_label(*size) for size in sizes])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _size_label(case: str, images: int) -> str:
    _, bracket, rest = case.partition(" [")
    return f"[{rest}" if bracket else f"{images} images"
