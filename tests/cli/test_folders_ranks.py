"""A folder that several processes purify: every picture once, with the bits of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import fails
from helpers.scripts import environment
from PIL import Image

from coup_fast.cli import main
from coup_fast.cli.folders import RECORD

QUICK = ("--set", "num_steps=1", "--set", "t_star=0.001", "--batch-size", "2")
# A process that rank 1 is, until it has written two results.
DYING = """
import os, signal, sys
from coup_fast.cli import main
from coup_fast.cli.image_files import ImageFile
write, done = ImageFile.write, 0
def writing(image, purified):
    global done
    done += 1
    if os.environ["RANK"] == "1" and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(image, purified)
ImageFile.write = writing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "in" / ("deep" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def launch(*words: object, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["-m", "coup_fast"] if script is None else [str(script)]
    return subprocess.run(
        [*torchrun, "--nproc-per-node=2", *program, *map(str, words)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=400,
    )


def results(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def recorded(folder: Path) -> list[str]:
    lines = (folder / RECORD).read_text().splitlines()
    return sorted(json.loads(line)["picture"] for line in lines[1:])


def test_two_processes_share_a_folder_and_a_killed_launch_resumes(
    source: Path, tmp_path: Path
) -> None:
    alone, shared, killed = tmp_path / "alone", tmp_path / "shared", tmp_path / "killed"
    assert main([str(w) for w in ("purify", source, alone, *QUICK, "--recursive")]) == 0
    done = launch("purify", source, shared, *QUICK, "--recursive", "--json", tmp_path / "j")
    assert done.returncode == 0, done.stderr
    assert results(shared) == results(alone)
    assert len(results(alone)) == 7
    assert recorded(shared) == recorded(alone)  # each of them once
    assert done.stderr.count("purified 7 images") == 1
    assert json.loads((tmp_path / "j").read_text())["images"] == 7
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    died = launch("purify", source, killed, *QUICK, "--recursive", script=script)
    assert died.returncode != 0
    # Hidden are the lock of the killed process and files that it had not finished.
    found = results(killed)
    there = {name: found[name] for name in found if not Path(name).name.startswith(".")}
    assert 0 < len(there) < 7
    resumed = launch("purify", source, killed, *QUICK, "--recursive", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{len(there)} of 7 results are there" in resumed.stderr
    assert results(killed).keys() == results(alone).keys()
    assert {name: results(killed)[name] for name in there} == there
    again = launch("purify", source, shared, *QUICK, "--recursive")
    assert again.returncode != 0
    assert again.stderr.count("error: ") == 1  # only process 0 says that the results exist
    assert "give --force to overwrite" in again.stderr


def test_one_file_is_not_shared(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    sentence = fails(capsys, "purify", source / "0.png", tmp_path / "o.png", *QUICK)
    assert "several processes share a folder" in sentence
