"""Draw README's strip of pictures: an attacked digit on its way through three purifiers.

    python benchmarks/strip.py            # writes docs/figures/strip-light.png and strip-dark.png

The digit is held out from the training of the bundled models. The attack is PGD on the classifier,
which ignores the purifier: the strip shows what a purifier does, not how robust it is. The settings
are the demo's.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import coup_fast
from coup_fast.attacks import PGD
from coup_fast.cli.demo_pictures import chosen_steps
from coup_fast.data import demo_digits
from coup_fast.files import write_figure
from coup_fast.models.bundled import bundled_settings, score_for

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
METHODS = {"coup": "COUP", "diffpure": "DiffPure", "adp": "ADP"}
STATES = 6  # of each run, start and result included


@dataclass(frozen=True)
class Theme:
    """Colours of what is written on a transparent ground."""

    text: str
    faint: str
    right: str
    wrong: str


THEMES = {  # those of GitHub's pages
    "light": Theme("#1f2328", "#59636e", "#1a7f37", "#cf222e"),
    "dark": Theme("#f0f6fc", "#9198a1", "#3fb950", "#f85149"),
}


@dataclass(frozen=True)
class Cell:
    """One picture [H, W] with the classifier's answer to it."""

    heading: str
    pixels: Tensor
    answer: int
    confidence: float


def cells_of(headings: list[str], pixels: Tensor, classifier: torch.nn.Module) -> list[Cell]:
    """Pictures [N, 1, H, W] with what the classifier says of each."""
    with torch.no_grad():
        confidence, answer = classifier(pixels).softmax(1).max(1)
    answers = zip(headings, pixels[:, 0], answer.tolist(), confidence.tolist(), strict=True)
    return [Cell(*values) for values in answers]


def rows_of(which: int) -> tuple[list[Cell], dict[str, list[Cell]], int]:
    """The digit clean and attacked, each method's states, and the label."""
    images, labels = demo_digits()
    image, label = images[which : which + 1], labels[which : which + 1]
    settings = bundled_settings("mnist")
    _, classifier = coup_fast.load_bundled("mnist")
    attack = PGD(eps=settings["epsilon"], steps=settings["attack_steps"], eot=1)
    attacked = attack(classifier, image, label, sample_ids=[which])
    before = cells_of(["clean", "attacked"], torch.cat([image, attacked]), classifier)
    rows = {}
    for method, name in METHODS.items():
        score_model, _ = coup_fast.load_bundled("mnist", score=score_for(method))
        options: dict[str, Any] = settings["methods"][method]
        purifier = coup_fast.Purifier(score_model, classifier, method=method, **options)
        states = dict(purifier.trajectory(attacked, sample_ids=[which]))
        last = max(states)  # ADP may stop early: later states equal the last
        steps = chosen_steps(purifier.plan.num_steps, STATES)
        pixels = torch.cat([states[min(k, last)] for k in steps])
        rows[name] = cells_of([f"step {k}" for k in steps], pixels, classifier)
    return before, rows, int(label)


def draw(
    path: Path, theme: Theme, before: list[Cell], rows: dict[str, list[Cell]], label: int
) -> None:
    """Save one picture in the colours of a theme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side, gap, under, top = 0.92, 0.10, 0.46, 0.38  # inches
    start = 0.06 + 2 * (side + gap) + 1.02  # the left edge of the runs
    width = start + STATES * (side + gap)
    height = top + len(rows) * (side + under) - 0.06
    figure = plt.figure(figsize=(width, height), facecolor="none")

    def write(x: float, y: float, text: str, colour: str, size: float, **more: Any) -> None:
        """Text centred at (x, y), in inches from the upper left corner."""
        place = {"ha": "center", "va": "center", "fontsize": size, "color": colour}
        figure.text(x / width, 1 - y / height, text, **place | more)

    def show(cell: Cell, x: float, y: float) -> None:
        """The picture with its upper left corner at (x, y)."""
        box = (x / width, 1 - (y + side) / height, side / width, side / height)
        axis = figure.add_axes(box)
        picture = cell.pixels.clamp(0, 1).numpy()
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color(theme.faint)
            spine.set_linewidth(0.8)
        middle, colour = x + side / 2, theme.right if cell.answer == label else theme.wrong
        write(middle, y + side + 0.11, cell.heading, theme.faint, 8.5)
        write(middle, y + side + 0.27, f"“{cell.answer}”  {100 * cell.confidence:.0f} %", colour, 9)

    centre = top + (len(rows) - 1) / 2 * (side + under)
    pair = side + gap / 2 + 0.06
    write(pair, 0.18, "one digit, attacked", theme.text, 10)
    for j, cell in enumerate(before):
        show(cell, 0.06 + j * (side + gap), centre)
    note = "Under each picture:\nwhat the classifier reads,\nand how sure it is."
    write(pair, height - 0.62, note, theme.faint, 8.5, linespacing=1.5)
    write(start + STATES / 2 * (side + gap), 0.18, "purified, step by step", theme.text, 10)
    for i, (name, cells) in enumerate(rows.items()):
        y = top + i * (side + under)
        write(start - 0.14, y + side / 2, name, theme.text, 11, ha="right", weight="bold")
        for j, cell in enumerate(cells):
            show(cell, start + j * (side + gap), y)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=int, default=0, help="which of the demo's digits")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    arguments = parser.parse_args()
    before, rows, label = rows_of(arguments.image)
    for name, theme in THEMES.items():
        draw(arguments.out / f"strip-{name}.png", theme, before, rows, label)


if __name__ == "__main__":
    main()
