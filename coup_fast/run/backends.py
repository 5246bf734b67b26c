"""The two implementations of the operators, and the choice between them, made once per run."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from coup_fast import _extension


class Operators(Protocol):
    """What `coup_fast.ops` and `coup_fast.reference` both offer to a run."""

    def perturb(
        self,
        images: Tensor,
        coeffs: Tensor,
        keys: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor: ...

    def reverse_step(
        self,
        x: Tensor,
        model_out: Tensor | None,
        coeffs: Tensor,
        keys: Tensor | None = None,
        guidance: Tensor | None = None,
        reference: Tensor | None = None,
        noise: Tensor | None = None,
        guidance_norm: str = "none",
        margin: Tensor | None = None,
    ) -> Tensor: ...

    def reverse_step_(
        self,
        x: Tensor,
        model_out: Tensor | None,
        coeffs: Tensor,
        keys: Tensor | None = None,
        guidance: Tensor | None = None,
        reference: Tensor | None = None,
        noise: Tensor | None = None,
        guidance_norm: str = "none",
        margin: Tensor | None = None,
    ) -> None: ...

    def adaptive_step(
        self, x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def confidence_cotangent(
        self, logits: Tensor, quantity: str = "log_confidence"
    ) -> tuple[Tensor, Tensor]: ...


def choose_ops(backend: str, images: Tensor) -> Operators:
    """`coup_fast.ops` or `coup_fast.reference`, for these images under this backend.

    "auto": the compiled operators; the reference for float64 images, and on the CPU where the
    extension could not be loaded (its import has warned). Raises RuntimeError where there is
    nothing to run, TypeError for float64 images under "compiled".
    """
    device = images.device.type
    compiled = {"cpu": _extension.available, "cuda": _extension.cuda_available}
    if backend == "compiled" and images.dtype == torch.float64:
        raise TypeError("float64 images run on the reference path; use backend='auto'")
    if backend == "reference" or images.dtype == torch.float64:
        from coup_fast import reference

        return reference
    if device in compiled and compiled[device]():
        if device == "cpu":
            _extension.check_instruction_set()
        from coup_fast import ops

        return ops
    if backend == "auto" and device == "cpu":
        from coup_fast import reference

        return reference
    why = {
        "cpu": "the compiled operators of coup_fast are not loaded",
        "cuda": "images are on CUDA and this installation of coup_fast has no CUDA kernels",
    }.get(device, f"coup_fast has no kernels for device type {device!r}")
    raise RuntimeError(
        f"{why} (coup_fast.build_info() says more); rebuild, move to the CPU, or ask for "
        "the slower backend='reference'"
    )
