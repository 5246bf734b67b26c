"""Runs benchmark cases: each is checked, timed, and becomes rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from coup_fast.benchmarking.case import COPY, Case, VariantUnavailable
from coup_fast.benchmarking.timing import Timing, measure_in_turns


@dataclass(frozen=True)
class Row:
    """One variant of one case. Times in seconds; `unavailable` says why there are none.

    Args:
        ratio: this variant's time over that of the first variant of the same part.
        limits: medians of what no variant can beat, measured in turns with the variants.
        components: for loops, where a run's seconds go (a run of its own).
        stamp: where the row comes from: commit, device, versions, threads, instruction set, date.

    The other fields are those of `Case` and `Variant`.
    """

    case: str
    images: int
    size: str
    elements: int
    traffic: int
    steps: int
    variant: str
    part: str
    timing: Timing | None = None
    ratio: float | None = None
    limits: dict[str, float] | None = None
    components: dict[str, float] | None = None
    unavailable: str | None = None
    stamp: dict[str, Any] | None = None

    @property
    def ns_per_element(self) -> float | None:
        """Median time of a step divided by elements, in nanoseconds."""
        step = self.seconds_per_step
        return None if step is None else 1e9 * step / self.elements

    @property
    def seconds_per_step(self) -> float | None:
        """Median time divided by the case's steps (1 for an operator)."""
        return None if self.timing is None else self.timing.median / self.steps

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the stamp's entries stand among the others."""
        fields = asdict(self)
        stamp = fields.pop("stamp") or {}
        derived = {
            "ns_per_element": self.ns_per_element,
            "seconds_per_step": self.seconds_per_step,
            "unsteady": None if self.timing is None else self.timing.unsteady,
        }
        return {**fields, **derived, **stamp}


def stamp_of(environment: dict[str, Any], date: str) -> dict[str, Any]:
    """What every row says about where it comes from, of `evaluation.provenance.environment`."""
    device = torch.device(environment["device"])
    on_cpu = device.type == "cpu"
    return {
        "date": date,
        "commit": environment["commit"],
        "device": str(device),
        "device_name": environment["device_name"],
        "instruction_set": environment["build"].get("cpu_capability") if on_cpu else None,
        "threads": environment["threads"],
        "versions": environment["versions"],
    }


def run_case(
    case: Case,
    repeats: int,
    sample_seconds: float,
    budget_seconds: float,
    stamp: dict[str, Any] | None = None,
    watched_runs: int = 0,
) -> list[Row]:
    """Check one case, then time its variants and its limits, in turns.

    watched_runs: loops are run that often more, to see where their time goes.
    Raises AssertionError if the check fails.
    """
    case.check()
    functions: dict[str, Callable[[], object]] = {}
    unavailable: dict[str, str] = {}
    for variant in case.variants:
        key = f"{variant.part}/{variant.name}"
        try:
            functions[key] = variant.build()
        except VariantUnavailable as reason:
            unavailable[key] = str(reason)
    functions |= {name: build() for name, build in case.limits.items()}
    source = torch.ones(max(1, case.traffic // case.steps // 8), device=case.device)
    target = torch.empty_like(source)
    functions[COPY] = lambda: target.copy_(source)
    timings = measure_in_turns(functions, case.device, repeats, sample_seconds, budget_seconds)
    limits = {name: timings[name].median for name in case.limits}
    limits[COPY] = case.steps * timings[COPY].median
    seen = case.watch(watched_runs) if case.watch is not None and watched_runs else {}
    first = {v.part: f"{v.part}/{v.name}" for v in reversed(case.variants)}
    rows = []
    for variant in case.variants:
        key = f"{variant.part}/{variant.name}"
        timing, base = timings.get(key), timings.get(first[variant.part])
        rows.append(
            Row(
                case=case.name,
                images=case.images,
                size=case.size,
                elements=case.elements,
                traffic=case.traffic,
                steps=case.steps,
                variant=variant.name,
                part=variant.part,
                timing=timing,
                ratio=None if timing is None or base is None else timing.median / base.median,
                limits=limits if variant.part == "whole" else None,
                components=seen.get(variant.name) if variant.part == "whole" else None,
                unavailable=unavailable.get(key),
                stamp=stamp,
            )
        )
    return rows


def row_from(data: dict[str, Any]) -> Row:
    """The row that `as_dict` wrote."""
    own = {name: data[name] for name in Row.__dataclass_fields__ if name in data}
    derived = {"ns_per_element", "seconds_per_step", "unsteady"}
    stamp = {key: value for key, value in data.items() if key not in own and key not in derived}
    timing = own.get("timing")
    return replace(
        Row(**own), timing=None if timing is None else Timing(**timing), stamp=stamp or None
    )
