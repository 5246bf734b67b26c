"""What every test shares: reproducible random numbers, one thread, the marks and the header."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

import coup_fast

# The same examples in every run, and no verdict that depends on how busy the machine is.
hypothesis.settings.register_profile(
    "coup_fast", derandomize=True, deadline=None, print_blob=False, database=None
)
hypothesis.settings.load_profile("coup_fast")
# `pytest --hypothesis-profile=fuzz`: others in every run, and more of them.
hypothesis.settings.register_profile(
    "fuzz", derandomize=False, deadline=None, database=None, max_examples=2000
)

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # several test processes share the cores


def pytest_report_header() -> str:
    info = coup_fast.build_info()
    return (
        f"coup_fast {info['version']}, torch {info['torch']}, "
        f"compiled {info['extension']['loaded']} ({info['cpu_capability']}), "
        f"cuda {info['cuda']['loaded']}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` without a GPU, unless COUP_FAST_FAIL_WITHOUT_CUDA forbids that."""
    usable = torch.cuda.is_available() and coup_fast._extension.cuda_available()
    if usable or os.environ.get("COUP_FAST_FAIL_WITHOUT_CUDA"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and a build with CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    """Each test starts from the same states of torch's, NumPy's and Python's generators."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (attack libraries draw from the global generator)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
