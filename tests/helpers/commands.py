"""What the tests of commands share: running one that must be refused, and a batch of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coup_fast.cli import main


def digits(count: int) -> np.ndarray:
    """[count, 1, 28, 28] float32 in [0, 1], always the same."""
    generator = np.random.default_rng(0)
    return generator.random((count, 1, 28, 28), dtype=np.float32)


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """Run a command line that must be refused; returns its one sentence."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith(f"coup-fast {argv[0]}: error: ")
    assert "Traceback" not in captured.err
    return lines[-1]
