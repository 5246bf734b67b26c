"""Check that a wheel needs nothing from outside that another system, torch or Python may lack.

    python .ci/check_wheel.py dist/coup_fast-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl
    python .ci/check_wheel.py --list TORCH/include > .ci/torch_2_11_symbols.txt

A library may use the functions of torch 2.11's stable ABI, which later releases keep, and versioned
symbols of glibc, libstdc++ and libgcc, whose versions auditwheel compares with the wheel's tag.
Anything else fails: C++ of torch, a function newer than 2.11, Python, a shared CUDA runtime, and a
symbol without a version, which the linker found in torch by accident. Needs `nm` and `readelf` of
binutils; `--list` needs the headers of torch 2.11 and a C++ compiler.

A wheel with CUDA kernels must say so in its version (+cu130), and no other wheel may.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIST = Path(__file__).with_name("torch_2_11_symbols.txt")
SHIM = "torch/csrc/stable/c/shim.h"  # includes that of inductor/aoti_torch/c
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
LIBRARIES = re.compile(
    r"lib(torch_cpu|torch_cuda|c10)\.so|lib(c|m|dl|rt|pthread)\.so\.\d|ld-linux[\w-]*\.so\.\d"
    r"|libstdc\+\+\.so\.6|libgcc_s\.so\.1"
)


def output_of(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout


def declared(include: str) -> list[str]:
    """The functions that the stable headers in this folder declare for torch 2.11."""
    compiler = os.environ.get("CXX", "c++")
    flags = ["-E", "-P", "-DUSE_CUDA", TARGET, f"-I{include}"]
    text = output_of(compiler, *flags, f"{include}/{SHIM}")
    exported = r'__attribute__\(\(__visibility__\("default"\)\)\)'
    return sorted(set(re.findall(rf"{exported}\s+[\w\s*]+?\b(\w+)\s*\(", text)))


def problems(library: Path) -> list[str]:
    """What this library needs and may not need, one sentence each."""
    stable = set(LIST.read_text().split())
    found = []
    for line in output_of("nm", "-D", "--undefined-only", library).splitlines():
        kind, symbol = line.split()
        if kind == "w" or symbol in stable or SYSTEM.search(symbol):
            continue  # weak: the library does without it
        found.append(f"it needs {symbol}, which is not in {LIST.name}, nor a system library's")
    dynamic = output_of("readelf", "-d", library)
    for needed in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic):
        if not LIBRARIES.fullmatch(needed):
            found.append(f"it needs the library {needed}")
    for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", dynamic):
        found.append(f"it searches for libraries in {path}")
    return found


def check(wheels: list[Path]) -> None:
    """Look at every library in these wheels; exit with all problems, one a line."""
    failures = [] if wheels else ["no wheel was given"]
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
            if "coup_fast/_C.abi3.so" not in names:
                failures.append(f"{wheel.name}: there is no _C.abi3.so in it")
            if ("coup_fast/_C_cuda.abi3.so" in names) != ("+cu" in wheel.name):
                failures.append(
                    f"{wheel.name}: CUDA kernels and a version +cu... go together: build with "
                    "COUP_FAST_LOCAL_VERSION=cu130, or with COUP_FAST_CUDA=off"
                )
            for name in names:
                found = problems(Path(archive.extract(name, folder)))
                failures += [f"{wheel.name}: {name}: {problem}" for problem in found]
            print(f"{wheel.name}: looked at {', '.join(names) or 'nothing'}")
    if failures:
        sys.exit("\n".join(failures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--list", metavar="INCLUDE", help="print the functions of torch's headers")
    arguments = parser.parse_args()
    if arguments.list:
        print(*declared(arguments.list), sep="\n")
    else:
        check(arguments.wheels)


if __name__ == "__main__":
    main()
