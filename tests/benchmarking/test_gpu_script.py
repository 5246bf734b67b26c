"""benchmarks/gpu.sh and its report, with a Python that only writes down what it is asked to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.scripts import ROOT

# Says that there is a device, runs the script's own few lines, and passes everything else but the
# tests of loops.
PYTHON = f"""#!/bin/sh
echo "$PYTHONPATH $*" >>"$0.log"
case "$*" in
  *get_device_name*) echo "Some GPU" ;;
  -\\ *) exec {sys.executable} "$@" ;;
  *test_graphs*) exit 1 ;;
  *FAMILIES*) echo large small ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def run(python: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """gpu.sh with its results beside the Python."""
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "--python", str(python), *options]
    command += ["--out", str(python.parent / "out"), "--commit", "abc"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def steps(python: Path) -> list[tuple[str, int]]:
    lines = (python.parent / "out/steps.jsonl").read_text().splitlines()
    return [(step["name"], step["status"]) for step in map(json.loads, lines)]


def test_a_step_that_fails_takes_no_other_with_it(python: Path) -> None:
    done = run(python, "--stage", "test", "--stage", "kernels", "--stage", "loop")
    assert done.returncode == 1
    assert "FAILED: test_graphs.py\n" in done.stderr
    expected = {"test_cuda_ops.py": 0, "test_graphs.py": 1, "kernels": 0}
    assert dict(steps(python)) == expected | {"loops large": 0, "loops small": 0}


def test_a_later_call_takes_up_what_has_not_passed(python: Path) -> None:
    run(python, "--stage", "test")
    done = run(python, "--stage", "test", "--resume")
    assert "test_cuda_ops.py: passed before" in done.stdout
    assert [name for name, _ in steps(python)] == ["test_cuda_ops.py", *["test_graphs.py"] * 2]


def test_nothing_is_begun_when_the_time_is_over(python: Path) -> None:
    done = run(python, "--stage", "test", "--minutes", "0")
    assert done.returncode == 0
    assert "left out: test_cuda_ops.py test_graphs.py" in done.stdout
    assert not (python.parent / "out/steps.jsonl").exists()


def test_commands_find_a_package_that_is_not_installed(python: Path) -> None:
    run(python, "--stage", "kernels", "--minutes", "1")
    asked = Path(f"{python}.log").read_text().splitlines()
    (kernels,) = (line for line in asked if "gpu_kernels.py" in line and " - " not in line)
    assert kernels.split()[0].split(":")[0] == str(ROOT)


def test_parts_of_a_result_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    assert gpu_report.part(tmp_path, "loops") is None
    for case in ("large", "small"):
        data = {"environment": {"device": "cuda"}, "rows": [{"case": case}]}
        (tmp_path / f"loops-{case}.json").write_text(json.dumps(data))
    whole = gpu_report.part(tmp_path, "loops")
    assert [row["case"] for row in whole["rows"]] == ["large", "small"]
    cut = {"stage": "loop", "name": "loops large", "status": 124, "seconds": 9}
    assert "cut off" in gpu_report._step_line(cut)
