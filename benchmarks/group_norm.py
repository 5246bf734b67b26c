"""Nanoseconds per element of torch's group norm on a CPU: precisions and memory formats, in turns.

    OMP_NUM_THREADS=1 python benchmarks/group_norm.py

It is why `coup_fast.models.unet.GroupNorm` copies half-precision tensors in channels_last.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from coup_fast.benchmarking import measure_in_turns
from coup_fast.malloc import keep_freed_memory
from coup_fast.models.unet import GroupNorm

# Batch, channels, height: those of the bundled U-Nets at 64 images.
SHAPES = ((64, 32, 14), (64, 64, 7), (64, 64, 16), (64, 128, 8))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    for batch, channels, height in SHAPES:
        x = torch.randn(batch, channels, height, height)
        cases = {}
        for dtype in (torch.float32, torch.bfloat16):
            for name, memory_format in FORMATS.items():
                given = x.to(dtype).contiguous(memory_format=memory_format)
                for module in (nn.GroupNorm(8, channels), GroupNorm(8, channels)):
                    ours = "ours" if isinstance(module, GroupNorm) else "torch"
                    case = f"{str(dtype).removeprefix('torch.')}, {name}, {ours}"
                    cases[case] = functools.partial(module, given)
        with torch.no_grad():
            times = measure_in_turns(cases, x.device, 15, 0.01, 1.0)
        print(f"{batch} x {channels} x {height} x {height}")
        for case, timing in times.items():
            print(f"  {case:<32} {1e9 * timing.median / x.numel():5.2f} ns/element")


if __name__ == "__main__":
    main()
