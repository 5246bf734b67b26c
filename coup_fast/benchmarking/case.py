"""What a benchmark case is, and the checks that come before its timing.

A case is one computation at one size with several ways to do it. Every variant computes the same
from the same inputs (random noise aside) and is called as a user would; a case whose check fails is
not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coup_fast import noise, ops
from coup_fast.benchmarking import rivals

FLOAT = 4  # bytes
COPY = "copy of the same bytes"
NOISE = "its normals alone"

Build = Callable[[], Callable[[], object]]


class VariantUnavailable(Exception):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. `build` returns the function that is timed.

    `part` is "whole" for the computation itself, else the share of it that this one computes; the
    first variant of a part is the one the others of the part are compared with.
    """

    name: str
    build: Build
    part: str = "whole"


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    Args:
        name: as in the tables; with `images` it identifies the case.
        images: images, or rows of logits.
        size: of one image, "3x32x32"; empty where the name says it.
        elements: of the result.
        traffic: bytes that have to be read or written, each counted once.
        check: raises AssertionError if a variant does not compute what it should.
        limits: times that no variant can beat, measured in turns with them; a copy of `traffic`
            bytes is always one.
        steps: times are also given divided by this.
        watch: for loops, a function that returns seconds per run of each component of each variant.
    """

    name: str
    images: int
    size: str
    elements: int
    traffic: int
    device: torch.device
    check: Callable[[], None]
    variants: tuple[Variant, ...] = field(repr=False)
    limits: Mapping[str, Build] = field(default_factory=dict, repr=False)
    steps: int = 1
    watch: Callable[[int], dict[str, dict[str, float]]] | None = field(default=None, repr=False)


def without(case: Case, name: str) -> Case:
    """The case without the variants of that name."""
    return replace(case, variants=tuple(v for v in case.variants if v.name != name))


def compiled_variant(
    name: str, function: Callable[..., object], *args: Tensor, part: str = "whole"
) -> Variant:
    """torch.compile of `function` on `args`; what it cannot compile is unavailable, with reason."""

    def build() -> Callable[[], object]:
        built = rivals.compiled(function)
        try:
            built(*args)
        except Exception as error:  # whatever the compiler's tool chain raises
            cause = next((line for line in str(error).splitlines() if line.strip()), "")
            raise VariantUnavailable(
                f"torch.compile failed: {type(error).__name__}: {cause.strip()[:200]}"
            ) from error
        return lambda: built(*args)

    return Variant(name, build, part)


def normals_limit(batch: int, numel: int, device: torch.device) -> Mapping[str, Build]:
    """On a CPU, where noise costs more than memory: the time to make [batch, numel] normals."""
    if device.type != "cpu":
        return {}
    keys = noise.step_keys(0, range(batch), 0, 1, numel)[0]
    return {NOISE: lambda: lambda: ops.normal(keys, (batch, numel))}


def require_close(name: str, actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """AssertionError if actual is further from expected than bound, or NaN, anywhere."""
    excess = ((actual.double() - expected.double()).abs() - bound).max()
    if not bool(excess <= 0):
        raise AssertionError(f"{name} is off by {float(excess):.3g} more than its bound")


def require_standard_normal(name: str, values: Tensor) -> None:
    """Mean, variance and fourth moment within six standard errors of a standard normal's."""
    z, count = values.double(), values.numel()
    moments = (z.mean(), z.square().mean() - 1.0, z.pow(4).mean() - 3.0)
    for moment, variance in zip(moments, (1.0, 2.0, 96.0), strict=True):
        if not abs(float(moment)) <= 6.0 * math.sqrt(variance / count):
            raise AssertionError(f"the noise of {name} is not standard normal")
