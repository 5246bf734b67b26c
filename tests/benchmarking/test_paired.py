"""benchmarks/paired.py: the comparison image by image of two defences of one evaluation."""

from __future__ import annotations

import json
import sys
from math import comb
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.scripts import load_script

LOST, WON = 9, 2  # of 24 images, against the reference, by each radius
PGD = {"name": "PGD-40 ce", "norm": "linf", "step_size": 0.01}


@pytest.fixture(scope="module")
def paired() -> ModuleType:
    return load_script("benchmarks/paired.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two defences on 24 images in batches of 8: clean, and under two radii.

    Without attack both are right everywhere. Under the smaller radius B loses and wins images,
    under the larger it is as A. A last batch of 8 is finished in A's rows alone.
    """
    attacks: list[dict[str, Any] | None] = [None, {**PGD, "eps": 0.1}, {**PGD, "eps": 0.2}]
    rows = [{"defence": {"name": d}, "attack": a} for a in attacks for d in ("A", "B")]
    right = {row: [True] * 24 for row in range(6)}
    right[2] = [i >= WON for i in range(24)]
    right[3] = [i < 24 - LOST for i in range(24)]
    right[4] = right[5] = [i % 2 == 0 for i in range(24)]
    (tmp_path / "report.json").write_text(json.dumps({"identity": {"config": {"rows": rows}}}))
    (tmp_path / "state").mkdir()
    for batch in range(4):
        for row in range(6):
            if batch == 3 and row % 2 == 1:
                continue
            here = right[row][8 * batch : 8 * batch + 8] or [False] * 8
            # draw 0 decides; draw 1 says the contrary
            predictions = [[1, 0] if value else [0, 1] for value in here]
            unit = {"batch": batch, "row": row}
            unit["result"] = {"predictions": predictions, "labels": [1] * 8}
            path = tmp_path / "state" / f"batch-{batch:05d}-row-{row:03d}.json"
            path.write_text(json.dumps(unit))
    return tmp_path


def test_each_attack_is_compared_by_itself(
    paired: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["paired.py", str(folder), "--reference", "A"])
    paired.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " B " in f" {line} "]
    assert len(lines) == 3
    # two-sided sign test over the images that differ: all splits as unlikely as 2 of 11 or more
    p = 2 * sum(comb(LOST + WON, i) for i in range(WON + 1)) / 2 ** (LOST + WON)
    by_radius = {
        line[line.index("linf") + 1] if "linf" in line else "clean": line for line in lines
    }
    assert " ".join(by_radius["0.1"]).endswith(f"{WON} : {LOST}, p = {p:.3f}")
    assert " ".join(by_radius["0.2"]).endswith("0 : 0, p = 1.000")
    assert " ".join(by_radius["clean"]).endswith("0 : 0, p = 1.000")


def test_only_what_every_row_has_finished_counts(paired: ModuleType, folder: Path) -> None:
    found = paired.right(folder)
    assert {len(values) for values in found.values()} == {24}
    assert found["A", "PGD-40 ce, linf 0.2"] == [i % 2 == 0 for i in range(24)]


def test_attacks_that_differ_have_other_names(paired: ModuleType) -> None:
    attack = {**PGD, "eps": 0.1}
    other = {**attack, "step_size": 0.02}
    names = paired.attack_names([attack, None, other, attack])
    assert names[0] == names[3] == "PGD-40 ce, linf 0.1"
    assert names[1] == "clean"
    assert names[2] == "PGD-40 ce, linf 0.1 (2)"
