"""Medians of several functions measured in turns, so that drift hits all alike.

One thread on a CPU is timed by the processor time of this process: the same as the wall clock's on
an idle machine, and free of the time that other processes had the core on a busy one. Several
threads and GPUs are timed by the wall clock. Every `Timing` says which.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LONG = 0.02  # seconds of a call that needs no warming of caches and no repetition


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `samples` samples of `calls` calls each: median, quartiles, fastest.

    clock: "processor" or "wall".
    """

    median: float
    fastest: float
    lower_quartile: float
    upper_quartile: float
    samples: int
    calls: int
    clock: str = "wall"

    @property
    def unsteady(self) -> bool:
        """The middle half of the samples spreads over more than a quarter of the median, or most of
        them took half as long again as the fastest."""
        spread = self.upper_quartile - self.lower_quartile
        return spread > 0.25 * self.median or self.median > 1.5 * self.fastest


def clock_for(device: torch.device) -> tuple[str, Callable[[], float]]:
    """The clock for what runs on this device with torch's present number of threads."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "processor", time.process_time
    return "wall", time.perf_counter


def _sample(
    function: Callable[[], object], calls: int, device: torch.device, warm: bool = True
) -> float:
    """Seconds per call over `calls` calls; waits for the device before and after.

    An untimed call comes first: the other functions have had the caches in the meantime.
    """
    _, clock = clock_for(device)
    if warm:
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / calls


def _calls_for(function: Callable[[], object], seconds: float, device: torch.device) -> int:
    """How many calls last about `seconds`; warms the function up on the way."""
    calls = 1
    if min(_sample(function, 1, device, warm=False) for _ in range(2)) >= LONG:
        return 1
    while True:
        # The fastest of three: an interrupted sample must not make all others too short.
        per_call = max(min(_sample(function, calls, device) for _ in range(3)), 1e-9)
        if per_call * calls >= seconds / 4:
            return max(1, round(seconds / per_call))
        calls = min(4 * calls, 1 << 20)


def measure_in_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    sample_seconds: float,
    budget_seconds: float,
) -> dict[str, Timing]:
    """Median time per call of each function, samples interleaved round by round.

    A sample repeats a function for about `sample_seconds`; many short samples survive
    a busy machine better than a few long ones. A function that has used up
    `budget_seconds` sits out the remaining rounds after its third sample.
    """
    calls = {name: _calls_for(f, sample_seconds, device) for name, f in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            spent = sum(samples[name]) * calls[name]
            if spent > budget_seconds and len(samples[name]) >= 3:
                continue
            warm = not samples[name] or samples[name][-1] * calls[name] < LONG
            samples[name].append(_sample(function, calls[name], device, warm))
    clock, _ = clock_for(device)
    return {name: _summary(values, calls[name], clock) for name, values in samples.items()}


def _summary(values: list[float], calls: int, clock: str) -> Timing:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Timing(
        median=statistics.median(ordered),
        fastest=ordered[0],
        lower_quartile=ordered[quarter],
        upper_quartile=ordered[-1 - quarter],
        samples=len(ordered),
        calls=calls,
        clock=clock,
    )
