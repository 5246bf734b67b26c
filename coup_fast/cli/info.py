"""Say what is installed and in use: versions, kernels, instruction set, CUDA, extras.

The command works on a core install. Please put the output of `coup-fast info --json` into a bug
report.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from coup_fast.cli import common

HELP = "say which versions, kernels and devices are in use"

_CLI = ("safetensors", "tqdm", "tabulate", "PIL", "matplotlib", "shtab")
# Extra -> the modules it brings beyond the core.
_EXTRAS = {
    "models": ("safetensors",),
    "cli": _CLI,
    "demo": (*_CLI, "mlxtend", "foolbox"),
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

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    missing = {
        extra: [name for name in modules if importlib.util.find_spec(name) is None]
        for extra, modules in _EXTRAS.items()
    }
    return {
        **coup_fast.build_info(),
        "numpy": numpy.__version__,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "extras_missing": missing,
    }


def _kernels(info: dict[str, Any]) -> str:
    extension = info["extension"]
    if not extension["loaded"]:
        return f"not loaded ({extension['error']}); the slower reference path is used"
    return f"loaded, instruction set {info['cpu_capability']} (built: {', '.join(info['isas'])})"


def _cuda(info: dict[str, Any]) -> str:
    cuda, gpus = info["cuda"], info["gpus"]
    if cuda["torch_cuda"] is None:
        return "none: this torch is built for CPU only"
    seen = f"torch for CUDA {cuda['torch_cuda']}, GPUs: {', '.join(gpus) or 'none seen'}"
    if cuda["loaded"]:
        return f"kernels loaded ({' '.join(cuda['archs'])}); {seen}"
    reason = cuda["error"] or "this build of coup_fast has none"
    return f"no kernels ({reason}); {seen}"


def _build(info: dict[str, Any]) -> str:
    if not info["extension"]["loaded"]:
        return "-"
    commit = f", commit {info['commit']}" if info["commit"] else ""
    return f"{info['compiler']}, torch {info['built_with_torch']}{commit}"


def _extras(missing: dict[str, list[str]]) -> str:
    have = [extra for extra, names in missing.items() if not names]
    lack = [f"{extra} (lacks {', '.join(names)})" for extra, names in missing.items() if names]
    return "; ".join(filter(None, [", ".join(have), f"not: {', '.join(lack)}" if lack else ""]))


def run(args: argparse.Namespace) -> int:
    """Print the information; always 0."""
    common.check_outputs([common.json_file(args)], args.force)
    info = collect()
    device = "cuda" if info["cuda"]["loaded"] and info["gpus"] else "cpu"
    lines = {
        "coup_fast": info["version"],
        "python": info["python"],
        "torch": info["torch"],
        "numpy": info["numpy"],
        "processor": f"{info['processor']} ({info['machine']}), {info['threads']} threads",
        "CPU kernels": _kernels(info),
        "CUDA": _cuda(info),
        "built with": _build(info),
        "default device": device,
        "extras": _extras(info["extras_missing"]),
    }
    width = max(map(len, lines))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
    common.report(args, text, info)
    return 0
