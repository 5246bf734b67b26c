"""Every operator and rival of `coup-fast bench` under pytest-benchmark, correctness first."""

from __future__ import annotations

from collections.abc import Callable

from coup_fast.benchmarking import Case, Variant
from coup_fast.benchmarking.catalogue import Family

GROUP = "operators"


def test_operator(
    entry: tuple[Family, int, int],
    checked: Callable[[Family, int], Case],
    timed: Callable[[Case, Variant], None],
) -> None:
    family, batch, index = entry
    case = checked(family, batch)
    timed(case, case.variants[index])
