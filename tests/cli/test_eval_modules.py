"""`coup-fast eval` runs code of the working folder only if a configuration names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.scripts import ROOT

PLANTED = "from pathlib import Path\nPath('ran').touch()\nraise ImportError('planted')\n"
COMMAND = "import sys; sys.path.pop(0); from coup_fast.cli import main; sys.exit(main())"


def evaluate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As the installed command, whose own folder is first on the path, does it in `folder`."""
    words = ["eval", "--out", "out", "--images", "1", "--draws", "1", "--methods", "coup"]
    words += ["--set", "num_steps=1", "--attacks", "pgd40", "--steps", "1", "--eot", "1"]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words, *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", ["mlxtend", "tabulate"])
def test_no_code_of_the_working_folder_runs_for_bundled_models(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(PLANTED)
    done = evaluate(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_models_of_the_working_folder_are_found_after_all_others(tmp_path: Path) -> None:
    (tmp_path / "tabulate.py").write_text(PLANTED)
    (tmp_path / "my_models.py").write_text("from helpers.eval_models import load\n")
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.random((1, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([0]))
    done = evaluate(tmp_path, "--models", "my_models:load", "--data", "images.npz", "--eps", "0.1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
