"""Speed claims with margins wide enough for a shared machine; what continuous integration checks.

`pytest benchmarks/test_ratios.py` takes well under a minute. The measured ratios are several times
these bounds, and the fastest of many short samples is compared: a failure means that something is
broken, not that the machine is busy.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coup_fast.benchmarking import loops
from coup_fast.benchmarking.catalogue import family
from coup_fast.benchmarking.rows import Row, run_case

# Family, images, rival, part, least ratio of the rival's time to that of the case's first variant.
BOUNDS = [
    ("step", 64, "eager", "whole", 1.5),
    ("step", 64, "eager", "noise", 1.3),
    ("step", 64, "eager", "arithmetic", 1.2),
    ("normal", 64, "eager", "whole", 1.2),
    ("adaptive", 64, "eager", "whole", 1.2),
    ("confidence-10", 512, "eager", "whole", 1.2),
    ("confidence-1000", 64, "eager", "whole", 1.2),
]
LOOP_BOUNDS = [
    ("coup-none", 1, loops.TORCHSDE, 3.0),
    ("coup-none", 64, loops.TORCHSDE, 3.0),
    ("diffpure-none", 1, loops.TORCHSDE, 1.5),
    ("diffpure-none", 64, loops.TORCHSDE, 3.0),
    ("ddpm-none", 1, loops.DIFFUSERS, 1.1),
    ("ddpm-none", 64, loops.DIFFUSERS, 1.3),
]


def _rows(name: str, images: int, device: torch.device, *variants: str, repeats: int) -> list[Row]:
    case = family(name).make(images, device)
    case = replace(case, variants=tuple(v for v in case.variants if v.name in variants))
    return run_case(case, repeats=repeats, sample_seconds=2e-4, budget_seconds=0.3)


def _ratio(rows: list[Row], part: str, rival: str) -> float:
    """Fastest time of the rival over the fastest of the part's first variant."""
    first = next(row for row in rows if row.part == part)
    other = next(row for row in rows if row.part == part and row.variant == rival)
    assert first.timing is not None
    assert other.timing is not None
    return other.timing.fastest / first.timing.fastest


@pytest.mark.parametrize(("name", "images", "rival", "part", "least"), BOUNDS)
def test_operators(
    name: str, images: int, rival: str, part: str, least: float, device: torch.device
) -> None:
    rows = _rows(name, images, device, "fused", rival, repeats=51)
    assert _ratio(rows, part, rival) > least


@pytest.mark.parametrize(("name", "images", "rival", "least"), LOOP_BOUNDS)
def test_loops_without_their_networks(
    name: str, images: int, rival: str, least: float, device: torch.device
) -> None:
    rows = _rows(name, images, device, loops.OURS, rival, repeats=3)
    assert _ratio(rows, "whole", rival) > least
