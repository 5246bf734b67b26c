"""Every loop of `coup-fast bench --loop` under pytest-benchmark, correctness first.

The numbers are of whole runs; divide by `extra_info.steps`.
"""

from __future__ import annotations

from collections.abc import Callable

from coup_fast.benchmarking import Case, Variant
from coup_fast.benchmarking.catalogue import Family

GROUP = "loops"


def test_loop(
    entry: tuple[Family, int, int],
    checked: Callable[[Family, int], Case],
    timed: Callable[[Case, Variant], None],
) -> None:
    family, batch, index = entry
    case = checked(family, batch)
    timed(case, case.variants[index])
