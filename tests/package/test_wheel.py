"""What a wheel may need from outside, and what its metadata say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import torch
from helpers.scripts import ROOT, load_script

import coup_fast

LIBRARY = Path(coup_fast.__file__).parent / "_C.abi3.so"
check_wheel = load_script(".ci/check_wheel.py")

needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="needs nm and readelf of binutils"
)


@needs_binutils
def test_the_library_needs_only_the_stable_abi_and_system_libraries() -> None:
    assert not check_wheel.problems(LIBRARY)
    assert b"\0torch_delete_string\0" in LIBRARY.read_bytes()  # it does use torch


@needs_binutils
@pytest.mark.parametrize(
    ("here", "instead"),
    [
        (b"aoti_torch_library_init_def", b"aoti_torch_library_init_new"),  # newer than torch 2.11
        (b"torch_delete_string", b"PyUnicode_FromString"[:19]),  # of Python, not even limited
        (b"torch_call_dispatcher", b"_ZN3c1010DispatcherEv"),  # torch's C++
        (b"aoti_torch_empty_strided", b"_ZNSt7__cxx1112stringEv\0"),  # of libstdc++, no version
        (b"aoti_torch_get_dtype", b"cudaDeviceGetCount\0\0"),
        (b"libm.so.6", b"libfoo.so"),
    ],
)
def test_what_another_system_may_lack_is_refused(
    here: bytes, instead: bytes, tmp_path: Path
) -> None:
    planted = tmp_path / "_C.abi3.so"
    data = LIBRARY.read_bytes()
    assert len(here) == len(instead)
    assert b"\0" + here + b"\0" in data
    planted.write_bytes(data.replace(b"\0" + here + b"\0", b"\0" + instead + b"\0"))
    (problem,) = check_wheel.problems(planted)
    assert instead.rstrip(b"\0").decode() in problem


def wheel_of(folder: Path, version: str, *libraries: str) -> Path:
    """A file with the name of a wheel that holds copies of the CPU library under these names."""
    path = folder / f"coup_fast-{version}-cp310-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in libraries:
            archive.write(LIBRARY, f"coup_fast/{name}")
    return path


@needs_binutils
def test_only_a_wheel_with_cuda_says_so_in_its_version(tmp_path: Path) -> None:
    both = ("_C.abi3.so", "_C_cuda.abi3.so")
    good = [wheel_of(tmp_path, "1.0", "_C.abi3.so"), wheel_of(tmp_path, "1.0+cu130", *both)]
    check_wheel.check(good)
    for bad in (wheel_of(tmp_path, "2.0", *both), wheel_of(tmp_path, "2.0+cu130", "_C.abi3.so")):
        with pytest.raises(SystemExit, match="COUP_FAST_LOCAL_VERSION"):
            check_wheel.check([good[0], bad])


def test_a_wheel_without_its_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no _C\.abi3\.so"):
        check_wheel.check([wheel_of(tmp_path, "1.0")])
    with pytest.raises(SystemExit, match="no wheel"):
        check_wheel.check([])


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_later_releases_of_torch_declare_what_2_11_does() -> None:
    listed = check_wheel.LIST.read_text().split()
    assert len(listed) > 150
    assert set(listed) <= set(check_wheel.declared(f"{Path(torch.__file__).parent}/include"))


def metadata(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Write what the package says of itself into folder/coup_fast.egg-info/PKG-INFO."""
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_metadata_say_what_is_needed_and_where_to_look(tmp_path: Path) -> None:
    assert metadata(tmp_path, COUP_FAST_LOCAL_VERSION="").returncode == 0
    said = HeaderParser().parsestr((tmp_path / "coup_fast.egg-info" / "PKG-INFO").read_text())
    assert said["Version"] == coup_fast.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.10"
    core = [need for need in said.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(core) == ["numpy>=1.24", "torch>=2.11"]
    urls = dict(line.split(", ") for line in said.get_all("Project-URL", []))
    assert {"Repository", "Issues", "Changelog"} <= set(urls)


def test_a_local_version_names_what_a_wheel_was_built_for(tmp_path: Path) -> None:
    assert metadata(tmp_path, COUP_FAST_LOCAL_VERSION="cu130").returncode == 0
    said = HeaderParser().parsestr((tmp_path / "coup_fast.egg-info" / "PKG-INFO").read_text())
    assert said["Version"] == f"{coup_fast.__version__}+cu130"
    refused = metadata(tmp_path, COUP_FAST_LOCAL_VERSION="cu-130")
    assert refused.returncode == 1
    assert "COUP_FAST_LOCAL_VERSION" in refused.stderr
    assert "'cu-130'" in refused.stderr
