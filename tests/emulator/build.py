"""Builds the CUDA ops for the emulator: csrc/cuda/*.cu and the schemas, by the C++ compiler.

Undefined behaviour of alignment and shifts traps, as a misaligned vector access would on a device.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-math-errno"),
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


def _is_newer(target: Path) -> bool:
    """Whether the target is newer than every file it could depend on."""
    if not target.exists():
        return False
    built = target.stat().st_mtime
    headers = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return all(path.stat().st_mtime < built for path in [*headers, *HERE.iterdir()])


def library() -> Path:
    """The library with the ops of namespace coup_fast_emulated, for `torch.ops.load_library`."""
    target = BUILD / f"emulated_{torch.__version__}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes, one builds
        if not _is_newer(target):
            _build(target)
    return target


def _build(target: Path) -> None:
    (BUILD / "build_config.h").write_text(
        'namespace coup_fast { constexpr const char* kBuildConfig = "{}"; }\n'
    )
    compiler = os.environ.get("CXX", "c++")
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{BUILD}", "-isystem"]
    includes.append(str(torch_folder / "include"))
    objects = []
    for source in _sources():
        objects.append(BUILD / f"{source.stem}.o")
        prelude = [] if source.name == "emulator.cpp" else ["-include", str(HERE / "prelude.h")]
        command = [compiler, *FLAGS, *includes, *prelude, "-x", "c++", "-c", source]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    partial = target.with_suffix(".partial")
    libraries = [torch_folder / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")]
    subprocess.run([compiler, "-shared", "-o", partial, *objects, *libraries], check=True)
    partial.rename(target)


if __name__ == "__main__":
    print(library())
