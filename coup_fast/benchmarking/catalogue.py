"""The list of what `coup-fast bench` and `benchmarks/` measure, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from coup_fast.benchmarking.case import Case
from coup_fast.benchmarking.loops import LoopSpec, loop_case
from coup_fast.benchmarking.operators import (
    adaptive_case,
    confidence_case,
    normal_case,
    overhead_case,
    step_case,
)


@dataclass(frozen=True)
class Family:
    """A case at several batch sizes.

    Args:
        name: what `--cases` takes.
        group: "operators" or "loops".
        make: (batch, device) -> Case.
        batches: default batch sizes on a CPU.
        cuda_batches: on CUDA; empty for what is measured on a CPU only.
        fixed: the batch size is part of the case; `--batches` does not change it.
    """

    name: str
    group: str
    make: Callable[[int, torch.device], Case]
    batches: tuple[int, ...]
    cuda_batches: tuple[int, ...]
    fixed: bool = False

    def sizes(self, device: torch.device, asked: Sequence[int] | None = None) -> tuple[int, ...]:
        """Batch sizes to measure on this device; `asked` replaces the default ones."""
        default = self.cuda_batches if device.type == "cuda" else self.batches
        return default if self.fixed or not asked or not default else tuple(asked)


def _confidence(classes: int) -> Callable[[int, torch.device], Case]:
    return lambda batch, device: confidence_case(batch, classes, device)


def loop_family(
    kind: str,
    network: str,
    steps: int,
    batches: tuple[int, ...],
    cuda_batches: tuple[int, ...] = (1, 10, 128),
) -> Family:
    """The loop `LoopSpec(kind, network, steps)`, named kind-network."""
    make = partial(loop_case, LoopSpec(kind, network, steps))
    return Family(f"{kind}-{network}", "loops", make, batches, cuda_batches)


IMAGES = (8, 64, 512)

FAMILIES: tuple[Family, ...] = (
    Family("step", "operators", step_case, IMAGES, IMAGES),
    Family("normal", "operators", normal_case, IMAGES, IMAGES),
    Family("adaptive", "operators", adaptive_case, IMAGES, IMAGES),
    Family("confidence-10", "operators", _confidence(10), (512,), (512,), fixed=True),
    Family("confidence-1000", "operators", _confidence(1000), (64,), (64,), fixed=True),
    Family("call", "operators", overhead_case, (1,), (1,), fixed=True),
    loop_family("diffpure", "none", 50, (1, 64)),
    loop_family("coup", "none", 50, (1, 64)),
    loop_family("ddpm", "none", 50, (1, 64)),
    loop_family("coup", "mnist", 20, (1, 16)),
    loop_family("ddpm", "mnist", 20, (1, 16)),
    loop_family("gradient", "mnist", 10, (1,)),
    loop_family("coup", "cifar", 10, (1, 8), cuda_batches=()),
    loop_family("ddpm", "cifar", 10, (1, 8), cuda_batches=()),
    loop_family("coup", "large", 10, ()),
    loop_family("ddpm", "large", 10, ()),
)


def family(name: str) -> Family:
    """The family of that name; ValueError lists those that exist."""
    for entry in FAMILIES:
        if entry.name == name:
            return entry
    raise ValueError(f"there is no case {name!r}; there are {', '.join(f.name for f in FAMILIES)}")
