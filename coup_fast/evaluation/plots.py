"""Plots of a report: all rows with their intervals, and accuracy against ε, EOT, t* and steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast import methods
from coup_fast.evaluation.defences import UNDEFENDED
from coup_fast.evaluation.lines import Line, radius
from coup_fast.evaluation.state import canonical
from coup_fast.files import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from coup_fast.evaluation.intervals import Average

ENDINGS = (".png", ".svg")
# The Okabe-Ito colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def _eps(line: Line) -> float | None:
    return None if line.row.attack is None else line.row.attack.eps


def _eot(line: Line) -> float | None:
    attack, defence = line.row.attack, line.row.defence
    return None if attack is None or defence.method == UNDEFENDED else float(attack.eot)


def _t_star(line: Line) -> float | None:
    defence = line.row.defence
    if defence.method == UNDEFENDED or defence.foreign:
        return None
    value = defence.options.get("t_star", methods.options(defence.method).get("t_star"))
    return float(value) if isinstance(value, int | float) else None


def _num_steps(line: Line) -> float | None:
    value = line.row.defence.options.get("num_steps")
    return float(value) if isinstance(value, int) else None


# file name, label of the axis, the value of a line
AXES: tuple[tuple[str, str, Callable[[Line], float | None]], ...] = (
    ("accuracy-eps", "radius ε of the attack (pixels)", _eps),
    ("accuracy-eot", "EOT: draws for each gradient", _eot),
    ("accuracy-t_star", "purification time t*", _t_star),
    ("accuracy-num_steps", "steps of the purifier", _num_steps),
)
OF_DEFENCE = ("accuracy-t_star", "accuracy-num_steps")  # the others belong to the attack


def draw(lines: Sequence[Line], images: int, draws: int, folder: Path) -> list[Path]:
    """Every plot that there are lines for, as PNG and SVG; returns the paths.

    images, draws: what each line's numbers are about.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "coup_fast"  # the same ids in every run
    paths = _save(_overview(lines, images, draws), folder / "accuracy")
    if draws > 1:
        paths += _save(_worst(lines), folder / "worst-of-k")
    for name, label, value in AXES:
        groups = series(lines, name, value)
        if groups:
            paths += _save(_curves(groups, label, draws), folder / name)
    return paths


def series(
    lines: Sequence[Line], name: str, value: Callable[[Line], float | None]
) -> dict[str, list[tuple[float, Line]]]:
    """Lines that differ in this value alone, by label; those of one value are left out."""
    groups: dict[str, list[tuple[float, Line]]] = {}
    for line in lines:
        at = value(line)
        if line.attacked is not None and at is not None:
            groups.setdefault(_without(line, name), []).append((at, line))
    found: dict[str, list[tuple[float, Line]]] = {}
    for points in groups.values():
        if len({at for at, _ in points}) > 1:
            points.sort(key=lambda point: point[0])
            found[_label(points[0][1], name, found)] = points
    return found


def _without(line: Line, name: str) -> str:
    """All of a line's settings but the one that is on the axis."""
    attack = {} if line.row.attack is None else line.row.attack.as_dict()
    options = dict(line.row.defence.options)
    for key in ("name", "step_size") if name == "accuracy-eps" else ("name",):
        attack.pop(key, None)  # the step goes with the radius
    places = ((attack, "eps"), (attack, "eot"), (options, "t_star"), (options, "num_steps"))
    for settings, key in places:
        if name == f"accuracy-{key}":
            settings.pop(key, None)
    defence = line.row.defence
    base = defence.base if name in OF_DEFENCE else defence.name
    return canonical([base, defence.method, options, defence.num_draws, defence.vote, attack])


def _label(line: Line, name: str, taken: Any) -> str:
    """Defence and attack without the value that is on the axis."""
    defence, attack = line.row.defence, line.row.attack
    base = defence.base if name in OF_DEFENCE else defence.name
    label = f"{base}: {line.attack_label}"
    if attack is not None and name == "accuracy-eps":
        label = label.removesuffix(f", {radius(attack)}")
    if attack is not None and name == "accuracy-eot":
        label = label.replace(f", EOT {attack.eot}", "")
    while label in taken:
        label += "'"
    return label


