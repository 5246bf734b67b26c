"""Where a loop's time goes: score network, classifier forward, its VJP, the step, and the rest.

The models are wrapped so that they say when they start and end; the loop itself is run unchanged.
The end of the classifier's vector-Jacobian product is when the gradient of its input arrives. The
step is timed alone and taken off what is left; for loops whose step is part of a solver it stays
there. On CUDA the marks are events on the stream, so that nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.benchmarking.case import VariantUnavailable
from coup_fast.benchmarking.networks import Models
from coup_fast.benchmarking.timing import clock_for, measure_in_turns

NETWORK, FORWARD, VJP = "score network", "classifier forward", "classifier VJP"
STEP, REST = "step and noise", "host and rest"
COMPONENTS = (NETWORK, FORWARD, VJP, STEP, REST)


class Watch:
    """Marks in the order they were made: the time up to a mark belongs to its name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _, self.clock = clock_for(device)
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, self.clock()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Itself: copies of a watched module report to the same watch."""
        return self

    def seconds(self) -> dict[str, float]:
        """Seconds of each component between the first mark and the last; forgets the marks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals = dict.fromkeys(COMPONENTS, 0.0)
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            cuda = self.device.type == "cuda"
            totals[name] += start.elapsed_time(end) / 1e3 if cuda else end - start
        self.marks.clear()
        return totals


class WatchedNetwork(nn.Module):
    """A network whose calls are marked."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], watch: Watch) -> None:
        super().__init__()
        self.network, self.watch = network, watch

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.watch.mark(REST)
        out = self.network(x, t)
        self.watch.mark(NETWORK)
        return out


class WatchedClassifier(nn.Module):
    """A classifier whose calls and vector-Jacobian products are marked."""

    def __init__(self, classifier: Callable[[Tensor], Tensor], watch: Watch) -> None:
        super().__init__()
        self.classifier, self.watch = classifier, watch

    def forward(self, images: Tensor) -> Tensor:
        self.watch.mark(REST)
        if images.requires_grad:
            images.register_hook(lambda _: self.watch.mark(VJP))  # type: ignore[no-untyped-call]
        logits = self.classifier(images)
        self.watch.mark(FORWARD)
        return logits


def measure(
    models: Models,
    loops_of: Callable[[Models], Mapping[str, Callable[[], Callable[[Tensor], Tensor]]]],
    steps_alone: Mapping[str, Callable[[], object]],
    images: Tensor,
    runs: int,
) -> dict[str, dict[str, float]]:
    """Seconds per run of each component of each loop.

    Of `runs` runs of each loop, taken in turns, the one of median length is reported. steps_alone:
    for the loops where it can be told, all steps of a run without the models.
    """
    watch = Watch(images.device)
    assert models.classifier is not None
    seen = replace(
        models,
        network=WatchedNetwork(models.network, watch),
        classifier=WatchedClassifier(models.classifier, watch),
    )
    loops: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, make in loops_of(seen).items():
        try:
            loops[name] = make()
        except VariantUnavailable:
            continue
    for loop in loops.values():
        loop(images)
    watch.marks.clear()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for _ in range(runs):
        for name, loop in loops.items():
            watch.mark(REST)
            loop(images)
            watch.mark(REST)
            samples[name].append(watch.seconds())
    alone = measure_in_turns(steps_alone, images.device, 21, 1e-3, 0.5)
    result = {}
    for name, taken in samples.items():
        middle = sorted(taken, key=lambda run: sum(run.values()))[len(taken) // 2]
        if name in alone:
            middle[STEP] = min(alone[name].median, middle[REST])
            middle[REST] -= middle[STEP]
        result[name] = middle
    return result
