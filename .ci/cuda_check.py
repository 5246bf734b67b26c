"""Compile every CUDA source to objects and check them: no spills, few registers, no byte loads.

Needs the headers of the torch beside it (a CPU build will do) and nvcc, but no GPU. nvcc is taken
from PATH, CUDA_HOME or, failing both, from Python wheels that are installed into build/nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90", "100")
MAX_REGISTERS = (
    128  # 512 threads an SM stay resident: enough loads in flight for a copy-bound kernel
)
BUILD = ROOT / "build" / "cuda-check"

# The mask of living samples is bool, so an adaptive kernel loads one byte. Any other load of a byte
# comes of a copy that forgot its alignment.
BYTES_ALLOWED = {"adaptive_step": 1}

PTX_KERNEL = re.compile(r"\.entry (\w+)")
PTX_BYTE_LOAD = re.compile(r"\bld\.global(\.\w+)*\.[bsu]8\b")
PTXAS_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """One kernel on one architecture, as ptxas sees it."""

    name: str
    arch: str
    registers: int
    spill: int  # bytes, stores and loads


def find_nvcc() -> Path:
    """nvcc of this machine, or one installed from wheels."""
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if found:
        version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
        if "release 13." in version.stdout:
            return Path(found)
    folder = ROOT / "build" / "nvcc"
    pattern = "lib/python*/site-packages/nvidia/cu*/bin/nvcc"
    if not list(folder.glob(pattern)):
        print(f"nvcc 13 is not on PATH: installing its wheels into {folder.relative_to(ROOT)}")
        venv.create(folder, with_pip=True, clear=True)
        requirements = ROOT / "requirements" / "nvcc.txt"
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)
    return next(folder.glob(pattern))


def cuda_flags() -> list[str]:
    """The flags of the real build, read from CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = re.search(r"set\(coup_fast_cuda_flags ([^)]*)\)", text)
    target = re.search(r'set\(COUP_FAST_TORCH_TARGET "(\w+)"', text)
    if not flags or not target:
        sys.exit("cuda_check: CMakeLists.txt no longer sets the flags where this script reads them")
    return [*flags[1].split(), f"-DTORCH_TARGET_VERSION={target[1]}"]


def torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("cuda_check: torch is not installed in this environment; its headers are needed")
    return Path(spec.origin).parent / "include"


def nvcc_command(nvcc: Path, source: Path, target: Path) -> list[str | Path]:
    """All but what is to be made of the source, and for which architectures."""
    command: list[str | Path] = [nvcc, source, "-o", target, "-O3", "-std=c++17", "-DUSE_CUDA"]
    command += ["-Werror=all-warnings", f"-I{ROOT / 'csrc'}", "-isystem", torch_include()]
    return [*command, "-Xcompiler=-fPIC", *cuda_flags()]


def kept_ptx(source: Path, arch: str) -> Path:
    return BUILD / source.stem / f"{source.stem}.compute_{arch}.ptx"


def compile_source(nvcc: Path, source: Path) -> tuple[Path, int, str]:
    command = [*nvcc_command(nvcc, source, BUILD / f"{source.stem}.o"), "-c", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    intermediates = BUILD / source.stem
    shutil.rmtree(intermediates, ignore_errors=True)
    intermediates.mkdir()
    command += ["--keep", "--keep-dir", intermediates]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return source, done.returncode, done.stdout + done.stderr


def byte_loads(ptx: str) -> dict[str, int]:
    """Loads of single bytes from global memory in each kernel of a PTX text that has any."""
    _, *parts = PTX_KERNEL.split(ptx)
    counts = {
        name: len(PTX_BYTE_LOAD.findall(body))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
    return {name: count for name, count in counts.items() if count}


def byte_failures(source: Path) -> list[str]:
    files = sorted((BUILD / source.stem).glob("*.ptx"))
    if len(files) != len(ARCHS):
        return [f"{source.name}: nvcc kept {len(files)} PTX files for {len(ARCHS)} architectures"]
    return [
        f"{file.name}: {count} loads of single bytes: {name}"
        for file in files
        for name, count in byte_loads(file.read_text()).items()
        if count > BYTES_ALLOWED.get(source.stem, 0)
    ]


def kernels_of(report: str) -> list[Kernel]:
    return [
        Kernel(m["name"], m["arch"], int(m["registers"]), int(m["stores"]) + int(m["loads"]))
        for m in PTXAS_KERNEL.finditer(report)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="one line for each kernel")
    arguments = parser.parse_args()

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        sys.exit("cuda_check: there is no csrc/cuda/*.cu")
    nvcc = find_nvcc()
    BUILD.mkdir(parents=True, exist_ok=True)
    print(f"{nvcc}: {len(sources)} files for sm_{', sm_'.join(ARCHS)}", flush=True)

    failures = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for source, status, report in pool.map(lambda s: compile_source(nvcc, s), sources):
            kernels = kernels_of(report)
            if status:
                print(report)
                failures.append(f"{source.name}: nvcc failed")
            elif {kernel.arch for kernel in kernels} != set(ARCHS):
                failures.append(f"{source.name}: ptxas reported no kernel for some architecture")
            for kernel in kernels:
                text = f"{source.name} sm_{kernel.arch} {kernel.registers} registers, "
                text += f"{kernel.spill} bytes spilled: {kernel.name}"
                if kernel.spill or kernel.registers > MAX_REGISTERS:
                    failures.append(text)
                elif arguments.verbose:
                    print(text)
            if not status:
                failures += byte_failures(source)
            most = max((kernel.registers for kernel in kernels), default=0)
            print(f"{source.name}: {len(kernels)} kernels, at most {most} registers", flush=True)
    if failures:
        sys.exit("\n".join(["CUDA check FAILED (spills, registers or loads of bytes):", *failures]))
    print("CUDA check passed: no spills, no loads of single bytes")


if __name__ == "__main__":
    main()
