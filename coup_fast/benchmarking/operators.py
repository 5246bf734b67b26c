"""The fused operators beside their rivals, with their traffic and a correctness check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coup_fast import methods, noise, ops, reference
from coup_fast.benchmarking import rivals
from coup_fast.benchmarking.case import (
    FLOAT,
    Case,
    Variant,
    compiled_variant,
    normals_limit,
    require_close,
    require_standard_normal,
)
from coup_fast.plan import C, D, V, W
from coup_fast.schedules import VPSchedule

IMAGE = (3, 32, 32)
SIZE = "3x32x32"


def coup_row() -> Tensor:
    """A row from the middle of COUP's published plan, float32 [19]."""
    plan = methods.plan("coup", VPSchedule(), "eps")
    return torch.from_numpy(plan.coeffs[len(plan.coeffs) // 2]).float()


def row_numbers(row: Tensor) -> tuple[float, float, float, float]:
    """(v, w, c, d) of a row: factors of x, of the network's output, of guidance and of noise."""
    return float(row[V]), float(row[W]), float(row[C]), float(row[D])


def step_case(batch: int, device: torch.device) -> Case:
    """The guided COUP step, float32, `batch` images of 3x32x32."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *IMAGE)
    x, eps, guidance, z = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    row = coup_row().to(device)
    quiet_row = row.clone()
    quiet_row[D] = 0.0
    keys = noise.step_keys(0, range(batch), 0, 1, math.prod(IMAGE))[0].to(device)
    a, b, c, d = row_numbers(row)
    numbers = torch.tensor([a, b, c, d], device=device)
    state = x.clone()

    def check() -> None:
        drawn = ops.normal(keys, shape)
        require_close("normal", drawn, reference.normal(keys, shape), 2e-6)
        expected = reference.reverse_step(x, eps, row, keys, guidance)
        terms = (a * x, b * eps, c * guidance, d * drawn)
        bound = 2e-6 * torch.stack([term.abs() for term in terms]).sum(0).double()
        require_close(
            "reverse_step", ops.reverse_step(x, eps, row, keys, guidance), expected, bound
        )
        in_place = x.clone()
        ops.reverse_step_(in_place, eps, row, keys, guidance)
        require_close("reverse_step_", in_place, expected, bound)
        plain = rivals.guided_step_arithmetic(x, eps, guidance, drawn, a, b, c, d)
        require_close("eager step", plain, expected, bound)
        random = rivals.guided_step(x, eps, guidance, a, b, c, d)
        quiet = rivals.guided_step_arithmetic(x, eps, guidance, torch.zeros_like(x), a, b, c, d)
        require_standard_normal("eager step", (random - quiet) / d)

    whole = (
        Variant("fused", lambda: lambda: ops.reverse_step(x, eps, row, keys, guidance)),
        Variant(
            "fused in place", lambda: lambda: ops.reverse_step_(state, eps, row, keys, guidance)
        ),
        Variant("eager", lambda: lambda: rivals.guided_step(x, eps, guidance, a, b, c, d)),
        compiled_variant("torch.compile", rivals.guided_step_of_row, x, eps, guidance, numbers),
        Variant(
            "exact Philox in plain torch",
            lambda: lambda: reference.reverse_step(x, eps, row, keys, guidance),
        ),
    )
    parts = (
        Variant("fused", lambda: lambda: ops.normal(keys, shape), "noise"),
        Variant("eager", lambda: lambda: torch.randn_like(x), "noise"),
        compiled_variant("torch.compile", torch.randn_like, x, part="noise"),
        Variant(
            "fused",
            lambda: lambda: ops.reverse_step(x, eps, quiet_row, None, guidance),
            "arithmetic",
        ),
        Variant(
            "eager",
            lambda: lambda: rivals.guided_step_arithmetic(x, eps, guidance, z, a, b, c, d),
            "arithmetic",
        ),
        compiled_variant(
            "torch.compile",
            rivals.guided_step_arithmetic_of_row,
            x,
            eps,
            guidance,
            z,
            numbers,
            part="arithmetic",
        ),
    )
    elements = x.numel()
    return Case(
        "guided COUP step",
        batch,
        SIZE,
        elements,
        4 * FLOAT * elements,
        device,
        check,
        whole + parts,
        normals_limit(batch, math.prod(IMAGE), device),
    )


def normal_case(batch: int, device: torch.device) -> Case:
    """`normal` against torch.randn, `batch` images of 3x32x32."""
    shape = (batch, *IMAGE)
    keys = noise.step_keys(0, range(batch), 0, 1, math.prod(IMAGE))[0].to(device)

    def check() -> None:
        require_close("normal", ops.normal(keys, shape), reference.normal(keys, shape), 2e-6)
        require_standard_normal("normal", ops.normal(keys, shape))

    variants = (
        Variant("fused", lambda: lambda: ops.normal(keys, shape)),
        Variant("eager", lambda: lambda: torch.randn(shape, device=device)),
        compiled_variant("torch.compile", torch.randn_like, torch.empty(shape, device=device)),
        Variant("exact Philox in plain torch", lambda: lambda: reference.normal(keys, shape)),
    )
    elements = math.prod(shape)
    return Case("normal", batch, SIZE, elements, FLOAT * elements, device, check, variants)


def adaptive_case(batch: int, device: torch.device) -> Case:
    """ADP's adaptive step, `batch` images of 3x32x32."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *IMAGE)
    x = torch.rand(shape, generator=generator).to(device)
    h = torch.randn(shape, generator=generator).to(device)
    h_ahead = h * 0.999
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    row = [5e-5, 1e-5, 1e-1, 1e-3, 256 / 255, -1 / 510, 0.0, 1.0]
    coeffs = torch.tensor(row, device=device)
    tensor_row = [coeffs[i] for i in range(6)]

    def check() -> None:
        actual = ops.adaptive_step(x, h, h_ahead, alive, coeffs)
        double = (x.double(), h.double(), h_ahead.double(), alive, coeffs.double())
        expected = reference.adaptive_step(*double)
        eager = rivals.adaptive_step(x.double(), h.double(), h_ahead.double(), alive, *row[:6])
        # 1 - gamma is a difference of nearly equal float32 sums, so alpha has fewer digits than x.
        require_close("adaptive_step", actual[0], expected[0], 1e-3)
        require_close("eager adaptive step", eager[0], expected[0], 1e-6)
        if not torch.equal(actual[1], expected[1]):
            raise AssertionError("adaptive_step stops other samples than the float64 reference")

    variants = (
        Variant("fused", lambda: lambda: ops.adaptive_step(x, h, h_ahead, alive, coeffs)),
        Variant("eager", lambda: lambda: rivals.adaptive_step(x, h, h_ahead, alive, *row[:6])),
        compiled_variant("torch.compile", rivals.adaptive_step, x, h, h_ahead, alive, *tensor_row),
    )
    elements = x.numel()
    return Case(
        "adaptive_step", batch, SIZE, elements, 4 * FLOAT * elements, device, check, variants
    )


def confidence_case(batch: int, classes: int, device: torch.device) -> Case:
    """`confidence_cotangent` of logits [batch, classes] against autograd."""
    logits = 3.0 * torch.randn((batch, classes), generator=torch.Generator().manual_seed(0))
    logits = logits.to(device)

    def check() -> None:
        actual = ops.confidence_cotangent(logits)
        for rival in (rivals.confidence_cotangent, rivals.confidence_cotangent_closed_form):
            expected = rival(logits.double())
            require_close("log confidence", actual[0], expected[0], 2e-6)
            require_close("confidence cotangent", actual[1], expected[1], 2e-6)

    variants = (
        Variant("fused", lambda: lambda: ops.confidence_cotangent(logits)),
        Variant("eager", lambda: lambda: rivals.confidence_cotangent(logits)),
        compiled_variant("torch.compile", rivals.confidence_cotangent_closed_form, logits),
    )
    name = f"confidence_cotangent [{batch},{classes}]"
    elements = batch * classes
    return Case(name, batch, "", elements, 2 * FLOAT * elements, device, check, variants)


def overhead_case(batch: int, device: torch.device) -> Case:
    """What a call costs: operators on `batch` images, and on one element, beside an empty one.

    The empty operator is `torch.empty_like`, which goes through the dispatcher and allocates a
    result, and no more.
    """
    generator = torch.Generator().manual_seed(0)
    image, pixel = (
        torch.randn((batch, *shape), generator=generator).to(device) for shape in (IMAGE, (1, 1, 1))
    )
    row = coup_row().to(device)
    keys = noise.step_keys(0, range(batch), 0, 1, math.prod(IMAGE))[0].to(device)
    logits = torch.randn((batch, 10), generator=generator).to(device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    adaptive_row = torch.tensor([5e-5, 1e-5, 1e-1, 1e-3, 1.0, 0.0, 0.0, 1.0], device=device)

    def step(x: Tensor) -> Variant:
        size = "one element" if x is pixel else SIZE
        return Variant(
            f"reverse_step, {size}", lambda: lambda: ops.reverse_step(x, x, row, keys, x)
        )

    def step_in_place(x: Tensor) -> Variant:
        size, state = "one element" if x is pixel else SIZE, x.clone()
        return Variant(
            f"reverse_step_, {size}", lambda: lambda: ops.reverse_step_(state, x, row, keys, x)
        )

    def check() -> None:
        for x in (image, pixel):
            expected = reference.reverse_step(x, x, row, keys, x)
            require_close("reverse_step", ops.reverse_step(x, x, row, keys, x), expected, 1e-5)

    variants = (
        Variant("empty operator", lambda: lambda: torch.empty_like(image)),
        step_in_place(pixel),
        step(pixel),
        step_in_place(image),
        step(image),
        Variant("normal, one element", lambda: lambda: ops.normal(keys, pixel.shape)),
        Variant(
            "adaptive_step, one element",
            lambda: lambda: ops.adaptive_step(pixel, pixel, pixel, alive, adaptive_row),
        ),
        Variant("confidence_cotangent, 10", lambda: lambda: ops.confidence_cotangent(logits)),
    )
    elements = image.numel()
    return Case(
        "cost of a call", batch, SIZE, elements, 4 * FLOAT * elements, device, check, variants
    )
