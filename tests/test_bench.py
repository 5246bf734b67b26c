"""The benchmark itself: cases are checked before they are timed, rows say what happened."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coup_fast import _extension
from coup_fast.benchmarking import cases, report, rivals
from coup_fast.benchmarking.timing import measure_in_turns
from coup_fast.cli import main

CPU = torch.device("cpu")
SHORT = {"repeats": 3, "sample_seconds": 1e-5, "budget_seconds": 1e-3}

needs_kernels = pytest.mark.skipif(
    not _extension.available(), reason="the compiled operators are not there"
)


def test_medians_are_of_the_functions_measured_in_turns() -> None:
    order: list[str] = []

    def wait(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

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
        {"slow": lambda: time.sleep(2e-2), "fast": lambda: None}, CPU, 8, 1e-5, 5e-2
    )
    assert timings["slow"].samples == 3
    assert timings["fast"].samples == 8


@needs_kernels
@pytest.mark.parametrize("make", [cases.step_case, cases.normal_case, cases.adaptive_case])
@pytest.mark.parametrize("batch", [1, 5])
def test_operators_and_rivals_compute_the_same(make: Any, batch: int) -> None:
    make(batch, CPU).check()


@needs_kernels
@pytest.mark.parametrize(("batch", "classes"), [(512, 10), (3, 7)])
def test_confidence_and_its_rivals_compute_the_same(batch: int, classes: int) -> None:
    cases.confidence_case(batch, classes, CPU).check()


@needs_kernels
def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rivals.guided_step_arithmetic
    monkeypatch.setattr(rivals, "guided_step_arithmetic", lambda *args: 1.001 * right(*args))
    with pytest.raises(AssertionError, match="eager step is off"):
        report.run_case(cases.step_case(1, CPU), **SHORT)


def test_noise_that_is_not_normal_is_noticed() -> None:
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    cases._require_standard_normal("z", z)
    for wrong in (z + 0.05, 1.05 * z, torch.rand(100_000) * 12**0.5 - 3**0.5):
        with pytest.raises(AssertionError, match="not standard normal"):
            cases._require_standard_normal("z", wrong)


@needs_kernels
def test_a_compiler_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(rivals, "compiled", lambda function: broken)
    rows = report.run_case(cases.adaptive_case(1, CPU), **SHORT)
    row = next(row for row in rows if row.variant == "torch.compile")
    assert row.timing is None
    assert row.unavailable == "torch.compile failed: RuntimeError: no C++ compiler"
    text = report.tables(rows)
    assert "no C++ compiler" in text
    assert "long trace" not in text


def test_traffic_counts_every_byte_once() -> None:
    elements = 8 * 3 * 32 * 32
    assert cases.step_case(8, CPU).traffic == 16 * elements  # x, eps, G, result
    assert cases.normal_case(8, CPU).traffic == 4 * elements
    assert cases.adaptive_case(8, CPU).traffic == 16 * elements  # x, h, h', result
    assert cases.confidence_case(512, 10, CPU).traffic == 8 * 5120


@needs_kernels
def test_a_busy_machine_is_said() -> None:
    case = cases.without(cases.adaptive_case(1, CPU), "torch.compile")
    rows = report.run_case(case, **SHORT)
    assert rows[0].timing is not None
    steady = replace(rows[0].timing, lower_quartile=1.0, median=1.0, upper_quartile=1.0)
    busy = replace(steady, upper_quartile=2.0)
    assert "busy" not in report.tables([replace(rows[0], timing=steady)])
    assert "busy" in report.tables([replace(rows[0], timing=busy)])


@needs_kernels
def test_bench_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    table, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    argv = ["bench", "--quick", "--batches", "2", "--no-compile", "--threads", "1"]
    assert main([*argv, "--json", str(table), "--plot", str(plot)]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "guided COUP step, 2 x 3x32x32" in out
    assert "a copy moves as many bytes" in out
    data = json.loads(table.read_text())
    assert data["environment"]["threads"] == 1
    rows = data["rows"]
    assert {row["case"] for row in rows} >= {"guided COUP step", "normal", "adaptive_step"}
    for row in rows:
        assert row["timing"]["median"] > 0
        assert row["versions"]["torch"] == torch.__version__
        assert "commit" in row
    fused = next(row for row in rows if row["variant"] == "fused")
    assert fused["ratio"] == 1.0
    assert fused["ns_per_element"] == pytest.approx(1e9 * fused["timing"]["median"] / 6144)
    assert {row["part"] for row in rows} == {"whole", "noise", "arithmetic"}
    assert plot.stat().st_size > 10_000


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
