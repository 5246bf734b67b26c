"""Cells and tables in Markdown, for what writes the project's tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"


def table(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def file_of(path: Path) -> str:
    """A file of results as text names it."""
    inside = path.relative_to(FOLDER) if path.is_relative_to(FOLDER) else Path(path.name)
    return f"`benchmarks/results/{inside.as_posix()}`"


def percent(number: dict[str, float] | None) -> str:
    """A share with its interval in percent, "98.4 [91.7, 99.7]"; empty for None."""
    if number is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number[k] for k in ("rate", "low", "high")))
