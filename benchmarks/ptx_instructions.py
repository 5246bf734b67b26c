"""Counts the PTX instructions that a thread of a CUDA kernel executes, per element.

    python benchmarks/ptx_instructions.py           # count, and write results/ptx_instructions.json
    python benchmarks/tables.py                     # then: the table of docs/kernels.md

The PTX runs in the emulator (tests/emulator/ptx.py), where each instruction counts itself. So the
count is of the path that a call takes, its loops and branches included. PTX is not machine code:
ptxas removes moves, joins instructions, and makes several of a division or a root. The numbers
compare versions of a kernel with each other. They do not predict a time.

Counting needs nvcc, a C++ compiler and coup_fast built for the CPU. The table needs none of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import table_cells

ROOT = Path(__file__).resolve().parent.parent
STORED = table_cells.FOLDER / "ptx_instructions.json"
SHAPE = (64, 3, 32, 32)  # several turns of the grid, so that a thread's start weighs little
KINDS = ("floats", "integers", "loads and stores", "moves and branches")  # as emulator::Executed


def table() -> str:
    """The stored counts in Markdown."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    body = [
        [name, f"{sum(counts):.1f}", *(f"{count:.1f}" for count in counts)]
        for name, counts in stored["kernels"].items()
    ]
    shape = "×".join(map(str, stored["shape"][1:]))
    return (
        f"PTX instructions per element, compute_{stored['arch']}, {stored['shape'][0]} images of "
        f"{shape}; from {table_cells.file_of(STORED)}\n\n"
        + table_cells.table(["kernel", "all", *KINDS], body)
    )


def calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Name, operator and arguments of each row."""
    import torch
    from helpers.cuda_cases import adaptive_arguments
    from helpers.sampling import keys_of, step

    def plain(*dtypes: torch.dtype, norm: str = "none", last: bool = False) -> Any:
        model, guidance = dtypes[0], dtypes[-1]
        call = step(SHAPE, "langevin", (model, guidance, guidance), guidance_norm=norm)
        call = replace(call, reference=None)
        layout = torch.channels_last if last else torch.contiguous_format
        return call.map(lambda t: t.contiguous(memory_format=layout))

    float32, bfloat16 = torch.float32, torch.bfloat16
    unguided = replace(plain(float32), guidance=None)
    steps = {
        "guided step, float32": plain(float32),
        "step without guidance, float32": unguided,
        "guided step, bfloat16 output and guidance": plain(bfloat16),
        "the same, channels_last": plain(bfloat16, last=True),
        "guided step, bfloat16 output, float32 guidance": plain(bfloat16, float32),
        "normalised guided step, float32": plain(float32, norm="normalised"),
    }
    return {
        **{name: ("reverse_step", call.args) for name, call in steps.items()},
        "`normal`": ("normal", (keys_of(SHAPE[0], SHAPE[1:]), SHAPE)),
        "`adaptive_step`": ("adaptive_step", adaptive_arguments(SHAPE)),
    }


def count(arch: str, jobs: int) -> dict[str, list[float]]:
    """Instructions of each kind per element of each of `calls`."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from emulator import build, ptx

    library = ptx.ptx_library(arch, jobs, counted=True)
    os.environ[build.PTX] = str(library)
    emulated = build.load()
    executed = ctypes.CDLL(str(library)).emulated_executed
    executed.restype = ctypes.c_uint64
    elements = 1
    for size in SHAPE:
        elements *= size
    counts = {}
    for name, (op, args) in calls().items():
        getattr(emulated, op)(*args)
        counts[name] = [round(executed(kind) / elements, 2) for kind in range(len(KINDS))]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90", help="virtual architecture (default: 90)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    kernels = count(arguments.arch, arguments.jobs)
    stored = {"arch": arguments.arch, "shape": SHAPE, "kinds": KINDS, "kernels": kernels}
    STORED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
