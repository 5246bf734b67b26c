"""Numbers of ranks that a launcher would never set: refused before anybody waits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from helpers import eval_models

from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.distributed import world
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.state import EvaluationError


@pytest.mark.parametrize(
    ("rank", "size", "local"),
    [
        ("5", "2", "0"),
        ("2", "2", "0"),
        ("-1", "2", "0"),
        ("one", "2", "0"),
        ("0", "two", "0"),
        ("0", "0", "0"),
        ("3", "1", "0"),
        ("0", "2", "x"),
    ],
)
def test_ranks_that_cannot_meet_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, size: str, local: str
) -> None:
    group = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(EvaluationError, match=f"RANK='{rank}', WORLD_SIZE='{size}'") as error:
        evaluate(
            from_dict(eval_models.tables()),
            tmp_path,
            models=eval_models.load,
            data=eval_models.images(6),
            timeout=600,
        )
    assert time.monotonic() - start < 30
    assert "torchrun" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world(1.0, torch.device("cpu")) as alone:
        assert (alone.rank, alone.size) == (0, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with world(1.0, torch.device("cpu")) as alone:
        assert (alone.rank, alone.size) == (0, 1)
