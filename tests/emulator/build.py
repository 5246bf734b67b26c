"""Builds the CUDA ops for the emulator: csrc/cuda/*.cu and the schemas, by the C++ compiler.

Undefined behaviour of alignment and shifts traps, as a misaligned vector access would on a device.
COUP_FAST_EMULATOR_PTX names a library in which the kernels' PTX takes the place of their text;
ptx.py builds it and sets the variable.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator" / torch.__version__
TORCH = Path(torch.__file__).parent
PTX = "COUP_FAST_EMULATOR_PTX"

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-math-errno"),
    *(f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{BUILD}", "-isystem", str(TORCH / "include")),
]
OWN_FLAGS = [
    *(
        "-fsanitize=alignment,shift,bounds,integer-divide-by-zero",
        "-fsanitize-undefined-trap-on-error",
    ),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def _sources() -> list[Path]:
    return [
        HERE / "emulator.cpp",
        ROOT / "csrc/ops.cpp",
        *sorted((ROOT / "csrc/cuda").glob("*.cu")),
    ]


def objects() -> list[Path]:
    """What `library` is linked from, after it has been built."""
    return [BUILD / f"{source.stem}.o" for source in _sources()]


def is_newer(target: Path, *more: Path) -> bool:
    """Whether the target is newer than every C++ file it could depend on, this one and `more`."""
    if not target.exists():
        return False
    built = target.stat().st_mtime
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    files += [path for path in HERE.iterdir() if path.suffix in (".h", ".cpp")]
    return all(path.stat().st_mtime < built for path in [*files, Path(__file__), *more])


@contextmanager
def one_process() -> Iterator[None]:
    """Of several test processes, one builds."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def library() -> Path:
    """The library with the ops of namespace coup_fast_emulated."""
    if given := os.environ.get(PTX):
        return Path(given)
    target = BUILD / "emulated.so"
    with one_process():
        if not is_newer(target):
            _build(target)
    return target


def _build(target: Path) -> None:
    (BUILD / "build_config.h").write_text(
        'namespace coup_fast { constexpr const char* kBuildConfig = "{}"; }\n'
    )
    prelude = ["-include", str(HERE / "prelude.h")]

    def compiled(source: Path, result: Path) -> None:
        compile_source(source, result, *OWN_FLAGS, *(prelude if source.parent != HERE else []))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, _sources(), objects()))
    link(objects(), target)


def compile_source(source: Path, target: Path, *flags: str) -> None:
    command = [os.environ.get("CXX", "c++"), *FLAGS, *flags, "-x", "c++", "-c", source]
    subprocess.run([*command, "-o", target], check=True)


def link(parts: Sequence[Path], target: Path) -> None:
    partial = target.with_suffix(".partial")
    libraries = [TORCH / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")]
    command = [os.environ.get("CXX", "c++"), "-shared", "-o", partial, *parts, *libraries]
    subprocess.run(command, check=True)
    partial.rename(target)


def load() -> Any:
    """The ops of namespace coup_fast_emulated, as `torch.ops.coup_fast` has the others."""
    path = library()
    torch.ops.load_library(str(path))
    if os.environ.get(PTX):
        run_ptx(path, "ptx_")
    return torch.ops.coup_fast_emulated


def run_ptx(path: Path, prefix: str) -> int:
    """Let translations run in the place of kernels: the functions `prefix` + mangled name.

    Returns how many. nvcc and the C++ compiler mangle anonymous namespaces differently, so kernels
    and translations meet under their demangled names.
    """
    table = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    address = {name: int(at, 16) for at, name in re.findall(r"^(\w+) \w (\w+)$", table, re.M)}
    kernels = _demangled(
        [name for name in address if re.match(r"_ZN9coup_fast4cuda.*_kernel", name)]
    )
    ptx = _demangled([name[len(prefix) :] for name in address if name.startswith(prefix)])
    loaded = ctypes.CDLL(str(path))
    anchor = ctypes.cast(loaded.emulated_translate, ctypes.c_void_p).value
    base = (anchor or 0) - address["emulated_translate"]
    loaded.emulated_translate.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    for readable, mangled in ptx.items():
        at = base + address[kernels[readable]], base + address[prefix + mangled]
        loaded.emulated_translate(*at)
    return len(ptx)


def _demangled(names: list[str]) -> dict[str, str]:
    """The mangled name of each demangled one."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    result = dict(zip(done.stdout.splitlines(), names, strict=True))
    assert len(result) == len(names), "two kernels have one name"
    return result


if __name__ == "__main__":
    print(library())
