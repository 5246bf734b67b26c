"""README's speed tables are those of the newest results, and are found out when they are not."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.scripts import ROOT, load_script

from coup_fast.benchmarking import results


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return load_script("benchmarks/readme.py")


def test_readme_says_what_the_newest_results_say(readme: ModuleType) -> None:
    path = results.newest(ROOT / "benchmarks" / "results", "cpu")
    assert path is not None
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.fill(text, path) == text, "run python benchmarks/readme.py"
    assert set(readme.BLOCKS) == set(readme.re.findall(r"<!-- bench:(\w+) -->", text))


def test_results_say_where_they_come_from() -> None:
    path = results.newest(ROOT / "benchmarks" / "results", "cpu")
    assert path is not None
    data = json.loads(path.read_text())
    assert data["commands"]
    for row in data["rows"]:
        for name in ("commit", "device_name", "threads", "instruction_set", "date", "versions"):
            assert row[name], (name, row["case"])
        assert path.name.startswith(row["date"])


def test_other_numbers_are_noticed(
    readme: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results.newest(ROOT / "benchmarks" / "results", "cpu")
    assert path is not None
    data: dict[str, Any] = json.loads(path.read_text())
    for row in data["rows"]:
        if row["timing"] and row["variant"] == "eager":
            row["timing"]["median"] *= 2
    other = tmp_path / path.name
    other.write_text(json.dumps(data))
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    arguments = ["--results", str(other), "--readme", str(copy)]
    assert readme.main([*arguments, "--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    assert copy.read_text() != (ROOT / "README.md").read_text(encoding="utf-8")


def test_broken_markers_are_errors(readme: ModuleType) -> None:
    path = results.newest(ROOT / "benchmarks" / "results", "cpu")
    with pytest.raises(ValueError, match="no <!-- /bench"):
        readme.fill("<!-- bench:step -->\n\ntext", path)
    with pytest.raises(ValueError, match="no block bench:stpe"):
        readme.fill("<!-- bench:stpe -->\n<!-- /bench:stpe -->", path)
    with pytest.raises(ValueError, match="no block eval:imagenet"):
        readme.fill("<!-- eval:imagenet -->\n<!-- /eval:imagenet -->", path)


def test_a_report_becomes_a_table(readme: ModuleType) -> None:
    folder = ROOT / "benchmarks" / "results"
    table = readme.evaluation(folder / "mnist.json")
    rows = [line for line in table.splitlines() if line.startswith("| DiffPure")]
    assert len(rows) == 3
    assert rows[0].startswith("| DiffPure | PGD-40 ce, EOT 8, exact gradient, ℓ∞ 0.15 | 98.4 [")
    assert "| WEAK PGD-40" in rows[1]
    assert "64 images" in table
