"""The scripts and the notebook of examples/, run as a user runs them, with small numbers."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import pages
from helpers.scripts import ROOT, environment
from PIL import Image

EXAMPLES = ROOT / "examples"
# What a script is given, and a word of each line that it has to print.
SCRIPTS = {
    "own_network": ((), ["coup 20 steps", "purified [4, 3, 32, 32]"]),
    "autoattack": (
        ("--images", "4", "--iterations", "3", "--draws", "2"),
        ["clean: ", "under AutoAttack: "],
    ),
    "evaluate_table": (
        ("--images", "2", "--steps", "2"),
        ["| COUP ", "| DiffPure ", "each image under the worst of these 2"],
    ),
    "photographs": (("in", "out"), ["photo.jpg: 64 x 48, RGB", "grey.png: 30 x 20, L", "left out"]),
    "new_method": ((), ["rounds: 3 rows", "right: ", "the exact gradient is plain autograd's"]),
}


def run(*words: str) -> str:
    """The standard output of a command that has to succeed."""
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, but for two pictures and a file that is none."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB").save("in/photo.jpg")
    Image.new("L", (30, 20), 128).save("in/grey.png")
    Path("in/notes.txt").write_text("no picture")
    return tmp_path


def test_every_script_has_its_run_and_is_short() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*SCRIPTS, "distributed"}
    for name in names:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(name: str, folder: Path) -> None:
    if name == "autoattack":
        pytest.importorskip("pyautoattack")
    words, lines = SCRIPTS[name]
    printed = run(str(EXAMPLES / f"{name}.py"), *words)
    for line in lines:
        assert line in printed, printed
    if name == "photographs":
        for picture in ("photo.jpg", "grey.png"):
            with Image.open(f"in/{picture}") as before, Image.open(f"out/{picture}") as after:
                assert (before.size, before.mode) == (after.size, after.mode)
                assert before.tobytes() != after.tobytes()
    if name == "evaluate_table":
        assert {path.name for path in Path("results").glob("report.*")} == {
            "report.json",
            "report.md",
            "report.csv",
        }


def test_the_report_of_two_processes_is_that_of_one(folder: Path) -> None:
    script = str(EXAMPLES / "distributed.py")
    size = ("--images", "8")  # two batches
    one = run(script, *size, "--out", "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = run(*launch, script, *size, "--out", "two")

    def table(printed: str) -> str:
        return printed[printed.index("defence ") :]

    assert "diffpure-short" in table(one)
    assert table(two) == table(one)


def test_the_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    stored = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    fresh = nbformat.from_dict(stored)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    pictures = 0
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        if before.cell_type != "code":
            continue
        for kept, made in zip(before.outputs, after.outputs, strict=True):
            assert kept.output_type == made.output_type
            if kept.output_type == "stream":
                rows = r"^(autograd|exact|stopped guidance|bpda) .*$"  # errors and seconds
                pages.check_output(re.sub(rows, r"\1 ...", kept.text, flags=re.M), made.text)
            else:
                for one in (kept, made):
                    assert base64.b64decode(one.data["image/png"])[1:4] == b"PNG"
                pictures += 1
    assert pictures >= 1


def test_the_notebook_is_small_and_says_nothing_of_a_machine() -> None:
    text = (EXAMPLES / "tour.ipynb").read_text()
    assert len(text) < 100_000
    assert not re.search(r"/(home|root|tmp)/", text)
