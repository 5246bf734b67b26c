"""Freed memory between the batches of an evaluation goes back to the system."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import eval_models
import pytest
import torch

from coup_fast.evaluation import heap
from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.evaluate import evaluate

GLIBC = pytest.mark.skipif(
    not sys.platform.startswith("linux") or heap._trim() is None, reason="needs glibc on Linux"
)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@GLIBC
def test_pages_between_blocks_in_use_are_given_back() -> None:
    blocks = [torch.ones(16000) for _ in range(2000)]  # 64 KB each, below what glibc maps singly
    in_use = blocks[::20]
    del blocks
    before = resident()
    heap.give_back_freed_memory()
    assert before - resident() > 64e6
    assert all(bool((block == 1).all()) for block in in_use)


def test_every_batch_of_an_evaluation_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(heap, "_trim", lambda: calls.append)
    attack = [{"preset": "classifier", "steps": 1, "eps": 0.1}]
    tables = from_dict(eval_models.tables(attack=attack))
    report = evaluate(tables, tmp_path, models=eval_models.load, data=eval_models.images(6))
    assert report is not None
    assert len(calls) == len(list((tmp_path / "state").glob("*-*.json"))) > 1
