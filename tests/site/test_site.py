"""`make docs` fails on what it promises to fail on, and the reference shows every public name."""

from __future__ import annotations

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.scripts import ROOT, environment, load_script

import coup_fast
from coup_fast.cli import COMMANDS

griffe = pytest.importorskip("griffe", reason="the docs extra is not installed")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load_script(".ci/site_hooks.py")


def test_gaps_in_the_reference_are_found(hooks: ModuleType) -> None:
    pkg = hooks.package()
    shown = {name for name, _ in hooks.public_objects(pkg)}
    assert {f"coup_fast.{n}" for n in ("Purifier", "attacks.PGD", "methods.gdmp")} <= shown
    assert hooks.problems(pkg, shown) == []
    words = hooks.problems(pkg, shown - {"coup_fast.attacks.PGD"})
    assert words == ["no page of the reference shows coup_fast.attacks.PGD"]
    aliases = {member.canonical_path for _, member in hooks.public_objects(pkg)}
    assert hooks.problems(pkg, aliases) == []


def test_names_without_docstring_are_found(hooks: ModuleType, tmp_path: Path) -> None:
    without = shutil.ignore_patterns("*.so", "*.safetensors")
    shutil.copytree(ROOT / "coup_fast", tmp_path / "coup_fast", ignore=without)
    source = tmp_path / "coup_fast" / "models" / "bundled.py"
    docstring = '"""The names that `load_bundled` takes."""\n'
    assert docstring in source.read_text()
    source.write_text(source.read_text().replace(docstring, ""))
    pkg = griffe.load("coup_fast", search_paths=[str(tmp_path)], try_relative_path=False)
    found = hooks.problems(pkg, {name for name, _ in hooks.public_objects(pkg)})
    assert "coup_fast.models.BUNDLED has no docstring" in found


def test_every_public_module_is_asked_for(hooks: ModuleType) -> None:
    """Those of `dir(coup_fast)`, but for tools behind the command line, and each integration."""
    tools = {"app", "benchmarking", "cli", "files", "malloc"}
    modules = {
        f"coup_fast.{name}" for name in set(coup_fast._SUBMODULES) - tools - {"integrations"}
    }
    folder = ROOT / "coup_fast" / "integrations"
    modules |= {
        f"coup_fast.integrations.{module.name}"
        for module in pkgutil.iter_modules([str(folder)])
        if module.name != "diffpure_files"  # a part of diffpure
    }
    assert set(hooks.PUBLIC) == modules | {"coup_fast"}


def test_every_command_shows_its_help() -> None:
    page = (ROOT / "docs" / "api" / "command_line.md").read_text()
    for command in COMMANDS:
        assert f"\n## {command}\n\n<!-- coup-fast {command} --help -->\n" in page, command


def test_a_build_fails_on_planted_faults(tmp_path: Path) -> None:
    """A name is left out, a link and an anchor lead nowhere, a picture is remote, a tag is none."""
    pytest.importorskip("mkdocs")
    for name in ("docs", ".ci", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "coup_fast"):
        os.symlink(ROOT / name, tmp_path / name)
    page = tmp_path / "docs" / "api" / "data.md"
    page.write_text(page.read_text().replace("::: coup_fast.data.load_mnist\n", ""))
    front = tmp_path / "docs" / "index.md"
    front.write_text(
        f"{front.read_text()}\n[a](nowhere.md) [b](methods.md#nothing) and <h, x>\n\n"
        '<img src="https://example.org/picture.png" alt="">\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=tmp_path,
        env=environment(NO_MKDOCS_2_WARNING="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    for words in (
        "no page of the reference shows coup_fast.data.load_mnist",
        "nowhere.md",
        "#nothing",
        "<h,> is no tag",
        "index.html is not for reading offline",
    ):
        assert sum(words in line for line in warnings) == 1, done.stderr
    assert len(warnings) == 5, done.stderr
