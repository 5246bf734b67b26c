"""Time the kernels on a CUDA device beside its own copy, eager PyTorch and torch.compile.

    python benchmarks/gpu_kernels.py --json FILE          what benchmarks/gpu.sh runs
    python benchmarks/gpu_kernels.py --profile            each large case once, for Nsight Compute
    python benchmarks/gpu_kernels.py --check-only         tiny sizes on any device, nothing is timed

Every case first gives the CPU's bits on its first samples. Times are medians of replays of a CUDA
graph between two events, so they hold no launch from Python; `call` is the time per call from
Python instead. Bytes count each tensor's elements once, whatever a kernel does. `copy` is the
device's own copy of as many bytes, in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coup_fast import methods, noise, ops
from coup_fast.benchmarking import rivals
from coup_fast.evaluation.provenance import environment, write_json
from coup_fast.plan import C, D, V, W
from coup_fast.schedules import VPSchedule

LARGE = {(3, 32, 32): 24576, (3, 256, 256): 384}  # images: 302 MB a float32 tensor
SMALL = (1, 10, 128)  # images of 3x32x32
ADAPTIVE_ROW = (5e-5, 1e-5, 1e-1, 1e-3, 256 / 255, -1 / 510, 0.0, 1.0)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one size. make(images, device) -> (function of the arguments, arguments).

    bytes_per_element counts every tensor once. rivals maps a name to what makes, of the arguments,
    a call of the same formula elsewhere.
    """

    name: str
    shape: tuple[int, ...]  # of a sample
    images: int
    bytes_per_element: float
    make: Callable[[int, str], tuple[Callable[..., Any], tuple[Any, ...]]]
    rivals: dict[str, Callable[..., Run]] | None = None


