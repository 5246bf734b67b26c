"""An evaluation on several processes: the same report from 1, 2 and 3, and the death of a rank."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import eval_models
from helpers.scripts import environment

from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.distributed import World, local_device
from coup_fast.evaluation.evaluate import evaluate, rounds
from coup_fast.evaluation.report import Report

HERE = Path(__file__).resolve().parent
TABLES = eval_models.tables(7, batch_size=2, attack=eval_models.tables()["attack"][:1])
UNITS = 4 * 6  # four batches of six rows

# What every process runs. The last line is for rank 0 only, which alone has the report.
SCRIPT = """
import sys
from helpers import eval_models
from pathlib import Path
from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.provenance import to_json
from coup_fast.evaluation.state import EvaluationError
import test_distributed as test
try:
    report = evaluate(
        from_dict(test.TABLES), sys.argv[1], models=eval_models.load, data=eval_models.images(7),
        timeout=float(sys.argv[2]), say=lambda line: print(line, flush=True),
    )
except EvaluationError as error:
    sys.exit(f"ERROR {error}")
if report is not None:
    Path(sys.argv[1], "report").write_text(to_json(report.as_dict()) + report.csv())
"""


def start_ranks(
    folder: Path, ranks: int, timeout: float = 300, **more: str
) -> list[subprocess.Popen[str]]:
    """The ranks of a launch without torchrun, which would end the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "out"), str(timeout)],
            env=environment(HERE, OMP_NUM_THREADS="1", RANK=str(rank), **group, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    found = []
    for process in processes:
        out, error = process.communicate(timeout=500)
        found.append((process.returncode, out, error))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of one process."""
    from coup_fast.evaluation.provenance import to_json

    out = tmp_path_factory.mktemp("alone")
    report = evaluate(from_dict(TABLES), out, models=eval_models.load, data=eval_models.images(7))
    assert isinstance(report, Report)
    return to_json(report.as_dict()) + report.csv()


@pytest.mark.parametrize("ranks", [2, 3])
def test_more_processes_give_the_same_bytes(tmp_path: Path, alone: str, ranks: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", "script.py", "out", "300"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(HERE, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report").read_text() == alone
    assert len(list((tmp_path / "out" / "state").glob("batch-*.json"))) == UNITS


def test_a_rank_that_dies_is_named_and_another_number_of_ranks_goes_on(
    tmp_path: Path, alone: str
) -> None:
    (first, second) = finish(start_ranks(tmp_path, 2, COUP_FAST_TEST_FAULT="kill:1:60"))
    assert second[0] == -9
    assert first[0] == 1
    assert "ERROR rank 1 of 2 died" in first[2]
    assert "run the same command again" in first[2]
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out" / "state").glob("batch-*.json")}
    assert 0 < len(kept) < UNITS
    lines: list[str] = []
    report = evaluate(
        from_dict(TABLES),
        tmp_path / "out",
        models=eval_models.load,
        data=eval_models.images(7),
        say=lines.append,
    )
    assert lines[0].startswith(f"{len(kept)} of {UNITS} batches were finished")
    assert len(lines) - 1 == UNITS - len(kept)
    assert report is not None
    assert report.csv() == alone[-len(report.csv()) :]
    after = {p.name: p.read_bytes() for p in (tmp_path / "out" / "state").glob("batch-*.json")}
    assert {name: after[name] for name in kept} == kept


def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    processes = start_ranks(tmp_path, 2, timeout=15, COUP_FAST_TEST_FAULT="hang:1:20")
    try:
        _, error = processes[0].communicate(timeout=300)
        assert re.search("ERROR rank 1 of 2 .* 15 s", error)
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_an_error_on_one_rank_ends_all_and_names_it(tmp_path: Path) -> None:
    found = finish(start_ranks(tmp_path, 2, COUP_FAST_TEST_FAULT="nan:1:60"))
    for code, _, error in found:
        assert code == 1
        assert "ERROR rank 1: the score model (Faulty)" in error


@pytest.mark.parametrize(("batches", "ranks"), [(4, 1), (4, 2), (4, 3), (2, 3), (1, 1)])
def test_rounds_hold_every_unfinished_unit_once(batches: int, ranks: int) -> None:
    everything = {(batch, row) for batch in range(batches) for row in range(5)}
    done = {unit for unit in everything if sum(unit) % 3 == 0}
    found = [unit for todo in rounds(batches, 5, ranks, done) for unit in todo.values()]
    assert len(found) == len(set(found))
    assert set(found) == everything - done
    for todo in rounds(batches, 5, ranks, done):
        assert len({row for _, row in todo.values()}) == 1  # units of equal cost
        assert max(todo) < ranks


def test_one_process_is_a_world_of_its_own() -> None:
    world = World()
    assert world.gather("a") == ["a"]
    assert world.broadcast("b") == "b"
    assert local_device(torch.device("cpu")) == torch.device("cpu")
