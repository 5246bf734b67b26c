"""Options, parameters and provenance of the suite: `pytest benchmarks --benchmark-json=FILE`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from coup_fast import _extension
from coup_fast.benchmarking import Case, Variant, VariantUnavailable
from coup_fast.benchmarking.catalogue import FAMILIES, Family
from coup_fast.evaluation.provenance import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coup_fast")
    group.addoption("--threads", type=int, help="CPU threads of torch and of the kernels")
    group.addoption("--batches", type=int, nargs="+", help="numbers of images, not the case's own")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`entry`: (family, batch, index of the variant) for every variant of the module's GROUP."""
    if "entry" not in metafunc.fixturenames:
        return
    device = torch.device(metafunc.config.getoption("--bench-device"))
    asked = metafunc.config.getoption("--batches")
    entries: dict[str, tuple[Family, int, int]] = {}
    for family in FAMILIES:
        sizes = family.sizes(device, asked) if family.group == metafunc.module.GROUP else ()
        for batch in sizes:
            for index, variant in enumerate(family.make(1, device).variants):
                part = "" if variant.part == "whole" else f"-{variant.part}"
                entries[f"{family.name}-{batch}{part}-{variant.name}"] = (family, batch, index)
    metafunc.parametrize("entry", entries.values(), ids=entries.keys())


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--bench-device"))
    loaded = _extension.cuda_available() if chosen.type == "cuda" else _extension.available()
    if not loaded:
        pytest.fail(f"the {chosen.type} kernels are not loaded: nothing to benchmark")
    return chosen


@pytest.fixture(autouse=True, scope="session")
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    wanted = request.config.getoption("--threads")
    torch.set_num_threads(wanted or before)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checked(device: torch.device) -> Callable[[Family, int], Case]:
    """(family, batch) -> its case, checked once."""
    cases: dict[tuple[str, int], Case] = {}

    def get(family: Family, batch: int) -> Case:
        key = (family.name, batch)
        if key not in cases:
            cases.clear()  # one at a time in memory
            case = family.make(batch, device)
            case.check()
            cases[key] = case
        return cases[key]

    return get


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[[Case, Variant], None]:
    """Time one variant of a checked case."""

    def run(case: Case, variant: Variant) -> None:
        try:
            function = variant.build()
        except VariantUnavailable as reason:
            pytest.skip(str(reason))
        benchmark.group = f"{case.name}, {case.images} images, {variant.part}"
        benchmark.extra_info |= {
            "elements": case.elements,
            "traffic": case.traffic,
            "steps": case.steps,
        }
        if device.type == "cuda":
            benchmark(lambda: (function(), torch.cuda.synchronize(device)))
        elif case.steps > 1:
            benchmark.pedantic(function, rounds=5, warmup_rounds=1)
        else:
            benchmark(function)

    return run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["coup_fast"] = environment(config.getoption("--bench-device"))