def _row(device: str) -> Tensor:
    plan = methods.plan("coup", VPSchedule(), "eps")
    return torch.from_numpy(plan.coeffs[len(plan.coeffs) // 2]).float().to(device)


def _randn(shape: tuple[int, ...], device: str, seed: int, **options: Any) -> Tensor:
    """The same numbers on every device for the first samples: the check compares devices."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(min(shape[0], 64), *shape[1:], generator=generator)
    repeats = -(-shape[0] // len(few))
    full = few.to(device).repeat(repeats, *[1] * (few.dim() - 1))[: shape[0]]
    return full.to(**options) if options else full


def _keys(images: int, shape: tuple[int, ...], device: str) -> Tensor:
    return noise.step_keys(0, range(images), 0, 1, math.prod(shape))[0].to(device)


def step(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    state_layout: str | None = None,
    norm: str = "none",
    backward: bool = False,
) -> Callable[[int, str], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """COUP's step; dtype and layout are those of the network's output and the guidance."""

    def make(images: int, device: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        full = (images, *shape)
        state = LAYOUTS[state_layout or layout]
        x = _randn(full, device, 0).contiguous(memory_format=state)
        others = {"dtype": dtype, "memory_format": LAYOUTS[layout]}
        m, g = (_randn(full, device, seed, **others) for seed in (1, 2))
        args = (x, m, _row(device), _keys(images, shape, device), g, None, None, norm)
        if backward:
            return torch.ops.coup_fast.reverse_step_backward.default, (x, *args)
        return ops.reverse_step, args

    return make


def adaptive(
    shape: tuple[int, ...], backward: bool = False
) -> Callable[[int, str], tuple[Callable[..., Any], tuple[Any, ...]]]:
    def make(images: int, device: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        full = (images, *shape)
        x, h = _randn(full, device, 0), _randn(full, device, 1)
        alive = torch.ones(images, dtype=torch.bool, device=device)
        args = (x, h, h * 0.999, alive, torch.tensor(ADAPTIVE_ROW, device=device))
        if backward:
            return torch.ops.coup_fast.adaptive_step_backward.default, (x, *args)
        return ops.adaptive_step, args

    return make


def normal(
    shape: tuple[int, ...],
) -> Callable[[int, str], tuple[Callable[..., Any], tuple[Any, ...]]]:
    def make(images: int, device: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return ops.normal, (_keys(images, shape, device), (images, *shape))

    return make


def confidence(
    classes: int,
) -> Callable[[int, str], tuple[Callable[..., Any], tuple[Any, ...]]]:
    def make(images: int, device: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return ops.confidence_cotangent, (3 * _randn((images, classes), device, 0),)

    return make


# --- rivals: the formulas with torch's own normals, coefficients as numbers where that is quicker -


def normed_step(x: Tensor, m: Tensor, g: Tensor, row: Tensor) -> Tensor:
    length = g.flatten(1).norm(dim=1)[:, None, None, None]
    return rivals.guided_step_of_row(x, m, g / length, row)


def eager_step(x: Tensor, m: Tensor, row: Tensor, keys: Tensor, g: Tensor, *_: Any) -> Run:
    numbers = [float(row[column]) for column in (V, W, C, D)]
    return lambda: rivals.guided_step(x, m, g, *numbers)


def eager_normed(x: Tensor, m: Tensor, row: Tensor, keys: Tensor, g: Tensor, *_: Any) -> Run:
    numbers = row[[V, W, C, D]]
    return lambda: normed_step(x, m, g, numbers)


def compiled_step(function: Callable[..., Any]) -> Callable[..., Run]:
    def build(x: Tensor, m: Tensor, row: Tensor, keys: Tensor, g: Tensor, *_: Any) -> Run:
        numbers, call = row[[V, W, C, D]], rivals.compiled(function)
        return lambda: call(x, m, g, numbers)

    return build


def eager_adaptive(x: Tensor, h: Tensor, ahead: Tensor, alive: Tensor, row: Tensor) -> Run:
    numbers = row[:6].tolist()
    return lambda: rivals.adaptive_step(x, h, ahead, alive, *numbers)


def compiled_adaptive(x: Tensor, h: Tensor, ahead: Tensor, alive: Tensor, row: Tensor) -> Run:
    numbers, call = row[:6].unbind(), rivals.compiled(rivals.adaptive_step)
    return lambda: call(x, h, ahead, alive, *numbers)


def of_logits(function: Callable[[Tensor], Any]) -> Callable[..., Run]:
    return lambda logits: lambda: function(logits)


STEP_RIVALS = {"eager": eager_step, "torch.compile": compiled_step(rivals.guided_step_of_row)}
NORMED_RIVALS = {"eager": eager_normed, "torch.compile": compiled_step(normed_step)}
ADAPTIVE_RIVALS = {"eager": eager_adaptive, "torch.compile": compiled_adaptive}
CONFIDENCE_RIVALS = {
    "eager": of_logits(rivals.confidence_cotangent),
    "torch.compile": lambda logits: of_logits(
        rivals.compiled(rivals.confidence_cotangent_closed_form)
    )(logits),
}


def cases() -> list[Case]:
    """Every case; large ones are bound by memory, small ones by latency."""
    half = torch.bfloat16
    out: list[Case] = []
    for shape, images in LARGE.items():
        name = "x".join(map(str, shape))

        def large(kernel: str, size: float, make: Any, shape=shape, images=images, name=name):
            out.append(Case(f"{kernel} {name}", shape, images, size, make))

        large("step", 16, step(shape))
        large("step bf16", 12, step(shape, half))
        large("step channels_last", 16, step(shape, layout="channels_last"))
        large("step bf16 channels_last", 12, step(shape, half, "channels_last"))
        mixed = step(shape, half, "channels_last", "contiguous")
        large("step bf16 channels_last, state contiguous", 12, mixed)
        large("step backward", 16, step(shape, backward=True))
        large("normalised step", 16, step(shape, norm="normalised"))
        large("normalised step bf16", 12, step(shape, half, norm="normalised"))
        large("adaptive step", 16, adaptive(shape))
        large("adaptive step backward", 28, adaptive(shape, backward=True))
        large("normal", 4, normal(shape))
    shape = (3, 32, 32)
    for images in SMALL:
        normed = step(shape, norm="normalised")
        out += [
            Case("small step", shape, images, 16, step(shape), STEP_RIVALS),
            Case("small normalised step", shape, images, 16, normed, NORMED_RIVALS),
            Case("small adaptive step", shape, images, 16, adaptive(shape), ADAPTIVE_RIVALS),
        ]
    for rows, classes in [(128, 10), (512, 10), (64, 1000), (65536, 1000)]:
        make = confidence(classes)
        out.append(Case("confidence", (classes,), rows, 8, make, CONFIDENCE_RIVALS))
    return out


# --- measurement ----------------------------------------------------------------------------------


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(case: Case, device: str) -> None:
    """The bits of the CPU on the first samples; a layout is a layout on both."""
    few = min(case.images, 3)
    function, args = case.make(few, device)
    on_cpu, cpu_args = case.make(few, "cpu")
    for index, (a, b) in enumerate(
        zip(_tensors(function(*args)), _tensors(on_cpu(*cpu_args)), strict=True)
    ):
        if a.stride() != b.stride() or not torch.equal(a.cpu(), b):
            raise AssertionError(f"{case.name}: output {index} differs from the CPU's")


def graph_seconds(run: Run, replays: int = 25) -> float:
    """Seconds of one run on the device: median of replays of a graph of enough runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    runs = max(1, min(20, round(0.4 / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(runs):
            run()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / runs)
    return 1e-3 * statistics.median(times)


def call_seconds(run: Run, calls: int = 200, repeats: int = 9) -> float:
    """Seconds of one call from Python, launches included: median."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def copy_seconds(size: int, copies: dict[int, float]) -> float:
    """The device's copy that reads and writes `size` bytes in all, measured once a size."""
    if size not in copies:
        source = torch.empty(max(1, size // 8), device="cuda").normal_()
        target = torch.empty_like(source)
        copies[size] = graph_seconds(lambda: target.copy_(source))
    return copies[size]


def measure(case: Case, copies: dict[int, float]) -> dict[str, Any]:
    function, args = case.make(case.images, "cuda")
    size = round(case.bytes_per_element * case.images * math.prod(case.shape))
    seconds = graph_seconds(lambda: function(*args))
    row: dict[str, Any] = {
        "case": case.name,
        "images": case.images,
        "shape": list(case.shape),
        "bytes": size,
        "seconds": seconds,
        "bytes_per_second": size / seconds,
        "copy_seconds": copy_seconds(size, copies),
    }
    row["of_copy"] = row["copy_seconds"] / seconds
    if case.rivals is not None:
        row["call_seconds"] = call_seconds(lambda: function(*args))
        for name, rival in case.rivals.items():
            try:
                run = rival(*args)
                row[name] = {"seconds": graph_seconds(run), "call_seconds": call_seconds(run)}
                row[name]["ratio"] = row[name]["seconds"] / seconds
            except Exception as error:  # whatever a compiler or a capture raises
                row[name] = {"unavailable": f"{type(error).__name__}: {str(error)[:200]}"}
    return row


def line(row: dict[str, Any]) -> str:
    text = f"{row['case']:52} {row['images']:6} {1e6 * row['seconds']:10.1f} us "
    text += f"{1e-9 * row['bytes_per_second']:8.0f} GB/s {100 * row['of_copy']:6.1f} % of copy"
    for name in ("eager", "torch.compile"):
        if "ratio" in row.get(name, {}):
            text += f", {name} {row[name]['ratio']:.2f}x"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows and where they come from")
    parser.add_argument("--profile", action="store_true", help="each large case once, untimed")
    parser.add_argument("--check-only", action="store_true", help="tiny sizes, untimed")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name]
    if options.check_only:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for case in chosen:
            check(case, device)
            if case.rivals is not None:  # compiling takes minutes: the eager one stands for both
                function, args = case.make(2, device)
                expected, actual = function(*args), case.rivals["eager"](*args)()
                assert _tensors(expected)[0].shape == _tensors(actual)[0].shape
        print(f"{len(chosen)} cases checked on {device}, none timed")
        return
    if options.profile:
        for case in chosen:
            if case.rivals is None:
                function, args = case.make(case.images, "cuda")
                function(*args)
        torch.cuda.synchronize()
        return
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    copies: dict[int, float] = {}
    for case in chosen:
        try:
            check(case, "cuda")
        except AssertionError as error:  # its time means nothing, those of others do
            failed.append(str(error))
            print(error, flush=True)
            continue
        rows.append(measure(case, copies))
        print(line(rows[-1]), flush=True)
        if options.json is not None:  # after each case: a run that is cut short keeps what it has
            write_json(options.json, {"environment": environment("cuda"), "rows": rows})
        torch.cuda.empty_cache()
    if options.json is None:
        print(json.dumps(rows))
    if failed:
        sys.exit(f"{len(failed)} of {len(chosen)} cases are wrong and were not timed")


if __name__ == "__main__":
    main()
