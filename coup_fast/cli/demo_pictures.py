"""Pictures for reports, drawn with matplotlib's file backend: image grids and trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast.files import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

GOOD, BAD = "#1a7f37", "#c4342d"


@dataclass(frozen=True)
class GridRow:
    """One row of an image grid: its name, pixels [N, C, H, W], a caption per image.

    right: whether each caption is good news (green) or bad (red); None draws it in black.
    """

    name: str
    pixels: Tensor
    captions: Sequence[str]
    right: Sequence[bool] | None = None


def _figure(width: float, height: float) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height))


def _show(axis: Any, pixels: Tensor) -> None:
    """One image [C, H, W]; values outside [0, 1] are shown as the nearest of them."""
    picture = pixels.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    grey = picture.shape[2] == 1
    axis.imshow(
        picture[:, :, 0] if grey else picture,
        cmap="gray" if grey else None,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color("#888888")


def image_grid(rows: Sequence[GridRow], path: Path, title: str, side: float = 0.82) -> None:
    """Save rows of images with a caption above each and the row's name on the left.

    side: inches per image. Shorter rows end earlier.
    """
    columns = max(len(row.pixels) for row in rows)
    caption, left, top = 0.24, 1.0, 0.42
    width = left + columns * (side + 0.06) + 0.1
    height = top + len(rows) * (side + caption)
    figure = _figure(width, height)
    figure.text(0.12 / width, 1 - 0.22 / height, title, fontsize=10, va="center", ha="left")
    for i, row in enumerate(rows):
        bottom = height - top - (i + 1) * (side + caption) + 0.06
        middle = (bottom + side / 2) / height
        figure.text(0.12 / width, middle, row.name, fontsize=10, va="center", ha="left")
        for j in range(len(row.pixels)):
            x = (left + j * (side + 0.06)) / width
            axis = figure.add_axes((x, bottom / height, side / width, side / height))
            _show(axis, row.pixels[j])
            colour = "black" if row.right is None else GOOD if row.right[j] else BAD
            axis.set_title(row.captions[j], fontsize=9, color=colour, pad=2.5)
    write_figure(path, figure, dpi=200)
    _close(figure)


def _close(figure: Figure) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def chosen_steps(num_steps: int, count: int) -> list[int]:
    """At most `count` steps from 0 to num_steps, evenly spread, both ends included."""
    if num_steps < count:
        return list(range(num_steps + 1))
    return sorted({round(i * num_steps / (count - 1)) for i in range(count)})
