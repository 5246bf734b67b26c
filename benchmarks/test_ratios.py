"""Speed claims with margins wide enough for a shared machine; what continuous integration checks.

`pytest benchmarks/test_ratios.py` takes well under a minute. The measured ratios are several times
these bounds, and the fastest of many short samples is compared: a failure means that something is
broken, not that the machine is busy.
"""

from __future__ import annotations

import pytest
import torch

from coup_fast.benchmarking import cases
from coup_fast.benchmarking.report import run_case

BOUNDS = {
    "step": (lambda device: cases.step_case(64, device), 1.5),
    "normal": (lambda device: cases.normal_case(64, device), 1.2),
    "adaptive": (lambda device: cases.adaptive_case(64, device), 1.2),
    "confidence": (lambda device: cases.confidence_case(512, 10, device), 1.2),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_fused_is_faster_than_eager(name: str, device: torch.device) -> None:
    make, least = BOUNDS[name]
    case = cases.without(make(device), "torch.compile")
    rows = run_case(case, repeats=51, sample_seconds=2e-4, budget_seconds=0.3)
    times = {row.variant: row.timing for row in rows if row.part == "whole"}
    fused, eager = times["fused"], times["eager"]
    assert fused is not None
    assert eager is not None
    assert eager.fastest / fused.fastest > least
