"""Prints a checksum of every operator's outputs on fixed inputs, as JSON. Not a test.

Run in its own process, it shows what the environment may not change: COUP_FAST_CPU, threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from coup_fast import ops
from helpers.sampling import DTYPES, NORMS, STEP_ROWS, keys_of, perturb_row, step

kernels = torch.ops.coup_fast


def outputs() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Name and result of calls that reach every kernel, term, tail and layout."""
    for shape in [(3, 7), (33, 1, 5), (2, 3, 13, 17), (3, 3, 32, 32), (1, 3, 96, 96)]:
        yield f"normal {shape}", (ops.normal(keys_of(shape[0], shape[1:]), shape),)
    for layout in (torch.contiguous_format, torch.channels_last):
        yield from steps(layout)
    images = torch.rand(3, 3, 13, 17)
    row = perturb_row(std=0.3, sign_std=0.1, lo=-1, hi=1)
    for dtype in DTYPES:
        args = (images.to(dtype), row, keys_of(3, (3, 13, 17)), None)
        yield f"perturb {dtype}", (ops.perturb(*args),)
        yield f"perturb_backward {dtype}", (kernels.perturb_backward(images, *args),)
    yield from adaptive_steps()
    for classes in (1, 10, 1003):
        logits = 3 * torch.randn(5, classes)
        grads = (torch.randn(5), torch.randn(5, classes))
        for quantity in ("log_confidence", "margin"):
            if quantity == "margin" and classes == 1:
                continue
            name = f"{quantity} {classes}"
            yield f"confidence {name}", ops.confidence_cotangent(logits, quantity)
            backward = kernels.confidence_cotangent_backward(*grads, logits, quantity)
            yield f"confidence_backward {name}", (backward,)


def steps(layout: torch.memory_format) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    torch.manual_seed(1)  # the same values in every layout
    for norm in NORMS:
        for learned in (False, True):
            for row in STEP_ROWS:
                call = step((2, 3, 64, 96), row, torch.bfloat16, learned, norm)
                call = call.map(lambda t: t.contiguous(memory_format=layout))
                name = f"{row} learned={learned} {norm} {layout}"
                yield f"step {name}", (ops.reverse_step(*call.args),)
                grads = kernels.reverse_step_backward(call.x.flip(0), *call.args)
                yield f"step_backward {name}", grads


def adaptive_steps() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    for shape in [(4, 3, 13, 17), (2, 3, 96, 96), (352, 3, 31, 33)]:  # the last past the caches
        x, h = torch.rand(shape), torch.randn(shape)
        alive = torch.arange(shape[0]) != 1
        coeffs = torch.tensor([5e-5, 1e-5, 0.1, 1e-3, 256 / 255, -1 / 510, 0, 1])
        args = (x, h, h - 1e-3 * torch.randn(shape).abs() * h, alive, coeffs)
        yield f"adaptive {shape}", ops.adaptive_step(*args)
        backward = kernels.adaptive_step_backward(h.flip(0), *args)
        yield f"adaptive_backward {shape}", backward


def checksums() -> dict[str, str]:
    torch.manual_seed(0)
    result = {}
    for name, tensors in outputs():
        digest = hashlib.sha256()
        for tensor in tensors:  # in logical order, so that layouts compare too
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        result[name] = digest.hexdigest()[:16]
    return result


if __name__ == "__main__":
    print(json.dumps({"isa": kernels.cpu_capability(), "sums": checksums()}))
