"""Plots of rows: operators as bars on a logarithmic scale, loops as stacked components."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast.benchmarking.case import COPY
from coup_fast.benchmarking.components import COMPONENTS
from coup_fast.benchmarking.rows import Row
from coup_fast.benchmarking.tables import grouped
from coup_fast.files import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "fused": "#1b6ca8",
    "fused in place": "#7fb2d9",
    "eager": "#e0872f",
    "torch.compile": "#8c6bb1",
    "exact Philox in plain torch": "#b8b8b8",
}
_COMPONENT_COLOURS = dict(
    zip(COMPONENTS, ("#1b6ca8", "#4d9f6b", "#a3cf91", "#e0872f", "#b8b8b8"), strict=True)
)


def plot(rows: Sequence[Row], path: Path, title: str) -> list[Path]:
    """Write the plots that these rows allow; returns the files written.

    Operators go to `path`; the components of loops beside it, to NAME-components.SUFFIX, or to
    `path` where there are no operators.
    """
    known = [row for row in rows if row.part == "whole" and row.variant in _COLOURS]
    loops = [group for group in grouped(rows) if any(row.components for row in group)]
    written = []
    if known:
        _save(_operators(known), path, title)
        written.append(path)
    if loops:
        beside = path.with_name(f"{path.stem}-components{path.suffix}") if known else path
        _save(_stacks(loops), beside, title)
        written.append(beside)
    return written


def _figure(panels: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, panels, figsize=(width * panels, height), layout="constrained", squeeze=False, **options
    )
    return figure, list(axes[0])


def _save(figure: Figure, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    legend: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    names = sorted(legend, key=lambda name: name == COPY)  # bars first
    handles = [legend[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize=10)
    write_figure(path, figure, dpi=150)
    plt.close(figure)


def _family(row: Row) -> str:
    return row.case.partition(" [")[0]


def _operators(rows: Sequence[Row]) -> Figure:
    """Bars of ns per element per operator and batch; black lines mark the copy."""
    names = list(dict.fromkeys(_family(row) for row in rows))
    figure, panels = _figure(len(names), 3.6, 4.2, sharey=True)
    for axis, name in zip(panels, names, strict=True):
        _bars(axis, grouped([row for row in rows if _family(row) == name]))
        axis.set_title(name, fontsize=11)
    panels[0].set_ylabel("ns per element (log scale)")
    panels[0].yaxis.set_major_formatter("{x:g}")
    return figure


def _bars(axis: Axes, groups: Sequence[Sequence[Row]]) -> None:
    variants = [name for name in _COLOURS if any(r.variant == name for g in groups for r in g)]
    width = 0.8 / len(variants)
    for place, group in enumerate(groups):
        for row in group:
            if row.ns_per_element is None:
                continue
            left = place - 0.4 + variants.index(row.variant) * width
            axis.bar(
                left,
                row.ns_per_element,
                0.92 * width,
                align="edge",
                color=_COLOURS[row.variant],
                label=row.variant,
            )
        limit = (group[0].limits or {}).get(COPY)
        if limit is not None:
            level = 1e9 * limit / group[0].elements
            axis.hlines(level, place - 0.42, place + 0.42, color="black", lw=1.5, label=COPY)
    axis.set_yscale("log")
    axis.set_xticks(range(len(groups)), [_size(group[0]) for group in groups], fontsize=8)
    _tidy(axis)


def _stacks(groups: Sequence[Sequence[Row]]) -> Figure:
    """A panel per loop and batch, a bar per way to run it, milliseconds of a step."""
    figure, panels = _figure(len(groups), 3.0, 4.6)
    for axis, group in zip(panels, groups, strict=True):
        rows = [row for row in group if row.components]
        for place, row in enumerate(rows):
            bottom = 0.0
            for name, seconds in (row.components or {}).items():
                height = 1e3 * seconds / row.steps
                colour = _COMPONENT_COLOURS[name]
                axis.bar(place, height, 0.7, bottom=bottom, color=colour, label=name)
                bottom += height
        axis.set_xticks(
            range(len(rows)), [row.variant for row in rows], rotation=35, ha="right", fontsize=8
        )
        axis.set_title(f"{group[0].case.partition(',')[0]}\n{_size(group[0])}", fontsize=10)
        _tidy(axis)
    panels[0].set_ylabel("ms per step")
    return figure


def _size(row: Row) -> str:
    threads = (row.stamp or {}).get("threads")
    on = "" if threads is None else f"\n{threads} thread{'s' * (threads != 1)}"
    _, bracket, rest = row.case.partition(" [")
    return (f"[{rest}" if bracket else f"{row.images} x {row.size}") + on


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
