"""Counts the PTX instructions that a thread of a CUDA kernel executes, per element.

    python benchmarks/ptx_instructions.py [--arch 90]

The PTX runs in the emulator (tests/emulator/ptx.py), where each instruction counts itself. So the
count is of the path that a call takes, its loops and branches included. PTX is not machine code:
ptxas removes moves, joins instructions, and makes several of a division or a root. The numbers
compare versions of a kernel with each other. They do not predict a time.

Needs nvcc, a C++ compiler and coup_fast built for the CPU. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
from emulator import build, ptx  # noqa: E402
from helpers.cuda_cases import adaptive_arguments  # noqa: E402
from helpers.sampling import keys_of, step  # noqa: E402

SHAPE = (64, 3, 32, 32)  # three turns of the emulated grid, so that a thread's start weighs little
KINDS = ("floats", "integers", "loads and stores", "moves and branches")  # as emulator::Executed


def calls() -> dict[str, tuple[str, tuple[object, ...]]]:
    """Name, operator and arguments of each row."""

    def plain(dtype: torch.dtype, norm: str = "none") -> tuple[object, ...]:
        call = step(SHAPE, "langevin", dtype, guidance_norm=norm)
        return replace(call, reference=None).args

    bfloat16 = torch.bfloat16
    return {
        "guided step, float32": ("reverse_step", plain(torch.float32)),
        "guided step, bfloat16 output and guidance": ("reverse_step", plain(bfloat16)),
        "normalised guided step, float32": ("reverse_step", plain(torch.float32, "normalised")),
        "`normal`": ("normal", (keys_of(SHAPE[0], SHAPE[1:]), SHAPE)),
        "`adaptive_step`": ("adaptive_step", adaptive_arguments(SHAPE)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90", help="virtual architecture (default: 90)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    library = ptx.ptx_library(arguments.arch, arguments.jobs, counted=True)
    os.environ[build.PTX] = str(library)
    emulated = build.load()
    count = ctypes.CDLL(str(library)).emulated_executed
    count.restype = ctypes.c_uint64
    elements = torch.Size(SHAPE).numel()
    print(f"PTX of compute_{arguments.arch}, instructions per element at {list(SHAPE)}:\n")
    print(f"| kernel | all | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 2)}")
    for name, (op, args) in calls().items():
        getattr(emulated, op)(*args)
        counts = [count(kind) / elements for kind in range(len(KINDS))]
        print(f"| {name} | {sum(counts):.1f} | {' | '.join(f'{n:.1f}' for n in counts)} |")


if __name__ == "__main__":
    main()
