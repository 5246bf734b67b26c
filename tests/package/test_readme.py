"""README as a user follows it: every code block runs, every table is that of the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import ROOT
from helpers.tiny import SHORT

import coup_fast
from coup_fast import VPSchedule, methods
from coup_fast.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def commands() -> list[list[str]]:
    """The commands of the shell blocks, one list of words each."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [command for command in words if command]


def of(program: str) -> list[list[str]]:
    return [words[1:] for words in commands() if words[0] == program]


def extras(name: str) -> set[str]:
    """The packages of an extra, those of the extras that it names among them."""
    found = set()
    for line in PROJECT["project"]["optional-dependencies"][name]:
        nested = re.match(r"coup-fast\[(.*)\]", line)
        if nested:
            found |= {package for one in nested[1].split(",") for package in extras(one)}
        else:
            match = re.match(r"[\w-]+", line)
            assert match is not None
            found.add(match[0])
    return found


def test_it_is_short_and_every_block_is_of_a_kind_that_is_tested() -> None:
    assert len(PAGE.splitlines()) <= 140
    fences = re.findall(r"^```(\w*)\n", PAGE, re.M)
    assert set(fences[::2]) == {"python", "sh", "bibtex"}
    assert set(fences[1::2]) == {""}
    assert {words[0] for words in commands()} == {"git", "cd", "make", "pip", "coup-fast"}


def test_the_python_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
    images, clean, adversarial = (names[key] for key in ("images", "clean", "adversarial"))
    assert clean.shape == images.shape
    assert (clean - images).abs().max() > 0.01
    assert names["logits"].shape == (8, 10)
    assert 0 < (adversarial - images).abs().max() <= 0.15 + 1e-6
    printed = capsys.readouterr().out
    assert "accuracy: tensor(1.)" in printed
    assert "the exact gradient is plain autograd's" in printed


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    image.new("RGB", (40, 50), (200, 30, 90)).save("photo.png")
    shorter = {
        "purify": ["--set", "num_steps=1"],
        "eval": ["--images", "2", "--draws", "2", "--steps", "2", "--eot", "1"],
    }
    for words in of("coup-fast"):
        assert main([*words, *shorter.pop(words[0])]) == 0
    assert not shorter
    with image.open("clean.png") as clean:
        assert clean.size == (40, 50)
    assert "coup" in Path("results/report.md").read_text()


def test_make_has_the_targets() -> None:
    for words in of("make"):
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, check=True)
    for target in re.findall(r"`make (\w+)`", PAGE):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_the_installation_is_enough_for_the_examples() -> None:
    torch_line, build_line, package_line = of("pip")
    assert torch_line[:3] == ["install", "torch", "--index-url"]
    needed = {re.match(r"[\w-]+", line)[0]: line for line in PROJECT["build-system"]["requires"]}  # type: ignore[index]
    asked = {re.match(r"[\w-]+", word)[0]: word for word in build_line[1:]}  # type: ignore[index]
    assert set(needed) == set(asked)
    assert asked["setuptools"] == needed["setuptools"]
    assert package_line[:2] == ["install", "--no-build-isolation"]
    extra = re.fullmatch(r"\.\[(\w+)\]", package_line[2])
    assert extra is not None
    used = {"safetensors", "pillow", "tabulate", "matplotlib", "mlxtend", "tqdm"}
    assert used <= extras(extra[1])


def test_a_uv_project_is_told_the_name_of_this_one() -> None:
    line = re.search(r"`(no-build-isolation-package = .*?)`", PAGE)
    assert line is not None
    assert tomllib.loads(line[1]) == {"no-build-isolation-package": [PROJECT["project"]["name"]]}


def test_the_table_of_methods() -> None:
    table = PAGE.partition("\n## Methods\n")[2].partition("\n## ")[0]
    found: dict[str, int] = {}
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        names = re.findall(r"`([\w-]+)`", cells[0])
        if line.startswith("| `"):
            found |= dict(zip(names, map(int, cells[2].split(", ")), strict=True))
    expected = {
        name: methods.plan(name, VPSchedule(), SHORT[name][0]).num_network_calls
        for name in methods.METHODS
    }
    assert found == expected


def test_links_lead_to_files_and_names_exist() -> None:
    for target in re.findall(r"(?:\]\(|src(?:set)?=\")([^)\"#]+)", PAGE):
        assert target.startswith("http") or (ROOT / target).is_file(), target
    for name in re.findall(r"`coup_fast\.([\w.]+)`", PAGE):
        value: Any = coup_fast
        for part in name.split("."):
            value = getattr(value, part)


def test_the_citation_names_two_papers_and_this_software() -> None:
    (text,) = blocks("bibtex")
    entries = re.findall(r"^@(\w+)\{(\w+),(.*?)\}\}?$(?=\n@|\n\Z)", text, re.M | re.S)
    assert [kind for kind, _, _ in entries] == ["inproceedings", "inproceedings", "software"]
    assert text.count("{") == text.count("}")
    for _, _, fields in entries:
        assert {"author", "title", "year"} <= set(re.findall(r"(\w+) = \{", fields))
