"""Runs every CUDA kernel, in every way it is launched, a few times. Not a test: it is what
compute-sanitizer watches (benchmarks/gpu.sh), and small, because that is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.cuda_cases import adaptive_arguments, every_kernel
from helpers.sampling import step
from test_cuda_ops import to_device

SEVERAL_LAUNCHES = (1, 3, 592, 592)  # above 2^20 elements


def main() -> None:
    kernels = torch.ops.coup_fast
    chosen = every_kernel()
    for case in chosen:
        getattr(kernels, case.op)(*to_device(case.make()))
    call = step(SEVERAL_LAUNCHES, guidance_norm="clipped")
    kernels.reverse_step(*to_device(call.args))
    kernels.reverse_step_backward(*to_device((call.x, *call.args)))
    args = adaptive_arguments(SEVERAL_LAUNCHES)
    kernels.adaptive_step(*to_device(args))
    kernels.adaptive_step_backward(*to_device((args[0], *args)))
    torch.cuda.synchronize()
    print(f"{len(chosen) + 4} calls of {len({case.op for case in chosen})} operators")


if __name__ == "__main__":
    main()
