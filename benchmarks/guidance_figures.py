"""Draw the figures of docs/guidance.md from a report of guidance_study.py.

python benchmarks/guidance_figures.py     # writes docs/figures/guidance-*-{light,dark}.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strip import FOLDER as FIGURES
from table_cells import FOLDER

from coup_fast.files import write_figure

REPORT = FOLDER / "guidance_study.json"
OUTCOMES = {"flipped": "right labels that flip, %", "kept": "attacker's labels that stay, %"}
SHOWN = (0.1, False)  # t* and forward noise of the figure by λ


@dataclass(frozen=True)
class Theme:
    """Colours on a transparent ground: of text, of faint lines, and of the curves in order."""

    text: str
    faint: str
    curves: tuple[str, str, str]


THEMES = {
    "light": Theme("#1f2328", "#d0d7de", ("#cf222e", "#0969da", "#8250df")),
    "dark": Theme("#f0f6fc", "#3d444d", ("#f85149", "#58a6ff", "#bc8cff")),
}


def _axes(rows: int, columns: int, theme: Theme) -> tuple[Any, Any]:
    """A figure of small panels in the colours of a theme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.7 * columns + 0.5, 2.2 * rows + 0.5),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    figure.set_facecolor("none")
    for axis in axes.flat:
        axis.set_facecolor("none")
        axis.grid(axis="y", color=theme.faint, linewidth=0.6)
        axis.tick_params(colors=theme.text, labelsize=8, length=2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(theme.faint)
        for part in (axis.title, axis.xaxis.label, axis.yaxis.label):
            part.set_color(theme.text)
            part.set_fontsize(9)
    return figure, axes


def _curve(
    axis: Any, places: Sequence[float], shares: Sequence[dict[str, Any]], **look: Any
) -> None:
    """Shares in percent, with their intervals as bars."""
    known = [(place, s) for place, s in zip(places, shares, strict=True) if s["total"]]
    places = [place for place, _ in known]
    rates = [100 * s["rate"] for _, s in known]
    low = [100 * (s["rate"] - s["low"]) for _, s in known]
    high = [100 * (s["high"] - s["rate"]) for _, s in known]
    axis.errorbar(places, rates, (low, high), linewidth=1.4, markersize=4, capsize=2, **look)


def _legend(figure: Any, axes: Any, theme: Theme) -> None:
    """What the curves of the first panel are, below all panels."""
    curves = axes[0, 0].get_legend_handles_labels()
    look = {"frameon": False, "fontsize": 8, "labelcolor": theme.text, "ncols": 4}
    figure.legend(*curves, loc="outside lower center", **look)


def by_scale(report: dict[str, Any], theme: Theme) -> Any:
    """What guidance does to right and to attacked labels, by λ, for each classifier."""
    families = report["families"]
    figure, axes = _axes(len(OUTCOMES), len(families), theme)
    scales = report["study"]["scales"]
    for column, family in enumerate(families):
        rows = [r for r in family["settings"] if (r["t_star"], r["forward_noise"]) == SHOWN]
        for axis, (outcome, title) in zip(axes[:, column], OUTCOMES.items(), strict=True):
            for i, solver in enumerate(report["study"]["guidance_solvers"]):
                shown = [r for r in rows if r["guidance_solver"] in ("", solver)]
                places = [scales.index(r["scale"]) + 0.12 * i - 0.06 for r in shown]
                shares = [r["outcomes"][outcome] for r in shown]
                _curve(axis, places, shares, color=theme.curves[i], marker="os^"[i], label=solver)
            axis.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            if column == 0:
                axis.set_ylabel(title)
        axes[0, column].set_title(f"{family['name']}, {family['images']} images", fontsize=9)
        axes[-1, column].set_xlabel("guidance scale λ")
    for axis in axes[:, 0]:
        axis.set_ylim(bottom=0)  # of the row, once all of it is drawn
    _legend(figure, axes, theme)
    return figure


def by_step(report: dict[str, Any], theme: Theme) -> Any:
    """How often the classifier is right on the state x_t and on the denoised x̂0, step by step."""
    families = report["families"]
    figure, axes = _axes(2, len(families), theme)
    for column, family in enumerate(families):
        for axis, noised in zip(axes[:, column], (False, True), strict=True):
            shown = [r for r in family["states"] if r["forward_noise"] == noised and r["clean"]]
            for i, row in enumerate(shown):
                state, denoised = row["clean"]["state"], row["clean"]["denoised"]
                look = {"color": theme.curves[i], "marker": "os^"[i]}
                name = f"λ = {row['scale']:g}"
                _curve(axis, range(len(state)), state, label=f"$x_t$, {name}", **look)
                _curve(
                    axis,
                    range(len(denoised)),
                    denoised,
                    label=rf"$\hat{{x}}_0$, {name}",
                    ls=":",
                    **look,
                )
            axis.set_ylim(0, 100)
            if column == 0:
                start = "guided DiffPure" if noised else "COUP"
                axis.set_ylabel(f"right, %: {start}")
        axes[0, column].set_title(family["name"], fontsize=9)
        axes[-1, column].set_xlabel("steps taken")
    _legend(figure, axes, theme)
    return figure


FIGURE_OF = {"scale": by_scale, "step": by_step}


def draw(report: dict[str, Any], folder: Path) -> None:
    """Both figures of a report in both themes, as folder/guidance-NAME-THEME.png."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure_of in FIGURE_OF.items():
        for theme_name, theme in THEMES.items():
            figure = figure_of(report, theme)
            write_figure(folder / f"guidance-{name}-{theme_name}.png", figure, dpi=130)
            plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=REPORT, metavar="FILE")
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="DIR")
    arguments = parser.parse_args(argv)
    draw(json.loads(arguments.report.read_text(encoding="utf-8")), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
