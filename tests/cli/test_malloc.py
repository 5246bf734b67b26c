"""Freed memory is kept by commands, and goes back to the system between batches."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import eval_models

from coup_fast import cli, malloc
from coup_fast.evaluation.config import from_dict

GLIBC = pytest.mark.skipif(malloc._glibc() is None, reason="needs glibc")
FAULTS = """
import resource, sys
from coup_fast.malloc import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [b"1" * 10_485_760 for _ in range(5)]  # 2560 pages each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min([faults() for _ in range(5)]))
"""


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(how: str, **environment: str) -> tuple[str, int]:
    """What a fresh process answers, and its page faults for blocks whose memory it had before."""
    known = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, how]
    text = subprocess.check_output(command, env=known | environment, text=True)
    answer, faults = text.split()
    return answer, int(faults)


@GLIBC
def test_freed_memory_is_kept_unless_the_environment_decides() -> None:
    answer, faults = run("keep")
    assert (answer, faults < 100) == ("True", True)
    answer, faults = run("keep", MALLOC_TOP_PAD_="0")
    assert (answer, faults > 10_000) == ("False", True)
    assert run("not")[1] > 10_000


@GLIBC
def test_pages_between_blocks_in_use_are_given_back() -> None:
    blocks = [torch.ones(16000) for _ in range(2000)]  # 64 KB each, below what glibc maps singly
    in_use = blocks[::20]
    del blocks
    before = resident()
    malloc.give_back_freed_memory()
    assert before - resident() > 64e6
    assert all(bool((block == 1).all()) for block in in_use)


def test_an_evaluation_gives_back_after_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("coup_fast.evaluation.evaluate")
    calls: list[None] = []
    monkeypatch.setattr(module, "give_back_freed_memory", lambda: calls.append(None))
    attack = [{"preset": "classifier", "steps": 1, "eps": 0.1}]
    tables = from_dict(eval_models.tables(attack=attack))
    module.evaluate(tables, tmp_path, models=eval_models.load, data=eval_models.images(6))
    assert len(calls) == len(list((tmp_path / "state").glob("batch-*.json"))) > 1


def test_commands_keep_memory_and_the_benchmark_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append(None))
    cli.main(["info"])
    assert len(calls) == 1
    cli.main(["bench", "--cases", "none of these"])
    assert len(calls) == 1
