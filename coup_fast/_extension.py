"""Loads the compiled operators and says what is in use.

The libraries lie beside this file: `_C.abi3.so` (schemas and CPU kernels) and, in a build with
CUDA, `_C_cuda.abi3.so`. Neither is a Python module: loading one registers `torch.ops.coup_fast.*`.
If a library cannot be used, one warning says why and what to do, and the reference path goes on.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coup_fast._torch import autograd, fakes
from coup_fast._version import __version__

_FOLDER = Path(__file__).resolve().parent
_CPU_LIBRARY = _FOLDER / "_C.abi3.so"
_CUDA_LIBRARY = _FOLDER / "_C_cuda.abi3.so"
_REBUILD = "rebuild it against this torch with `pip install --no-build-isolation .`"

# Library -> why it is not in use; None once it is loaded. Filled by load().
_state: dict[Path, str | None] = {}


def _build_config() -> dict[str, Any]:
    """What CMake recorded in the loaded `_C` (see csrc/build_config.h.in)."""
    config: dict[str, Any] = json.loads(torch.ops.coup_fast.build_config())
    return config


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its section table, as after an interrupted copy.

    Loading such a file does not fail: it ends the process with a bus error.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":  # not a 64-bit ELF file: the loader will say so
        return False
    start, size, count = (
        int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62))
    )
    return path.stat().st_size < start + size * count


def _load_library(path: Path) -> str | None:
    """Load one library; returns the cause if that is not possible."""
    register: Callable[[str], None] = torch.ops.load_library
    if not path.is_file():
        return f"{path.name} is not in {path.parent}"
    if _is_cut_off(path):
        return f"{path.name} is incomplete"
    try:
        register(str(path))
    except (OSError, RuntimeError) as error:
        return str(error.__cause__ or error).strip().splitlines()[0]
    return None


def _load_cpu() -> str | None:
    cause = _load_library(_CPU_LIBRARY)
    if cause is None:
        try:
            built = _build_config()["version"]
        except (AttributeError, RuntimeError, ValueError, KeyError) as error:
            return f"{_CPU_LIBRARY.name} is not a library of coup_fast ({error})"
        if built != __version__:
            return f"{_CPU_LIBRARY.name} is of version {built}, the package of {__version__}"
    return cause


def load() -> None:
    """Load what this installation has; called once, at the import of coup_fast.

    Warns once, and never raises, if a library that should be there is missing or broken.
    """
    _state[_CPU_LIBRARY] = _load_cpu()
    if (cause := _state[_CPU_LIBRARY]) is not None:
        warnings.warn(
            f"coup_fast uses its slower reference path, because its compiled operators could not "
            f"be loaded: {cause}; {_REBUILD}",
            stacklevel=2,
        )
        return
    fakes.register()
    autograd.register()
    if torch.version.cuda is None or _build_config()["cuda"] == "off":
        return
    _state[_CUDA_LIBRARY] = _load_library(_CUDA_LIBRARY)
    if (cause := _state[_CUDA_LIBRARY]) is not None:
        warnings.warn(
            f"coup_fast uses its slower reference path on CUDA, because its CUDA operators could "
            f"not be loaded: {cause}; {_REBUILD}",
            stacklevel=2,
        )


def available() -> bool:
    """Whether the compiled CPU operators are in use."""
    return _state.get(_CPU_LIBRARY, "not loaded") is None


def cuda_available() -> bool:
    """Whether the compiled CUDA operators are in use (says nothing about a GPU being there)."""
    return _state.get(_CUDA_LIBRARY, "not loaded") is None


def _cpu_capability() -> str:
    try:
        return str(torch.ops.coup_fast.cpu_capability())
    except (AttributeError, RuntimeError) as error:  # COUP_FAST_CPU may ask for what is not there
        return f"error: {str(error).splitlines()[0]}"


def check_instruction_set() -> None:
    """Raises RuntimeError if COUP_FAST_CPU names no instruction set, or one that is not there."""
    try:
        torch.ops.coup_fast.cpu_capability()
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise RuntimeError(text[max(text.find("COUP_FAST_CPU"), 0) :]) from None


def _architectures(built: str) -> tuple[list[str], list[str]]:
    """CMake's "90-real 100" as what holds machine code, "sm_100", and what PTX, "compute_100"."""
    code, ptx = [], []
    for name in built.split():
        number, _, kind = name.partition("-")
        code += [f"sm_{number}"] if kind != "virtual" else []
        ptx += [f"compute_{number}"] if kind != "real" else []
    return code, ptx


def build_info() -> dict[str, Any]:
    """What is installed and in use, for bug reports and for `coup-fast info`.

    Keys: version, torch, python, machine; extension (path, loaded, error); cpu_capability
    ("avx512" | "avx2" | "baseline", None on the reference path); cuda (compiled, loaded, error,
    toolkit: the CUDA release of nvcc, archs: what there is machine code for, as "sm_90", ptx: what
    newer GPUs translate, as "compute_100", torch_cuda); compiler, flags, isas, built_with_torch,
    commit (None unless compiled, commit also None unless built from a git checkout).
    """
    loaded = available()
    config = _build_config() if loaded else {}
    archs, ptx = _architectures(str(config.get("cuda_archs", "")))
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "extension": {
            "path": str(_CPU_LIBRARY),
            "loaded": loaded,
            "error": _state.get(_CPU_LIBRARY),
        },
        "cpu_capability": _cpu_capability() if loaded else None,
        "cuda": {
            "compiled": config.get("cuda") == "on",
            "loaded": cuda_available(),
            "error": _state.get(_CUDA_LIBRARY),
            "toolkit": config.get("cuda_toolkit") or None,
            "archs": archs,
            "ptx": ptx,
            "torch_cuda": torch.version.cuda,
        },
        "compiler": config.get("compiler"),
        "flags": config.get("flags"),
        "isas": str(config.get("isas", "")).split(),
        "built_with_torch": config.get("torch"),
        "commit": config.get("commit") or None,
    }
