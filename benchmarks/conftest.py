"""Options and provenance of the benchmark suite: `pytest benchmarks --benchmark-json=FILE`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coup_fast import _extension
from coup_fast.evaluation.report import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coup_fast")
    group.addoption("--threads", type=int, help="CPU threads of torch and of the kernels")
    group.addoption(
        "--batches", type=int, nargs="+", default=[8, 64, 512], help="numbers of 3x32x32 images"
    )
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", metafunc.config.getoption("--batches"))


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


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["coup_fast"] = environment(config.getoption("--bench-device"))
