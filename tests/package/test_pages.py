"""The pages of docs/: links, headings, code blocks and commands.

docs/methods.md and docs/integrations.md have tests beside their subjects; tests/site runs the
tutorials and the front page, tests/examples the scripts. The blocks of docs/models.md need files
that are not at hand.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.scripts import ROOT

import coup_fast
from coup_fast.cli import build_parser
from coup_fast.evaluation import from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN_HERE = ("attacks.md", "evaluation.md", "gradients.md", "guidance.md")
RUN_ELSEWHERE = {
    "integrations.md",
    "methods.md",
    "models.md",
    "examples.md",
    "index.md",
    "your_data.md",
    "your_network.md",
}
TUTORIALS = {path.name for path in (DOCS / "tutorials").glob("*.md")} - {"index.md"}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_has_one_title_and_its_links_lead_somewhere(path: Path) -> None:
    text = without_code(path.read_text(encoding="utf-8"))
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.M)) == 1
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), target
        assert file.is_relative_to(DOCS), f"{target} is no page of the site: name it in code"
        assert not anchor or file.suffix == ".png" or anchor in anchors(file), target


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|benchmarks|coup_fast|csrc|docs|\.ci)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def commands() -> Iterator[tuple[str, list[str]]]:
    for path in PAGES:
        for block in blocks(path.read_text(encoding="utf-8"), "sh"):
            for line in block.splitlines():
                yield path.name, shlex.split(line, comments=True)


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else x
)
def test_commands_are_understood(page: str, words: list[str]) -> None:
    if "coup-fast" in words or "coup_fast" in words:
        program = "coup-fast" if "coup-fast" in words else "coup_fast"
        args = build_parser().parse_args(words[words.index(program) + 1 :])
        config = getattr(args, "config", None)
        assert config is None or (ROOT / config).is_file()
    elif words[:1] == ["python"] and words[1] != "-c":
        assert (ROOT / words[1]).is_file()
    elif words and "-c" not in words:
        assert (ROOT / words[0]).is_file(), f"{page}: {words}"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take as given, small and short."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(
        '[data]\nimages = 2\n[[defence]]\nmethod = "coup"\noptions = { num_steps = 1 }\n'
        '[[attack]]\npreset = "pgd40"\nsteps = 1\neot = 1\n'
    )
    classifier = tiny.TinyClassifier().eval().requires_grad_(False)
    images = tiny.images(2)
    defended = tiny.defended("coup-short").eval()
    return {
        "coup_fast": coup_fast,
        "Purifier": coup_fast.Purifier,
        "F": torch.nn.functional,
        "score_model": tiny.score_model(),
        "classifier": classifier,
        "purifier": tiny.short_purifier(),
        "defended": defended,
        "purified_classifier": defended,
        "their_defence": classifier,
        "images": images,
        "labels": classifier(images).argmax(1),
        "ids": [5, 6],
        "epoch": 0,
        "path": config,
        "my_models": (tiny.score_model(), classifier),
    }


def python_blocks() -> Iterator[tuple[str, str]]:
    for page in RUN_HERE:
        for block in blocks((DOCS / page).read_text(encoding="utf-8"), "python"):
            yield page, block


def test_every_page_with_python_is_run_somewhere() -> None:
    found = {path.name for path in PAGES if blocks(path.read_text(encoding="utf-8"), "python")}
    assert found == {*RUN_HERE} | RUN_ELSEWHERE | TUTORIALS


@pytest.mark.parametrize(("page", "block"), python_blocks(), ids=lambda x: x[:40])
def test_the_examples_run(page: str, block: str, names: dict[str, Any]) -> None:
    if "classifier.train()" in block:
        names["classifier"].requires_grad_(True)
    exec(block, names)
    if "adversarial" in names:
        assert 0 < (names["adversarial"] - names["images"]).abs().max() <= 8 / 255 + 1e-6
    if "loss" in names:
        assert all(p.grad is not None for p in names["classifier"].parameters())
    if "report" in names:
        assert "COUP" in names["report"].table() or "coup" in names["report"].table()


def test_the_page_on_networks_runs_from_top_to_bottom(names: dict[str, Any]) -> None:
    text = (DOCS / "your_network.md").read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        names.pop("clean", None)
        exec(block, names)
        clean = names.get("clean")
        assert clean is None or (clean.shape == names["images"].shape and clean.isfinite().all())
    for line in re.findall(r"`call=(lambda [^`]*)`", text):
        assert callable(eval(line, {}))
    assert len(blocks(text, "python")) >= 5


def test_the_configuration_is_understood() -> None:
    (text,) = blocks((DOCS / "evaluation.md").read_text(encoding="utf-8"), "toml")
    config = from_dict(tomllib.loads(text))
    assert len([row for row in config.rows if row.attack is not None]) >= 4
