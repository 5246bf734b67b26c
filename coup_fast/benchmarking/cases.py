"""What is benchmarked: each fused operator with its rivals, its traffic and a correctness check.

The check runs before anything is timed; a case that fails it is not timed. Every variant of a case
computes the same result from the same inputs (random noise aside) and is called as a user would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coup_fast import methods, noise, ops, reference
from coup_fast.benchmarking import rivals
from coup_fast.plan import C, D, V, W
from coup_fast.schedules import VPSchedule

IMAGE = (3, 32, 32)
BATCHES = (8, 64, 512)
_FLOAT = 4  # bytes


class VariantUnavailable(Exception):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. `build` returns the function that is timed.

    `part` is "whole" for a rival of the fused operator, "noise" or "arithmetic" for a share of one.
    """

    name: str
    build: Callable[[], Callable[[], object]]
    part: str = "whole"


@dataclass(frozen=True)
class Case:
    """One operator at one size. `traffic` counts each byte read or written once."""

    name: str
    images: int
    elements: int
    traffic: int
    device: torch.device
    check: Callable[[], None]
    variants: tuple[Variant, ...] = field(repr=False)


def without(case: Case, name: str) -> Case:
    """The case without the variants of that name."""
    return replace(case, variants=tuple(v for v in case.variants if v.name != name))


def coup_row() -> Tensor:
    """A row from the middle of COUP's published plan, float32 [19]."""
    plan = methods.plan("coup", VPSchedule(), "eps")
    return torch.from_numpy(plan.coeffs[len(plan.coeffs) // 2]).float()


def row_numbers(row: Tensor) -> tuple[float, float, float, float]:
    """(v, w, c, d) of a row: factors of x, of the network's output, of guidance and of noise."""
    return float(row[V]), float(row[W]), float(row[C]), float(row[D])


def compiled_variant(
    name: str, function: Callable[..., object], *args: Tensor, part: str = "whole"
) -> Variant:
    """torch.compile of `function` on `args`; what it cannot compile is unavailable, with reason."""

    def build() -> Callable[[], object]:
        built = rivals.compiled(function)
        try:
            built(*args)
        except Exception as error:  # whatever the compiler's tool chain raises
            cause = next((line for line in str(error).splitlines() if line.strip()), "")
            raise VariantUnavailable(
                f"torch.compile failed: {type(error).__name__}: {cause.strip()[:200]}"
            ) from error
        return lambda: built(*args)

    return Variant(name, build, part)


def _require_close(name: str, actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    excess = ((actual.double() - expected.double()).abs() - bound).max()
    if not bool(excess <= 0):
        raise AssertionError(f"{name} is off by {float(excess):.3g} more than its bound")


def _require_standard_normal(name: str, values: Tensor) -> None:
    """Mean, variance and fourth moment within six standard errors of a standard normal's."""
    z, count = values.double(), values.numel()
    moments = (z.mean(), z.square().mean() - 1.0, z.pow(4).mean() - 3.0)
    for moment, variance in zip(moments, (1.0, 2.0, 96.0), strict=True):
        if not abs(float(moment)) <= 6.0 * math.sqrt(variance / count):
            raise AssertionError(f"the noise of {name} is not standard normal")


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
        _require_close("normal", drawn, reference.normal(keys, shape), 2e-6)
        expected = reference.reverse_step(x, eps, row, keys, guidance)
        terms = (a * x, b * eps, c * guidance, d * drawn)
        bound = 2e-6 * torch.stack([term.abs() for term in terms]).sum(0).double()
        _require_close(
            "reverse_step", ops.reverse_step(x, eps, row, keys, guidance), expected, bound
        )
        in_place = x.clone()
        ops.reverse_step_(in_place, eps, row, keys, guidance)
        _require_close("reverse_step_", in_place, expected, bound)
        plain = rivals.guided_step_arithmetic(x, eps, guidance, drawn, a, b, c, d)
        _require_close("eager step", plain, expected, bound)
        random = rivals.guided_step(x, eps, guidance, a, b, c, d)
        quiet = rivals.guided_step_arithmetic(x, eps, guidance, torch.zeros_like(x), a, b, c, d)
        _require_standard_normal("eager step", (random - quiet) / d)

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
        "guided COUP step", batch, elements, 4 * _FLOAT * elements, device, check, whole + parts
    )


def normal_case(batch: int, device: torch.device) -> Case:
    """`normal` against torch.randn, `batch` images of 3x32x32."""
    shape = (batch, *IMAGE)
    keys = noise.step_keys(0, range(batch), 0, 1, math.prod(IMAGE))[0].to(device)

    def check() -> None:
        _require_close("normal", ops.normal(keys, shape), reference.normal(keys, shape), 2e-6)
        _require_standard_normal("normal", ops.normal(keys, shape))

    variants = (
        Variant("fused", lambda: lambda: ops.normal(keys, shape)),
        Variant("eager", lambda: lambda: torch.randn(shape, device=device)),
        compiled_variant("torch.compile", torch.randn_like, torch.empty(shape, device=device)),
        Variant("exact Philox in plain torch", lambda: lambda: reference.normal(keys, shape)),
    )
    elements = math.prod(shape)
    return Case("normal", batch, elements, _FLOAT * elements, device, check, variants)


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
        _require_close("adaptive_step", actual[0], expected[0], 1e-3)
        _require_close("eager adaptive step", eager[0], expected[0], 1e-6)
        if not torch.equal(actual[1], expected[1]):
            raise AssertionError("adaptive_step stops other samples than the float64 reference")

    variants = (
        Variant("fused", lambda: lambda: ops.adaptive_step(x, h, h_ahead, alive, coeffs)),
        Variant("eager", lambda: lambda: rivals.adaptive_step(x, h, h_ahead, alive, *row[:6])),
        compiled_variant("torch.compile", rivals.adaptive_step, x, h, h_ahead, alive, *tensor_row),
    )
    elements = x.numel()
    return Case("adaptive_step", batch, elements, 4 * _FLOAT * elements, device, check, variants)


def confidence_case(batch: int, classes: int, device: torch.device) -> Case:
    """`confidence_cotangent` of logits [batch, classes] against autograd."""
    logits = 3.0 * torch.randn((batch, classes), generator=torch.Generator().manual_seed(0))
    logits = logits.to(device)

    def check() -> None:
        actual = ops.confidence_cotangent(logits)
        for rival in (rivals.confidence_cotangent, rivals.confidence_cotangent_closed_form):
            expected = rival(logits.double())
            _require_close("log confidence", actual[0], expected[0], 2e-6)
            _require_close("confidence cotangent", actual[1], expected[1], 2e-6)

    variants = (
        Variant("fused", lambda: lambda: ops.confidence_cotangent(logits)),
        Variant("eager", lambda: lambda: rivals.confidence_cotangent(logits)),
        compiled_variant("torch.compile", rivals.confidence_cotangent_closed_form, logits),
    )
    name = f"confidence_cotangent [{batch},{classes}]"
    elements = batch * classes
    return Case(name, batch, elements, 2 * _FLOAT * elements, device, check, variants)


def all_cases(device: torch.device, batches: Sequence[int] = BATCHES) -> list[Case]:
    """Every case of `coup-fast bench` at the given batch sizes."""
    cases: list[Case] = []
    for make in (step_case, normal_case, adaptive_case):
        cases += [make(batch, device) for batch in batches]
    return [*cases, confidence_case(512, 10, device), confidence_case(64, 1000, device)]
