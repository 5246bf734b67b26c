"""Run the operators' tests on libraries built with the sanitizers of GCC.

They report errors of memory and undefined behaviour. A copy of the working tree in build/sanitize
is built and tested, so every process that a test starts finds the sanitized libraries and no
others. All tests of the operators run under the best instruction set of this machine, and those of
the kernels under each other one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "sanitize"
SANITIZERS = "address,undefined"
ALL = ["tests/ops"]
KERNELS = [
    *("tests/ops/test_adaptive_step.py", "tests/ops/test_confidence_cotangent.py"),
    *("tests/ops/test_fuzz_operators.py", "tests/ops/test_normal.py", "tests/ops/test_perturb.py"),
    "tests/ops/test_reverse_step.py",
]


def copy_tree() -> None:
    """Bring TREE up to date with the files of the working tree; its build folder stays."""
    TREE.mkdir(parents=True, exist_ok=True)
    for old in TREE.iterdir():
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)  # with its time, so little is compiled again


def build(jobs: int) -> None:
    variables = {
        "CMAKE_ARGS": f"-DCOUP_FAST_SANITIZE={SANITIZERS}",
        "COUP_FAST_CUDA": "off",
        "COUP_FAST_HOST": "on",
        "MAX_JOBS": str(jobs),
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=TREE, env=os.environ | variables, check=True)


def runtime(name: str) -> str:
    """The path of one of the compiler's libraries."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{command[0]} has no {name}: the sanitizers need GCC and its libraries")
    return path


def environment(isa: str | None = None) -> dict[str, str]:
    """Of every process that loads the libraries: Python itself has no sanitizers."""
    variables = {
        # With libstdc++, or the first exception would find no function to throw it.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python and torch keep memory to the end; some tests ask for more than there is.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{TREE / 'tests'}{os.pathsep}{TREE}",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | variables | ({} if isa is None else {"COUP_FAST_CPU": isa})


def instruction_sets() -> list[str]:
    """Those that were built and that this machine has, the best one first."""
    code = "import coup_fast, json; print(json.dumps(coup_fast.build_info()))"

    def info(isa: str | None) -> dict[str, str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=TREE, env=environment(isa), stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(done.stdout)

    built = info(None)
    if f"-fsanitize={SANITIZERS}" not in str(built["flags"]):
        raise SystemExit(f"the libraries in {TREE} are not sanitized: {built}")
    return [isa for isa in reversed(built["isas"]) if info(isa)["cpu_capability"] == isa]


def run(isa: str, tests: list[str], jobs: int) -> bool:
    """Whether the tests pass under this instruction set; an error ends the process with a report.

    Reports go past pytest, whose copy of the standard error would end with the process.
    """
    print(f"--- {isa}: {' '.join(tests)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-n", str(jobs), *tests]
    return subprocess.run(command, cwd=TREE, env=environment(isa), check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", help="run these under each instruction set instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    start = time.monotonic()
    copy_tree()
    build(options.jobs)
    print(f"--- built with {SANITIZERS}: {time.monotonic() - start:.0f} s", flush=True)
    best, *others = instruction_sets()
    for isa in (best, *others):
        tests = options.tests or (ALL if isa == best else KERNELS)
        if not run(isa, tests, options.jobs):
            return 1
    print(f"--- no error found: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
