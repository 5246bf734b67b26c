"""Every operator and rival of `coup-fast bench` under pytest-benchmark, correctness first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from coup_fast.benchmarking import cases

STEP = ("fused", "fused in place", "eager", "torch.compile", "exact Philox in plain torch")
RIVALS = ("fused", "eager", "torch.compile")


def _time(benchmark: Any, case: cases.Case, name: str, part: str = "whole") -> None:
    case.check()
    variant = next(v for v in case.variants if (v.name, v.part) == (name, part))
    try:
        function = variant.build()
    except cases.VariantUnavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{case.name}, {case.images} images, {part}"
    benchmark.extra_info |= {"elements": case.elements, "traffic": case.traffic}
    if case.device.type == "cuda":
        benchmark(lambda: (function(), torch.cuda.synchronize(case.device)))
    else:
        benchmark(function)


@pytest.mark.parametrize("name", STEP)
def test_step(benchmark: Any, batch: int, name: str, device: torch.device) -> None:
    _time(benchmark, cases.step_case(batch, device), name)


@pytest.mark.parametrize("part", ["noise", "arithmetic"])
@pytest.mark.parametrize("name", RIVALS)
def test_share(benchmark: Any, batch: int, name: str, part: str, device: torch.device) -> None:
    _time(benchmark, cases.step_case(batch, device), name, part)


@pytest.mark.parametrize("make", [cases.normal_case, cases.adaptive_case])
@pytest.mark.parametrize("name", RIVALS)
def test_per_image(
    benchmark: Any, batch: int, name: str, make: Callable[..., cases.Case], device: torch.device
) -> None:
    _time(benchmark, make(batch, device), name)


@pytest.mark.parametrize(("rows", "classes"), [(512, 10), (64, 1000)])
@pytest.mark.parametrize("name", RIVALS)
def test_confidence(
    benchmark: Any, rows: int, classes: int, name: str, device: torch.device
) -> None:
    _time(benchmark, cases.confidence_case(rows, classes, device), name)
