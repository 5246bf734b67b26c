"""Checks nvcc's code generation without a GPU: runs the PTX of csrc/cuda in the emulator.

The PTX is translated to C++ (ptx_translate.py) and takes the place of the kernels' text in all
tests of test_cuda_emulated.py. They compare every bit with the CPU ops and see that every kernel
runs. A control follows: `normal`, with every fma taken apart into two roundings, has to differ.

This covers what nvcc does up to PTX: inlining, contraction, widening, addresses, control flow. It
does not cover ptxas, which turns PTX into machine code, nor real concurrency.

Needs nvcc, a C++ compiler and binutils, and coup_fast built for the CPU. The PTX that `make
cuda-check` has kept is used where it is newer than all sources.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / ".ci"), str(HERE.parent), str(ROOT)]

import cuda_check  # noqa: E402
import torch  # noqa: E402
from emulator import build  # noqa: E402
from emulator.ptx_translate import PtxError, translate  # noqa: E402
from helpers.cuda_cases import CASES, outputs, same_bits  # noqa: E402

TESTS = HERE / "test_cuda_emulated.py"
CONTROL = "normal"  # its polynomials are written with fma
# Without clusters, which begin with compute capability 9, a large sample is read twice.
NOT_BELOW_90 = "not test_every_byte_is_read_once"


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def ptx_files(arch: str, jobs: int) -> list[Path]:
    """The PTX of every source: what `make cuda-check` kept, or what nvcc makes now."""
    inputs = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    newest = max(path.stat().st_mtime for path in inputs)
    folder = build.BUILD / f"ptx_{arch}"
    folder.mkdir(parents=True, exist_ok=True)

    def found(source: Path) -> Path | None:
        places = cuda_check.kept_ptx(source, arch), folder / f"{source.stem}.ptx"
        usable = (p for p in places if p.exists() and p.stat().st_mtime > newest)
        return next(usable, None)

    def make(source: Path) -> None:
        partial = folder / f"{source.stem}.partial"
        command = [*cuda_check.nvcc_command(nvcc, source, partial), "-ptx", f"-arch=compute_{arch}"]
        subprocess.run(command, check=True)
        partial.rename(partial.with_suffix(".ptx"))

    missing = [source for source in sources() if found(source) is None]
    if missing:
        nvcc = cuda_check.find_nvcc()
        print(f"{nvcc}: PTX of {len(missing)} files for compute_{arch}", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(make, missing))
    return [path for source in sources() if (path := found(source))]


def ptx_library(arch: str, jobs: int, counted: bool = False) -> Path:
    """The emulator's library with the translations of all kernels beside their text.

    counted: of a library that counts the instructions it executes.
    """
    files = ptx_files(arch, jobs)
    folder = build.BUILD / f"ptx_{arch}{'_counted' if counted else ''}"
    folder.mkdir(exist_ok=True)
    target = folder / "emulated.so"
    build.library()
    with build.one_process():
        if build.is_newer(target, *files, *HERE.glob("ptx*.py")):
            return target

        def compiled(source: Path, prefix: str, *flags: str) -> Path:
            name = source.name.partition(".")[0]
            text = folder / f"{prefix}{name}.cpp"
            text.write_text(translate(source.read_text(), str(source), prefix))
            build.compile_source(text, text.with_suffix(".o"), *flags)
            return text.with_suffix(".o")

        flags = ["-mfma"] if os.uname().machine == "x86_64" else []
        flags += ["-DCOUP_FAST_COUNTED"] if counted else []
        control = next(path for path in files if path.name.startswith(f"{CONTROL}."))
        with ThreadPoolExecutor(jobs) as pool:
            # The largest first, so that no core is left waiting.
            ordered = sorted(files, key=lambda path: path.stat().st_size, reverse=True)
            parts = list(pool.map(lambda path: compiled(path, "ptx_", *flags), ordered))
        parts.append(compiled(control, "unfused_", "-DCOUP_FAST_UNFUSED"))
        build.link([*build.objects(), *parts], target)
    return target


def tests_pass(library: Path, arch: str, jobs: int) -> bool:
    """Whether the emulator's tests pass with the PTX of an architecture."""
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS)]
    command += ["-n", str(jobs)] if jobs > 1 else []
    environment = os.environ | {build.PTX: str(library)}
    if int(arch) < 90:
        environment["COUP_FAST_EMULATOR_CAPABILITY"] = arch[0]
        command += ["-k", NOT_BELOW_90]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def control_fails(library: Path) -> bool:
    """Whether the comparison sees one rounding: a product and a sum are not the bits of an fma."""
    os.environ[build.PTX] = str(library)
    emulated = build.load()
    cases = [case for case in CASES if case.op == CONTROL]

    def differing() -> int:
        return sum(
            not same_bits(a, b)
            for case in cases
            for a, b in zip(
                outputs(getattr(emulated, case.op)(*case.make())),
                outputs(getattr(torch.ops.coup_fast, case.op)(*case.make())),
                strict=True,
            )
        )

    fused = differing()
    build.run_ptx(library, "unfused_")
    unfused = differing()
    print(f"control: of {len(cases)} calls of {CONTROL}, {unfused} differ with fma taken apart")
    return fused == 0 < unfused


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    archs = cuda_check.ARCHS
    parser.add_argument("--arch", nargs="+", default=["90"], choices=archs, help="default: 90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    for arch in arguments.arch:
        print(f"=== compute_{arch}", flush=True)
        try:
            library = ptx_library(arch, arguments.jobs)
        except PtxError as error:
            sys.exit(f"PTX check FAILED: {error}")
        if not tests_pass(library, arch, arguments.jobs):
            sys.exit(f"PTX check FAILED: compute_{arch} does not pass the emulator's tests")
    if not control_fails(library):
        sys.exit("PTX check FAILED: its control passes, so the comparison sees no rounding")
    print("PTX check passed: every kernel gives the bits of the CPU")


if __name__ == "__main__":
    main()
