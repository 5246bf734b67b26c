"""What the build promises: a stable ABI, no instruction set leaking out, errors in one sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.scripts import ROOT, load_script

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") or (Path(sys.executable).parent / "cmake").exists()),
    reason="needs cmake",
)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PATH": path, **environment},
    )


@needs_nm
def test_code_for_one_instruction_set_does_not_leak_into_another() -> None:
    """Inline functions are merged by the linker: one compiled for AVX-512 must not serve all."""
    objects = list(ROOT.glob("build/cmake-*-inplace/CMakeFiles/per_isa_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("needs the build folder of an in-place build on x86-64")
    for path in objects:
        isa = re.search(r"per_isa_(\w+)\.dir", str(path))[1]
        for line in run("nm", "--defined-only", path).stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind not in "WuT" or f"{len(isa)}{isa}" in name, f"{path.name} {isa}: {line}"


def test_building_without_torch_ends_with_one_sentence() -> None:
    code = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "sys.argv = ['setup.py', 'dist_info']\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='__main__')\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "pip install 'torch>=2.11'" in done.stderr
    assert "--no-build-isolation" in done.stderr


def test_a_source_distribution_holds_what_the_build_reads(tmp_path: Path) -> None:
    code = (
        f"import os, runpy, sys; os.chdir({str(ROOT)!r}); "
        f"sys.argv = ['setup.py', '--quiet', 'egg_info', '--egg-base', {str(tmp_path)!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    sources = (tmp_path / "coup_fast.egg-info" / "SOURCES.txt").read_text().splitlines()
    listed = {os.path.normpath(line) for line in sources}  # "./" before the packages
    files = [path for name in ("csrc", "cmake") for path in (ROOT / name).rglob("*")]
    files += (ROOT / "coup_fast").rglob("*.py")
    files += (ROOT / "coup_fast").rglob("*.safetensors")
    wanted = {str(path.relative_to(ROOT)) for path in files if path.is_file()}
    assert wanted | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= listed
    assert not any(name.startswith("tests/") for name in listed)


@needs_cmake
@pytest.mark.skipif(torch.version.cuda is not None, reason="is about torch without CUDA")
def test_asking_for_cuda_without_a_cuda_torch_is_refused(tmp_path: Path) -> None:
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCOUP_FAST_CUDA=on"]
    done = run("cmake", "-S", ROOT, "-B", tmp_path, *options)
    assert done.returncode != 0
    assert "COUP_FAST_CUDA=on, but torch" in done.stderr


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("major", "accepted"), [(1, False), (99, True)])
def test_nvcc_may_be_older_than_torchs_cuda_but_not_newer(
    major: int, accepted: bool, tmp_path: Path
) -> None:
    """The driver that serves torch serves every older CUDA runtime, and no newer major release."""
    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    (torch_folder / "__init__.py").touch()
    (torch_folder / "version.py").write_text(f"__version__ = '2.99'\ncuda = '{major}.0'\n")
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCOUP_FAST_CUDA=on"]
    done = run("cmake", "-S", ROOT, "-B", tmp_path / "b", *options, PYTHONPATH=str(tmp_path))
    assert (done.returncode == 0) is accepted, done.stderr
    assert ("cuda on" in done.stdout) is accepted
    assert accepted or "may need a newer driver" in " ".join(done.stderr.split())


@needs_cmake
@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("8.6 9.0a", "86-real;90a-real"),
        ("10.0f,12.0", "100f-real;120-real"),
        ("", "80-real;90-real;100-real;100-virtual"),
        ("Hopper", None),
    ],
)
def test_torch_cuda_arch_list(requested: str, expected: str | None, tmp_path: Path) -> None:
    script = tmp_path / "print.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/cuda_archs.cmake")\nmessage("${{CMAKE_CUDA_ARCHITECTURES}}")\n'
    )
    done = run("cmake", "-P", script, TORCH_CUDA_ARCH_LIST=requested)
    assert (done.returncode == 0) is (expected is not None)
    assert (expected or "cannot read 'Hopper'") in done.stderr


@needs_cmake
@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("12.6, V12.6.85", "80-real;90-real;90-virtual"),  # does not know 10.0
        ("12.8, V12.8.61", "80-real;90-real;100-real;100-virtual"),
        ("13.0, V13.0.88", "80-real;90-real;100-real;100-virtual"),
    ],
)
def test_the_default_architectures_are_those_the_compiler_knows(
    release: str, expected: str, tmp_path: Path
) -> None:
    script = tmp_path / "print.cmake"
    script.write_text(
        f'set(nvcc_version "Cuda compilation tools, release {release}")\n'
        f'include("{ROOT}/cmake/cuda_archs.cmake")\nmessage("${{CMAKE_CUDA_ARCHITECTURES}}")\n'
    )
    done = run("cmake", "-P", script, TORCH_CUDA_ARCH_LIST="")
    assert done.stderr.strip() == expected


def test_the_cuda_check_finds_loads_of_single_bytes() -> None:
    cuda_check = load_script(".ci/cuda_check.py")
    ptx = """.visible .entry _Z12step_kernelv(
	ld.global.u8 	%rs2, [%rd43];
	ld.global.nc.u8 	%rs3, [%rd43+1];
	ld.global.u32 	%r2, [%rd44];
.visible .entry _Z20adaptive_step_kernelv(
	ld.global.u8 	%rs2, [%rd43];
	ld.shared.u8 	%rs2, [%rd43];
"""
    assert cuda_check.byte_loads(ptx) == {"_Z12step_kernelv": 2, "_Z20adaptive_step_kernelv": 1}


def test_the_cuda_check_reads_registers_and_spills() -> None:
    cuda_check = load_script(".ci/cuda_check.py")
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addv' for 'sm_80'
ptxas info    : Function properties for _Z3addv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3mulv' for 'sm_90a'
ptxas info    : Function properties for _Z3mulv
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
    assert cuda_check.kernels_of(report) == [("_Z3addv", "80", 12, 0), ("_Z3mulv", "90a", 255, 32)]
    assert "--fmad=false" in cuda_check.cuda_flags()
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in cuda_check.cuda_flags()


def test_an_editable_installation_works_beside_its_clone(tmp_path: Path) -> None:
    """A folder coup_fast in the working folder, as `git clone` leaves it, hides no package."""
    clone, site = tmp_path / "coup_fast", tmp_path / "site"
    (clone / "coup_fast").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "coup_fast/_version.py"):
        shutil.copy(ROOT / name, clone / name)
    (clone / "coup_fast" / "__init__.py").write_text("place = 'the package'\n")
    build = "from setuptools.build_meta import build_editable; build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    look = f"import site; site.addsitedir({str(site)!r}); import coup_fast; print(coup_fast.place)"
    found = subprocess.run(
        [sys.executable, "-ES", "-c", look],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "the package"
