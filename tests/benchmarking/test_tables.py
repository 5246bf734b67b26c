"""The written tables are those of the stored results, and are found out when they are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.scripts import ROOT, load_script

from coup_fast.benchmarking import results

FOLDER = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script("benchmarks/tables.py")


@pytest.fixture(scope="module")
def newest() -> Path:
    path = results.newest(FOLDER, "cpu")
    assert path is not None
    return path


def test_the_pages_say_what_the_stored_results_say(tables: ModuleType, newest: Path) -> None:
    used = set()
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text, newest) == text, "run python benchmarks/tables.py"
        used |= set(re.findall(r"<!-- bench:(\w+) -->", text))
    assert used == {*tables.SPEED, *tables.STORED}


@pytest.mark.parametrize("name", ["guidance.md", "results.md"])
def test_every_percentage_in_the_findings_is_in_a_table(name: str) -> None:
    """A finding is a sentence before its table; its numbers must not outlive the table's."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    page = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    blocks = r"<!-- (?:bench|eval):\w+ -->.*?<!-- /.*?-->"
    inside = set(re.findall(r"\d+\.\d\b", " ".join(re.findall(blocks, page, re.S))))
    findings = re.sub(blocks, "", page, flags=re.S)
    claimed = {n for n in re.findall(r"\d+\.\d\b", findings) if float(n) >= 1}
    assert len(claimed) > 10
    assert claimed <= inside


def test_results_say_where_they_come_from(newest: Path) -> None:
    data = json.loads(newest.read_text())
    assert data["commands"]
    for row in data["rows"]:
        for name in ("commit", "device_name", "threads", "instruction_set", "date", "versions"):
            assert row[name], (name, row["case"])
        assert newest.name.startswith(row["date"])


def test_other_numbers_are_noticed(
    tables: ModuleType, newest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = json.loads(newest.read_text())
    for row in data["rows"]:
        if row["timing"] and row["variant"] == "eager":
            row["timing"]["median"] *= 2
    other = tmp_path / newest.name
    other.write_text(json.dumps(data))
    for page in ("README.md", "docs/performance.md"):
        copy = tmp_path / Path(page).name
        copy.write_text((ROOT / page).read_text(encoding="utf-8"))
        arguments = ["--results", str(other), "--pages", str(copy)]
        assert tables.main([*arguments, "--check"]) == 1
        assert f"{copy} says something else" in capsys.readouterr().out
        assert tables.main(arguments) == 0
        assert tables.main([*arguments, "--check"]) == 0
        assert copy.read_text() != (ROOT / page).read_text(encoding="utf-8")


def test_broken_markers_are_errors(tables: ModuleType, newest: Path) -> None:
    with pytest.raises(ValueError, match="no <!-- /bench"):
        tables.fill("<!-- bench:step -->\n\ntext", newest)
    with pytest.raises(ValueError, match="no block bench:stpe"):
        tables.fill("<!-- bench:stpe -->\n<!-- /bench:stpe -->", newest)
    with pytest.raises(ValueError, match="no block eval:imagenet"):
        tables.fill("<!-- eval:imagenet -->\n<!-- /eval:imagenet -->", newest)


def test_a_report_becomes_a_table(tables: ModuleType) -> None:
    table = tables.accuracy_tables.evaluation(FOLDER / "mnist.json")
    rows = [line for line in table.splitlines() if line.startswith("| DiffPure")]
    assert len(rows) == 3
    assert rows[0].startswith("| DiffPure | PGD-40 ce, EOT 8, exact gradient, ℓ∞ 0.15 | 98.4 [")
    assert "| WEAK PGD-40" in rows[1]
    assert "64 images" in table


def test_the_short_table_takes_the_worst_of_the_attacks(tables: ModuleType) -> None:
    report = json.loads((FOLDER / "mnist.json").read_text())
    rows = [row for row in report["rows"] if row["defence"]["name"] == "COUP" and row["attacked"]]
    lowest = min(row["attacked"]["average"]["rate"] for row in rows)
    (line,) = re.findall(r"^\| COUP \|.*$", tables.accuracy_tables.adaptive(), re.M)
    assert line.split(" | ")[2].startswith(f"{100 * lowest:.1f} [")
