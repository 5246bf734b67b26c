"""What is said of the CUDA kernels; a torch and libraries that pretend stand in for a GPU's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import environment

import coup_fast
from coup_fast._extension import _architectures
from coup_fast.cli import info

PACKAGE = Path(coup_fast.__file__).parent
BUILT = "built with CUDA 13.0.88 for sm_80, sm_90, PTX of compute_90 for newer GPUs"


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A copy of the package whose `_C` says that it was built with CUDA 13.0."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    copy = shutil.copytree(PACKAGE, tmp_path / "coup_fast", ignore=ignored)
    data = (copy / "_C.abi3.so").read_bytes()
    start = data.index(b'"flags": ')
    end = data.index(b"\n}", start)
    config = b'"cuda": "on", "cuda_toolkit": "13.0.88", "cuda_archs": "80-real 90"'
    assert len(config) <= end - start
    changed = data[:start] + config.ljust(end - start) + data[end:]
    (copy / "_C.abi3.so").write_bytes(changed)
    shutil.copy(copy / "_C.abi3.so", copy / "_C_cuda.abi3.so")
    return copy


def lack(library: Path) -> None:
    library.unlink()


def spoil(library: Path) -> None:
    library.write_bytes(b"not a library\n" * 100)


def need_a_library_that_is_not_there(library: Path) -> None:
    data = library.read_bytes()
    assert b"\0libm.so.6\0" in data
    library.write_bytes(data.replace(b"\0libm.so.6\0", b"\0libm.so.9\0"))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lack, "_C_cuda.abi3.so is not in"),
        (spoil, "invalid ELF header"),
        (need_a_library_that_is_not_there, "libm.so.9: cannot open shared object file"),
    ],
)
def test_info_says_why_the_cuda_library_cannot_load(
    damage: Callable[[Path], None], cause: str, pretended: Path
) -> None:
    damage(pretended / "_C_cuda.abi3.so")
    code = (
        "import json, warnings, torch\n"
        "torch.version.cuda = '13.0'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import coup_fast\n"
        "from coup_fast.cli import info\n"
        "warned = [str(w.message) for w in caught]\n"
        "print(json.dumps([warned, info.collect(), info.lines(info.collect())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pretended.parent,
        env=environment(pretended.parent),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (warned,), collected, lines = json.loads(done.stdout)
    assert cause in warned
    assert collected["extension"]["loaded"] is True
    assert cause in collected["cuda"]["error"]
    assert lines["CUDA kernels"] == f"not loaded ({collected['cuda']['error']}); {BUILT}"


def said(**facts: Any) -> tuple[str, str]:
    """What `coup-fast info` says of kernels and devices, given these facts; H200 otherwise."""
    collected = info.collect()
    cuda = {
        "compiled": True,
        "loaded": True,
        "error": None,
        "toolkit": "13.0.88",
        "archs": ["sm_80", "sm_90"],
        "ptx": ["compute_90"],
        "torch_cuda": "13.0",
    }
    collected |= {"gpus": ["NVIDIA H200"], "gpu_archs": ["sm_90"], "driver_cuda": "13.0"}
    collected["cuda"] = cuda | {k: v for k, v in facts.items() if k in cuda}
    collected |= {k: v for k, v in facts.items() if k not in cuda}
    lines = info.lines(collected)
    return lines["CUDA kernels"], lines["CUDA devices"]


def test_info_names_toolkit_architectures_and_ptx() -> None:
    kernels, devices = said()
    assert kernels == f"loaded, {BUILT}"
    assert devices == "NVIDIA H200 (sm_90); torch for CUDA 13.0; driver for CUDA 13.0"
    assert said(ptx=[])[0].endswith("for sm_80, sm_90, no PTX for newer GPUs")


def test_info_says_why_there_are_no_kernels() -> None:
    assert "+cu" in said(compiled=False, loaded=False)[0]
    kernels, devices = said(loaded=False, torch_cuda=None)
    assert kernels == f"not loaded (this torch is built for CPU only); {BUILT}"
    assert devices == "none: this torch is built for CPU only"
    missing = said(extension={"loaded": False, "error": "it is not there"})[0]
    assert missing == "not loaded, because the CPU kernels are not"


def test_info_says_what_the_kernels_cannot_serve() -> None:
    old_gpu = said(gpus=["Tesla T4", "NVIDIA H200"], gpu_archs=["sm_75", "sm_90"])[1]
    assert "Tesla T4 (sm_75), NVIDIA H200 (sm_90)" in old_gpu
    assert old_gpu.endswith("the kernels do not run on sm_75")
    assert said(driver_cuda="12.8")[1].endswith("this driver is too old for the kernels")
    assert said(gpus=[], gpu_archs=[], driver_cuda=None)[1].endswith("; no driver")


@pytest.mark.parametrize(
    ("gpu", "archs", "ptx", "expected"),
    [
        ("sm_80", ["sm_80"], [], True),
        ("sm_86", ["sm_80"], [], True),
        ("sm_80", ["sm_86"], [], False),
        ("sm_90", ["sm_80"], [], False),
        ("sm_90", ["sm_80"], ["compute_80"], True),
        ("sm_80", [], ["compute_90"], False),
        ("sm_103", ["sm_100"], [], True),
        ("sm_120", ["sm_100"], [], False),
        ("sm_120", ["sm_100"], ["compute_100"], True),
        ("sm_90", ["sm_90a"], [], True),
        ("sm_100", ["sm_90a"], ["compute_90a"], False),
        ("sm_103", ["sm_100f"], [], True),
        ("sm_120", [], ["compute_100f"], False),
        ("sm_75", [], [], False),
        ("sm_75", ["sm_native"], [], True),
    ],
)
def test_which_gpus_the_kernels_run_on(
    gpu: str, archs: list[str], ptx: list[str], expected: bool
) -> None:
    assert info.serves(gpu, archs, ptx) is expected


def test_cmakes_names_of_architectures() -> None:
    assert _architectures("80-real 90-real 100-real 100-virtual") == (
        ["sm_80", "sm_90", "sm_100"],
        ["compute_100"],
    )
    assert _architectures("90a 75-virtual") == (["sm_90a"], ["compute_90a", "compute_75"])
    assert _architectures("") == ([], [])
