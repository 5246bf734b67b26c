"""The benchmark itself: cases are checked before they are timed, rows say what happened.

Loops have their own file, test_bench_loops.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coup_fast import _extension
from coup_fast.benchmarking import case, operators, results, rivals, tables
from coup_fast.benchmarking.catalogue import FAMILIES, family
from coup_fast.benchmarking.rows import Row, run_case
from coup_fast.benchmarking.timing import Timing, clock_for, measure_in_turns
from coup_fast.cli import main

CPU = torch.device("cpu")
SHORT = {"repeats": 3, "sample_seconds": 1e-5, "budget_seconds": 1e-3}

needs_kernels = pytest.mark.skipif(
    not _extension.available(), reason="the compiled operators are not there"
)


def _spin(seconds: float) -> None:
    """Keep a core busy for as long, by the clock in use."""
    _, clock = clock_for(CPU)
    end = clock() + seconds
    while clock() < end:
        pass


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_clock_of_one_thread_ignores_other_processes() -> None:
    waits = {"waits": lambda: (_spin(1e-3), time.sleep(5e-3))}
    timing = measure_in_turns(waits, CPU, 3, 1e-3, 1.0)["waits"]
    assert timing.clock == "processor"
    assert 1e-3 <= timing.median < 3e-3
    torch.set_num_threads(2)
    timing = measure_in_turns(waits, CPU, 3, 1e-3, 1.0)["waits"]
    assert timing.clock == "wall"
    assert timing.median >= 6e-3


def test_medians_are_of_the_functions_measured_in_turns() -> None:
    order: list[str] = []

    def wait(name: str, seconds: float) -> None:
        order.append(name)
        _spin(seconds)

    timings = measure_in_turns(
        {"a": lambda: wait("a", 1e-3), "b": lambda: wait("b", 4e-3)}, CPU, 5, 1e-3, 1.0
    )
    assert timings["a"].samples == timings["b"].samples == 5
    assert timings["a"].fastest >= 1e-3
    assert timings["b"].fastest >= 4e-3
    for timing in timings.values():
        assert timing.fastest <= timing.lower_quartile <= timing.median <= timing.upper_quartile
    assert order[-8:] == ["a", "a", "b", "b"] * 2  # an untimed call, then the sample, in turns


def test_a_slow_function_sits_out_after_three_samples() -> None:
    timings = measure_in_turns(
        {"slow": lambda: _spin(2e-2), "fast": lambda: None}, CPU, 8, 1e-5, 5e-2
    )
    assert timings["slow"].samples == 3
    assert timings["fast"].samples == 8


@needs_kernels
@pytest.mark.parametrize("name", ["step", "normal", "adaptive", "call"])
@pytest.mark.parametrize("batch", [1, 5])
def test_operators_and_rivals_compute_the_same(name: str, batch: int) -> None:
    family(name).make(batch, CPU).check()


@needs_kernels
@pytest.mark.parametrize(("batch", "classes"), [(512, 10), (3, 7)])
def test_confidence_and_its_rivals_compute_the_same(batch: int, classes: int) -> None:
    operators.confidence_case(batch, classes, CPU).check()


@needs_kernels
def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rivals.guided_step_arithmetic
    monkeypatch.setattr(rivals, "guided_step_arithmetic", lambda *args: 1.001 * right(*args))
    with pytest.raises(AssertionError, match="eager step is off"):
        run_case(operators.step_case(1, CPU), **SHORT)


@needs_kernels
def test_a_wrong_case_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, table = rivals.guided_step_arithmetic, tmp_path / "bench.json"
    monkeypatch.setattr(rivals, "guided_step_arithmetic", lambda *args: 1.001 * right(*args))
    argv = ["bench", "--quick", "--batches", "2", "--no-compile", "--threads", "1"]
    assert main([*argv, "--cases", "step", "confidence-10", "--json", str(table)]) == 1
    assert "guided COUP step, 2 images: not timed" in capsys.readouterr().err
    rows = json.loads(table.read_text())["rows"]
    assert {row["case"] for row in rows} == {"confidence_cotangent [512,10]"}
    assert main([*argv, "--cases", "step"]) == 1


def test_noise_that_is_not_normal_is_noticed() -> None:
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    case.require_standard_normal("z", z)
    for wrong in (z + 0.05, 1.05 * z, torch.rand(100_000) * 12**0.5 - 3**0.5):
        with pytest.raises(AssertionError, match="noise of z "):
            case.require_standard_normal("z", wrong)


@needs_kernels
def test_a_compiler_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(rivals, "compiled", lambda function: broken)
    rows = run_case(operators.adaptive_case(1, CPU), **SHORT)
    row = next(row for row in rows if row.variant == "torch.compile")
    assert row.timing is None
    assert row.unavailable == "torch.compile failed: RuntimeError: no C++ compiler"
    text = tables.tables(rows)
    assert "no C++ compiler" in text
    assert "long trace" not in text


def test_traffic_counts_every_byte_once() -> None:
    elements = 8 * 3 * 32 * 32
    assert operators.step_case(8, CPU).traffic == 16 * elements  # x, eps, G, result
    assert operators.normal_case(8, CPU).traffic == 4 * elements
    assert operators.adaptive_case(8, CPU).traffic == 16 * elements  # x, h, h', result
    assert operators.confidence_case(512, 10, CPU).traffic == 8 * 5120


@needs_kernels
def test_a_busy_machine_is_said() -> None:
    rows = run_case(case.without(operators.adaptive_case(1, CPU), "torch.compile"), **SHORT)
    assert rows[0].timing is not None
    steady = replace(
        rows[0].timing, fastest=1.0, lower_quartile=1.0, median=1.0, upper_quartile=1.0
    )
    busy = replace(steady, upper_quartile=2.0)
    assert not steady.unsteady
    assert replace(steady, fastest=0.6).unsteady  # all but the fastest were disturbed alike
    assert "busy" not in tables.tables([replace(rows[0], timing=steady)])
    assert "busy" in tables.tables([replace(rows[0], timing=busy)])


@needs_kernels
def test_bench_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    table, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    argv = ["bench", "--quick", "--batches", "2", "--no-compile", "--threads", "1"]
    argv += ["--results", str(tmp_path)]
    assert main([*argv, "--json", str(table), "--plot", str(plot)]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "guided COUP step, 2 x 3x32x32, 1 thread" in out
    assert "limits: its normals alone" in out
    assert "copy of the same bytes" in out
    data = json.loads(table.read_text())
    assert data["environment"]["threads"] == 1
    rows = data["rows"]
    assert {row["case"] for row in rows} >= {"guided COUP step", "normal", "adaptive_step"}
    for row in rows:
        assert row["timing"]["median"] > 0
        assert row["versions"]["torch"] == torch.__version__
        assert row["instruction_set"] == torch.ops.coup_fast.cpu_capability()
        assert row["threads"] == 1
        assert {"commit", "device", "device_name", "date", "unsteady"} <= set(row)
    fused = next(row for row in rows if row["variant"] == "fused")
    assert set(fused["limits"]) == {case.COPY, case.NOISE}
    assert fused["ratio"] == 1.0
    assert fused["ns_per_element"] == pytest.approx(1e9 * fused["timing"]["median"] / 6144)
    assert {row["part"] for row in rows} == {"whole", "noise", "arithmetic"}
    assert plot.stat().st_size > 10_000
    kept = results.newest(tmp_path)
    assert kept is not None
    assert [row.as_dict() for row in results.load(kept)] == sorted(
        rows, key=lambda row: (row["case"], row["images"])
    )


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    existing = tmp_path / "bench.json"
    existing.write_text("mine")
    assert main(["bench", "--json", str(existing)]) == 2
    assert "--force" in capsys.readouterr().err
    assert existing.read_text() == "mine"
    assert main(["bench", "--plot", str(tmp_path / "bench.gif")]) == 2
    assert ".png or .svg" in capsys.readouterr().err


def test_nothing_to_time_without_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_extension, "available", lambda: False)
    assert main(["bench", "--device", "cpu"]) == 2
    assert "not loaded" in capsys.readouterr().err


def test_bench_names_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--cases", "list"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [tuple(line) for line in listed] == [(f.name, f.group) for f in FAMILIES]
    assert main(["bench", "--cases", "stpe"]) == 2
    error = capsys.readouterr().err
    assert "stpe" in error
    assert "gradient-mnist" in error


def _row(threads: int, median: float, images: int = 8, **stamp: Any) -> Row:
    timing = Timing(median, median, median, median, 3, 1)
    where = {"date": "2026-01-02", "device": "cpu", "device_name": "Some CPU (TM) 3.2GHz"}
    where |= {"instruction_set": "avx2", "threads": threads, "commit": "c"} | stamp
    return Row("step", images, "3x32x32", 8, 8, 1, "fused", "whole", timing, stamp=where)


def test_results_are_merged_case_by_case(tmp_path: Path) -> None:
    path = results.merge(tmp_path, [_row(1, 1.0), _row(1, 2.0, images=64)], "first")
    assert path.name == "2026-01-02-some-cpu-tm-3-2ghz-avx2.json"
    assert results.merge(tmp_path, [_row(2, 3.0)], "second") == path
    assert results.merge(tmp_path, [_row(1, 4.0, commit="d")], "first") == path
    found = [(r.stamp["threads"], r.images, r.timing.median) for r in results.load(path)]
    assert found == [(1, 8, 4.0), (1, 64, 2.0), (2, 8, 3.0)]
    assert [r.stamp["commit"] for r in results.load(path)] == ["d", "c", "c"]
    assert json.loads(path.read_text())["commands"] == ["second", "first"]


def test_the_newest_results_of_a_device_are_found(tmp_path: Path) -> None:
    assert results.newest(tmp_path) is None
    (tmp_path / "mnist.json").write_text("{}")  # results of something else
    old = results.merge(tmp_path, [_row(1, 1.0)], "old")
    new = results.merge(tmp_path, [_row(1, 1.0, date="2026-01-10")], "new")
    on_gpu = {"date": "2026-02-01", "device": "cuda:0", "device_name": "GPU"}
    gpu = results.merge(tmp_path, [_row(1, 1.0, instruction_set=None, **on_gpu)], "gpu")
    assert old != new
    assert results.newest(tmp_path) == new
    assert results.newest(tmp_path, "cuda") == gpu
    broken = tmp_path / "2027-01-01-x.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"x.json .*format 1"):
        results.newest(tmp_path)
