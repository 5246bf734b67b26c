"""The fastest way to purify on this machine at little cost of accuracy, found by measuring.

Two things make a purification fast: fewer steps, and faster networks. The steps are those of
`coup-short` and `diffpure-short`, ten of the exponential solver (docs/performance.md compares their
accuracy with that of the published hundred). How the networks are called fastest depends on the
machine, the networks and the batch, so it is measured and not ruled.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from coup_fast import checks, malloc, methods
from coup_fast.benchmarking.timing import measure_in_turns
from coup_fast.purifier import Purifier
from coup_fast.run.model_calls import wants_channels_last

SHORT_STEPS = 10
TOLERANCE = 0.01  # of the root mean square difference from float32, in pixels of [0, 1]
COMPILE_WORTH = 600.0  # seconds that a run must last before compiled networks are tried
HOPELESS = 3.0  # a setting this many times as slow as the fastest one is measured once only
CLEARLY = 0.97  # of the time of an earlier one, or the earlier one is chosen
_ROUNDS = 3


@dataclass(frozen=True)
class Trial:
    """One way of calling the networks.

    Attributes:
        options: of the `Purifier`.
        seconds: per step and image, the median of several runs in turns with the others.
        difference: root mean square difference of the purified pixels from float32's.
        refused: why the setting cannot be chosen; "" if it can.
    """

    options: dict[str, Any]
    seconds: float
    difference: float
    refused: str = ""


@dataclass(frozen=True)
class FastSetting:
    """What `fast_setting` chose; `print` shows it.

    Attributes:
        purifier: the given purifier with the chosen options.
        options: the chosen options, to write into a script or a configuration, so that another
            machine computes the same.
        trials: everything that was measured.
        notes: the reasons, a sentence each.
    """

    purifier: Purifier
    options: dict[str, Any]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(_shown(trial.options)) for trial in self.trials)
        lines = [f"fast: {_shown(self.options)}"]
        lines += [
            f"  {_shown(trial.options):<{width}}  {1e3 * trial.seconds:8.3f} ms a step and image, "
            f"differs by {trial.difference:.1e}" + (f"; {trial.refused}" if trial.refused else "")
            for trial in self.trials
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def fast_setting(
    purifier: Purifier,
    images: Tensor,
    *,
    num_images: int | None = None,
    shorten: bool = True,
) -> FastSetting:
    """Find the options under which this machine purifies such images fastest.

    SDE methods (COUP, DiffPure and the others with an option `solver`) take ten steps of the
    exponential solver if they took more. That may cost accuracy: 0 to 3 points in the comparison of
    docs/performance.md. Then the networks are called in float32 and bfloat16 (on a GPU in TF32
    too), in the layout of the images and in channels_last, and the fastest way is chosen. A way
    whose result is not finite, or differs from float32's by more than 0.01 (root mean square,
    pixels in [0, 1]), is refused. The search purifies the images about twice for each way.

    Options that a run of the same numbers needs are in the result, because another machine may
    choose otherwise. The process keeps freed memory from then on (`coup_fast.malloc`).

    Args:
        purifier: whose models, method, seed and options to start from.
        images: [B, C, H, W] pixels in [0, 1], float32: a batch as it will be purified, on the
            device where it will be.
        num_images: how many images will be purified. If they take longer than ten minutes, networks
            compiled by `torch.compile` are tried too, which takes a minute or more.
        shorten: whether to take fewer steps. False leaves the method as it is.

    Returns:
        The setting, with all that was measured.

    Raises:
        TypeError: purifier is no `Purifier`, images are not float32, num_images is no int, or
            shorten is no bool.
        ValueError: images are no batch of such pixels, or num_images is below 1.
        RuntimeError: no setting gives finite results.
    """
    if not isinstance(purifier, Purifier):
        raise TypeError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float32 tensor, got {got}")
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"images must be [B, C, H, W] with at least one image, got {tuple(images.shape)}"
        )
    if num_images is not None:
        num_images = checks.integer("num_images", num_images, 1)
    images = images.detach()
    steps, notes = _short(purifier) if checks.flag("shorten", shorten) else ({}, [])
    if not malloc.keep_freed_memory() and images.device.type == "cpu":
        notes.append(
            "Freed memory is not kept: the C library is not glibc, or its settings are given."
        )
    start = purifier.with_options(**steps, compile=False)
    search = _Search(start, images)
    precisions = ("fp32", "tf32", "bf16") if images.device.type == "cuda" else ("fp32", "bf16")
    other = not wants_channels_last("auto", purifier.score_model.network)
    for precision, layout in product(precisions, ("auto", other)):
        search.add({"precision": precision, "channels_last": layout})
    search.measure()
    best = search.best()
    if num_images is not None:
        notes.append(_try_compiled(search, best, num_images))
        best = search.best()
    options = {**steps, **best.options}
    return FastSetting(
        purifier.with_options(**{"compile": False, **options}),
        options,
        tuple(search.trials),
        tuple(notes),
    )


def _short(purifier: Purifier) -> tuple[dict[str, Any], list[str]]:
    """Options that shorten the run, and a sentence about them."""
    steps = purifier.plan.num_steps
    known = methods.options(purifier.method)
    if "solver" not in known:
        return {}, [
            f"{purifier.method} keeps its {steps} steps: no shorter form of it is known to be as "
            "accurate."
        ]
    if steps <= SHORT_STEPS:
        return {}, [f"{purifier.method} keeps its {steps} steps."]
    options: dict[str, Any] = {"num_steps": SHORT_STEPS, "solver": "exponential"}
    if purifier.options.get("step_size", known.get("step_size")) is not None:
        options["step_size"] = None
    return options, [
        f"{purifier.method} takes {SHORT_STEPS} steps of the exponential solver in place of "
        f"{steps}, which may cost some accuracy; shorten=False keeps its steps."
    ]


class _Search:
    """Ways of calling the networks, measured against each other on the same images."""

    def __init__(self, start: Purifier, images: Tensor) -> None:
        self.start, self.images = start, images
        self.trials: list[Trial] = []
        self._seconds: list[float] = []  # of the first whole run of each
        self._reference: Tensor | None = None

    def add(self, options: dict[str, Any]) -> None:
        """Purify once under these options; the first ones are float32's."""
        purifier = self.start.with_options(**options)
        if self._reference is None:
            _run(purifier, self.images)  # what torch sets up once is no setting's time
        began = time.perf_counter()
        refused, difference = "", float("nan")
        try:
            result = _run(purifier, self.images)
        except (FloatingPointError, RuntimeError) as error:
            if self._reference is None:
                raise
            refused = f"refused: {' '.join(str(error).split())[:200]}"
        else:
            if self._reference is None:
                self._reference = result
            difference = float((result - self._reference).double().square().mean().sqrt())
            if not difference <= TOLERANCE:
                refused = f"refused: it differs by more than {TOLERANCE}"
        _wait(self.images)
        seconds = time.perf_counter() - began
        self._seconds.append(seconds)
        self.trials.append(Trial(options, self._per_step(seconds), difference, refused))

    def measure(self) -> None:
        """Replace the times of first runs by medians of runs in turns, but for hopeless ones."""
        fastest = min(self._seconds)
        chosen = {
            number: self.start.with_options(**trial.options)
            for number, trial in enumerate(self.trials)
            if not trial.refused and self._seconds[number] <= HOPELESS * fastest
        }
        runs = {str(n): lambda p=p: _run(p, self.images) for n, p in chosen.items()}
        times = measure_in_turns(runs, self.images.device, _ROUNDS, 0.0, 60.0)
        for number in chosen:
            trial = self.trials[number]
            seconds = self._per_step(times[str(number)].median)
            self.trials[number] = Trial(trial.options, seconds, trial.difference)

    def best(self) -> Trial:
        """The first one, or a later one that is clearly faster and was not refused."""
        best = self.trials[0]
        for trial in self.trials[1:]:
            if not trial.refused and trial.seconds < CLEARLY * best.seconds:
                best = trial
        return best

    def _per_step(self, seconds: float) -> float:
        return seconds / (len(self.images) * self.start.plan.num_steps)


def _try_compiled(search: _Search, best: Trial, num_images: int) -> str:
    """Measure compiled networks beside the best ones, if so many images make it worth it."""
    seconds = best.seconds * search.start.plan.num_steps * num_images
    if seconds < COMPILE_WORTH:
        return (
            f"Compiled networks were not tried: {num_images} images take about {seconds:.0f} s, "
            f"and compilation pays from {COMPILE_WORTH:.0f} s on."
        )
    before = len(search.trials)
    search.add({**best.options, "compile": True})
    took = search._seconds[before]
    search.measure()
    return f"Compilation and a first run took {took:.0f} s."


@torch.no_grad()
def _run(purifier: Purifier, images: Tensor) -> Tensor:
    purified: Tensor = purifier(images, range(len(images)))
    return purified


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "as given"