def _figure(width: float, height: float) -> Figure:
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def _bars(numbers: list[Average]) -> list[list[float]]:
    """Lengths of the error bars below and above, in percent."""
    ends = [number.interval() for number in numbers]
    low = [100 * max(n.rate - e[0], 0.0) for n, e in zip(numbers, ends, strict=True)]
    high = [100 * max(e[1] - n.rate, 0.0) for n, e in zip(numbers, ends, strict=True)]
    return [low, high]


def _overview(lines: Sequence[Line], images: int, draws: int) -> Figure:
    """Clean, average and worst accuracy of every line, one above the other."""
    figure = _figure(9, 1.4 + 0.5 * len(lines))
    axis = figure.subplots()
    shown: tuple[tuple[str, str, str], ...] = (
        ("clean", "o", f"clean, average of {draws}"),
        ("average", "s", f"attacked, average of {draws}"),
        ("worst", "v", f"attacked, worst of {draws}"),
    )
    for j, (name, marker, label) in enumerate(shown):
        places, numbers = [], []
        for i, line in enumerate(lines):
            part = line.clean if name == "clean" else line.attacked
            if part is not None:
                numbers.append(part.worst if name == "worst" else part.average)
                places.append(i + 0.22 * (j - 1))
        values = [100 * number.rate for number in numbers]
        axis.errorbar(
            values,
            places,
            xerr=_bars(numbers),  # type: ignore[arg-type]
            fmt=marker,
            color=COLOURS[j],
            markersize=5,
            capsize=2,
            linewidth=1,
            label=label,
        )
    axis.set_yticks(range(len(lines)))
    axis.set_yticklabels([f"{x.row.defence.name}\n{x.attack_label}" for x in lines], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(-2, 102)
    axis.set_xlabel(f"accuracy on {images} images, % (95 % Wilson intervals)")
    axis.grid(axis="x", linewidth=0.4)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _worst(lines: Sequence[Line]) -> Figure:
    """Right under all of k draws, against k; weak attacks dashed."""
    lines = [line for line in lines if len(line.curve) > 1]
    figure = _figure(7.5, 4.5 + 0.16 * len(lines))
    axis = figure.subplots()
    for i, line in enumerate(lines):
        axis.plot(
            range(1, len(line.curve) + 1),
            [100 * share.rate for share in line.curve],
            "o--" if line.weakness else "o-",
            color=COLOURS[i % len(COLOURS)],
            markersize=4,
            linewidth=1.2,
            label=f"{line.row.defence.name}: {line.attack_label}",
        )
    axis.set_xlabel("k, draws that an image may be tried under")
    axis.set_ylabel("right under all of k draws, %")
    axis.set_ylim(-2, 102)
    axis.grid(linewidth=0.4)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    return figure


def _curves(groups: dict[str, list[tuple[float, Line]]], label: str, draws: int) -> Figure:
    """Average accuracy under attack, one curve per group; weak attacks dashed."""
    figure = _figure(7.5, 4.5 + 0.16 * len(groups))
    axis = figure.subplots()
    places = [at for points in groups.values() for at, _ in points]
    apart = 0.006 * (max(places) - min(places))  # so that bars do not hide each other
    for i, (name, points) in enumerate(groups.items()):
        aside = (i - (len(groups) - 1) / 2) * apart
        numbers = [line.attacked.average for _, line in points if line.attacked is not None]
        axis.errorbar(
            [at + aside for at, _ in points],
            [100 * number.rate for number in numbers],
            yerr=_bars(numbers),
            fmt="o--" if points[0][1].weakness else "o-",
            color=COLOURS[i % len(COLOURS)],
            markersize=4,
            capsize=2,
            linewidth=1.2,
            label=name,
        )
    axis.set_xlabel(label)
    axis.set_ylabel(f"accuracy under attack, %\n(average of {draws} draws)")
    axis.set_ylim(-2, 102)
    axis.grid(linewidth=0.4)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    paths = [path.with_name(path.name + ending) for ending in ENDINGS]
    for target in paths:
        plain = {"Date": None} if target.suffix == ".svg" else None
        write_figure(target, figure, dpi=160, metadata=plain)
    plt.close(figure)
    return paths
