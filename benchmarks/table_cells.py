"""Cells and tables in Markdown, for what writes the project's tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"
# Reports of the first CIFAR-10 networks; the model card says what replaced them.
FIRST_NETWORKS = (
    "cifar10",
    "cifar10_adaptive",
    "fast_cifar10",
    "steps_cifar10",
    "steps_cifar10_adaptive",
)


def table(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def file_of(path: Path) -> str:
    """A file of results as text names it."""
    inside = path.relative_to(FOLDER) if path.is_relative_to(FOLDER) else Path(path.name)
    return f"`benchmarks/results/{inside.as_posix()}`"


def networks_of(path: Path) -> str:
    """A remark on a report of networks that the package no longer has; empty for others."""
    return " (first networks)" if path.stem in FIRST_NETWORKS else ""


def percent(number: dict[str, float] | None) -> str:
    """A share with its interval in percent, "98.4 [91.7, 99.7]"; empty for None."""
    if number is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number[k] for k in ("rate", "low", "high")))
