"""Numbers without an upper bound are refused before anything is allocated or started."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.commands import digits, fails
from helpers.eval_models import tables

from coup_fast.cli import main
from coup_fast.evaluation.config import from_dict


def test_an_image_size_that_fits_into_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", digits(1))
    words = ("purify", tmp_path / "in.npy", tmp_path / "out.npy", "--resize", "--size")
    for size in ("999999x999999", "9" * 30):
        assert "more than the memory" in fails(capsys, *words, size)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("threads", ["100000", "9" * 30, "0"])
@pytest.mark.parametrize("command", ["eval", "bench", "train"])
def test_more_threads_than_can_be_started(
    command: str, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["score", "--data", ".", "--out", "o.safetensors"] if command == "train" else []
    assert main([command, *more, "--threads", threads]) == 2
    assert "--threads: must be a whole number" in capsys.readouterr().err


def test_more_threads_in_a_file_than_can_be_started() -> None:
    with pytest.raises(ValueError, match=r"threads must be an int in \[1, 1024\], got 100000"):
        from_dict(tables(threads=100_000))


@pytest.mark.parametrize("eps", [float("1e400"), 10**400])
def test_a_radius_that_is_no_number(eps: float) -> None:
    with pytest.raises((ValueError, TypeError), match="eps"):
        from_dict(tables(attack=[{"preset": "pgd40", "eps": eps}]))
