"""Say what is installed and in use: versions, kernels, instruction set, CUDA, extras.

The command works on a core install. Please put the output of `coup-fast info --json` into a bug
report.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from typing import Any

from coup_fast.cli import common

HELP = "say which versions, kernels and devices are in use"

_CLI = ("safetensors", "tqdm", "tabulate", "PIL", "matplotlib", "shtab")
# Extra -> the modules it brings beyond the core.
_EXTRAS = {
    "models": ("safetensors",),
    "cli": _CLI,
    "demo": (*_CLI, "mlxtend", "foolbox"),
    "app": (*_CLI, "mlxtend", "gradio"),
    "bench": ("torchsde", "diffusers", "pytest_benchmark"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast info`."""
    common.add_output_arguments(parser, progress=False)


def collect() -> dict[str, Any]:
    """Everything `coup-fast info` says, as JSON-ready data."""
    import numpy
    import torch

    import coup_fast
    from coup_fast.evaluation.provenance import processor_name

    devices = range(torch.cuda.device_count())
    missing = {
        extra: [name for name in modules if importlib.util.find_spec(name) is None]
        for extra, modules in _EXTRAS.items()
    }
    return {
        **coup_fast.build_info(),
        "numpy": numpy.__version__,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in devices],
        "gpu_archs": ["sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in devices],
        "driver_cuda": _driver_cuda(),
        "extras_missing": missing,
    }


def _kernels(info: dict[str, Any]) -> str:
    extension = info["extension"]
    if not extension["loaded"]:
        return f"not loaded ({extension['error']}); the slower reference path is used"
    return f"loaded, instruction set {info['cpu_capability']} (built: {', '.join(info['isas'])})"


def _driver_cuda() -> str | None:
    """The newest CUDA release that the driver serves, as "13.0"; None without a driver."""
    import torch

    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # absent from a torch without CUDA
    try:
        version = ask() if ask else 0
    except RuntimeError:
        return None
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def serves(gpu: str, archs: list[str], ptx: list[str]) -> bool:
    """Whether kernels run on this GPU: machine code of its generation, or PTX of an older one.

    Names as in "sm_86", "sm_90a", "compute_100": the last digit is the minor number. Code for "a"
    runs on that very architecture, and code for "f" on its generation. What CMake's other names
    stand for, such as "native", is not known: they are taken to serve.
    """
    parts = re.compile(r"[a-z]+_(\d+)(\d)([af]?)")
    here = parts.fullmatch(gpu)
    for name in archs + ptx:
        built = parts.fullmatch(name)
        if here is None or built is None:
            return True
        this, that = (int(here[1]), int(here[2])), (int(built[1]), int(built[2]))
        if built[3] == "a":
            served = that == this
        elif built[3] == "f" or name in archs:
            served = that[0] == this[0] and that[1] <= this[1]
        else:
            served = that <= this
        if served:
            return True
    return False


def _cuda_kernels(info: dict[str, Any]) -> str:
    cuda = info["cuda"]
    if not info["extension"]["loaded"]:
        return "not loaded, because the CPU kernels are not"
    if not cuda["compiled"]:
        how = "install a wheel whose version has +cu in it, or build with nvcc and a CUDA torch"
        return f"none: this coup_fast is built without them ({how})"
    newer = (
        f"PTX of {', '.join(cuda['ptx'])} for newer GPUs"
        if cuda["ptx"]
        else "no PTX for newer GPUs"
    )
    built = f"built with CUDA {cuda['toolkit']} for {', '.join(cuda['archs'])}, {newer}"
    if cuda["loaded"]:
        return f"loaded, {built}"
    reason = cuda["error"] or "this torch is built for CPU only"
    return f"not loaded ({reason}); {built}"


def _cuda_devices(info: dict[str, Any]) -> str:
    cuda, driver = info["cuda"], info["driver_cuda"]
    if cuda["torch_cuda"] is None:
        return "none: this torch is built for CPU only"
    names = [f"{name} ({arch})" for name, arch in zip(info["gpus"], info["gpu_archs"], strict=True)]
    parts = [", ".join(names) or "none seen", f"torch for CUDA {cuda['torch_cuda']}"]
    parts.append(f"driver for CUDA {driver}" if driver else "no driver")
    if cuda["loaded"]:
        unserved = [g for g in info["gpu_archs"] if not serves(g, cuda["archs"], cuda["ptx"])]
        if unserved:
            parts.append(f"the kernels do not run on {', '.join(unserved)}")
        if driver and int(driver.partition(".")[0]) < int(cuda["toolkit"].partition(".")[0]):
            parts.append("this driver is too old for the kernels")
    return "; ".join(parts)


def _build(info: dict[str, Any]) -> str:
    if not info["extension"]["loaded"]:
        return "-"
    commit = f", commit {info['commit']}" if info["commit"] else ""
    return f"{info['compiler']}, torch {info['built_with_torch']}{commit}"


def _extras(missing: dict[str, list[str]]) -> str:
    have = [extra for extra, names in missing.items() if not names]
    lack = [f"{extra} (lacks {', '.join(names)})" for extra, names in missing.items() if names]
    return "; ".join(filter(None, [", ".join(have), f"not: {', '.join(lack)}" if lack else ""]))


def lines(info: dict[str, Any]) -> dict[str, str]:
    """What `collect` found, as the lines that `coup-fast info` prints."""
    return {
        "coup_fast": info["version"],
        "python": info["python"],
        "torch": info["torch"],
        "numpy": info["numpy"],
        "processor": f"{info['processor']} ({info['machine']}), {info['threads']} threads",
        "CPU kernels": _kernels(info),
        "CUDA kernels": _cuda_kernels(info),
        "CUDA devices": _cuda_devices(info),
        "built with": _build(info),
        "default device": "cuda" if info["cuda"]["loaded"] and info["gpus"] else "cpu",
        "extras": _extras(info["extras_missing"]),
    }


def run(args: argparse.Namespace) -> int:
    """Print the information; always 0."""
    common.check_outputs([common.json_file(args)], args.force)
    info = collect()
    table = lines(info)
    width = max(map(len, table))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in table.items())
    common.report(args, text, info)
    return 0
