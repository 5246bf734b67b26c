"""Tables for the terminal, for Markdown and for notebooks, through tabulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Style = Literal["terminal", "markdown", "html"]
_FORMATS = {"terminal": "simple", "markdown": "github", "html": "html"}


def render_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    style: Style = "terminal",
    align: Sequence[Literal["left", "right", "center"]] | None = None,
) -> str:
    """A table as text. Cells are printed as given, numbers included, and None is empty.

    HTML is escaped, and sets alignments but no colours.

    Args:
        headers: one for each column.
        rows: as many cells each as there are headers.
        style: "terminal", "markdown" or "html".
        align: one word for each column; by default the first is "left" and the others "right".

    Raises:
        ValueError: a row has another number of cells.
    """
    from tabulate import tabulate

    if any(len(row) != len(headers) for row in rows):
        raise ValueError(f"every row needs {len(headers)} cells")
    columns = list(align) if align else ["left"] + ["right"] * (len(headers) - 1)
    text: str = tabulate(
        [["" if cell is None else str(cell) for cell in row] for row in rows],
        headers=list(headers),
        tablefmt=_FORMATS[style],
        colalign=columns if rows else None,
        disable_numparse=True,
    )
    return text
