"""Calls of every operator on which a CUDA kernel has to give the bits of the CPU. Not a test.

One list for two uses: tests/emulator runs the kernels' text on the CPU, tests/gpu runs them on a
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helpers.sampling import (
    DTYPES,
    LOW,
    NORMS,
    STEP_ROWS,
    VIEWS,
    keys_of,
    perturb_row,
    step,
    views_of,
)

Arguments = tuple[Any, ...]

# A single element, tails of a quad, odd pixels, whole vectors, and samples of 2, 5 and 13 segments:
# a cluster of 2, of 8 with one turn, of 8 with two.
SHAPES = [(1, 1), (33, 1, 7), (2, 5), (1, 1003), (5, 3, 13, 17), (2, 3, 32, 32)]
# More quads, or groups of four pixels, than the emulator's grids have threads: several turns.
TURNS = [(601, 3, 7, 9), (300, 3, 16, 16)]
LARGE = [(2, 1, 141, 141), (1, 3, 160, 160), (2, 4, 225, 226)]


def _last(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _plain(call: Any) -> Any:
    """The commonest call: neither the attacked image nor a learned variance."""
    return replace(call, reference=None)


# Three channels, where vectors fit any mix of layouts: all channels_last, the network's output or
# the state alone, and the same without the reference.
MIXED: dict[str, Callable[[Any], Any]] = {
    "all_last": lambda call: call.map(_last),
    "model_last": lambda call: replace(call, model_out=_last(call.model_out)),
    "state_last": lambda call: replace(call, x=_last(call.x)),
    "all_last_plain": lambda call: _plain(call).map(_last),
    "model_last_plain": lambda call: replace(call, model_out=_last(call.model_out), reference=None),
    "noise_last": lambda call: replace(
        call, keys=None, noise=_last(torch.randn_like(call.x)), reference=None
    ),
}


@dataclass(frozen=True)
class Case:
    """One call: `make()` gives the arguments of `op`, on the CPU, the same every time."""

    op: str
    name: str
    make: Callable[[], Arguments]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _name(*parts: object) -> str:
    return "-".join(
        "x".join(map(str, part)) if isinstance(part, tuple) else str(part).replace("torch.", "")
        for part in parts
    )


def _normal() -> Iterator[Case]:
    shapes = [(1, 1), (33, 2), (2, 3), (3, 4), (1, 5), (2, 7), (3, 1003), (2, 3, 32, 32)]
    for shape in [*shapes, (3, 8), (3, 12), (300, 768), (0, 4), (4, 0)]:
        yield Case("normal", _name(shape), lambda s=shape: (keys_of(s[0], s[1:]), s))
    wrapping = torch.tensor([[-1, -2], [0, -1], [2**63 - 1, 2**32 - 1]])
    yield Case("normal", "wrapping", lambda: (wrapping, (3, 13)))


def _perturb() -> Iterator[Case]:
    rows = {
        "map": perturb_row(),
        "gaussian": perturb_row(scale=0.9, std=0.3, lo=-1, hi=1),
        "binary": perturb_row(scale=1, bias=0, sign_std=0.2, lo=0, hi=1, out_scale=0.99),
    }
    for row, coeffs in rows.items():
        for shape in SHAPES:
            for dtype in DTYPES:

                def make(shape: tuple[int, ...] = shape, dtype=dtype, coeffs=coeffs) -> Arguments:
                    return torch.rand(shape).to(dtype), coeffs, keys_of(shape[0], shape[1:]), None

                yield Case("perturb", _name(row, shape, dtype), make)
                if shape == (2, 3, 32, 32):
                    last = lambda m=make: (_last(m()[0]), *m()[1:])  # noqa: E731
                    yield Case("perturb", _name(row, "last", dtype), last)
                    yield Case(
                        "perturb_backward",
                        _name(row, "last", dtype),
                        lambda m=last: (torch.randn_like(m()[0], dtype=torch.float32), *m()),
                    )
                yield Case(
                    "perturb_backward",
                    _name(row, shape, dtype),
                    lambda m=make: (torch.randn_like(m()[0], dtype=torch.float32), *m()),
                )


def _step(change: Callable[[Any], Any] = lambda call: call, **options: Any) -> tuple[Any, Any]:
    def forward() -> Arguments:
        return change(step(**options)).args

    def backward() -> Arguments:
        call = change(step(**options))
        return torch.randn_like(call.x), *call.args

    return forward, backward


def _steps(name: str, makers: tuple[Any, Any]) -> Iterator[Case]:
    yield Case("reverse_step", name, makers[0])
    yield Case("reverse_step_backward", name, makers[1])


def _reverse_step() -> Iterator[Case]:
    for shape in SHAPES:
        for row in STEP_ROWS:
            yield from _steps(_name(row, shape), _step(shape=shape, row=row))
        for norm in NORMS:
            options = {"shape": shape, "learned": True, "guidance_norm": norm}
            yield from _steps(_name("learned", norm, shape), _step(**options))
            options = {"shape": shape, "guidance_norm": norm}
            yield from _steps(_name("plain", norm, shape), _step(_plain, **options))
    for shape in TURNS:
        yield from _steps(_name("turns", shape), _step(_plain, shape=shape))
        last = lambda call: _plain(call).map(_last)  # noqa: E731
        yield from _steps(_name("turns", "last", shape), _step(last, shape=shape))
        for row in ("langevin", "everything"):
            make, _ = _step(_plain, shape=shape, row=row, dtype=(LOW[0], LOW[1], LOW[1]))
            yield Case("reverse_step", _name("turns", *LOW, row, shape), make)
    for shape in LARGE:
        for norm in NORMS[1:]:
            options = {"shape": shape, "guidance_norm": norm, "dtype": torch.float16}
            yield from _steps(_name("large", norm, shape), _step(**options))
            yield from _steps(_name("large", "plain", norm, shape), _step(_plain, **options))
    for dtype in [(LOW[0], torch.float32, LOW[1]), (LOW[1], LOW[0], torch.float32)]:
        for norm in NORMS[:2]:
            options = {"shape": (5, 3, 16, 12), "dtype": dtype, "guidance_norm": norm}
            yield from _steps(_name(*dtype, norm), _step(**options))
    for name, change in MIXED.items():
        for shape in [(2, 3, 8, 6), (3, 3, 32, 32)]:
            for norm in NORMS[:2]:
                options = {"shape": shape, "guidance_norm": norm, "dtype": (LOW[0], LOW[1], LOW[1])}
                yield from _steps(_name(name, norm, shape), _step(change, **options))
    for view in VIEWS:
        for shape in [(5, 3, 13, 17), (2, 4, 16, 16)]:
            for norm in NORMS[:2]:
                change = lambda call, v=view: call.map(lambda t: views_of(t)[v])  # noqa: E731
                options = {"shape": shape, "learned": True, "guidance_norm": norm}
                options["dtype"] = (LOW[0], LOW[1], torch.float32)
                yield from _steps(_name(view, norm, shape), _step(change, **options))


def _usual_step() -> Iterator[Case]:
    """Plain calls of one layout and one type of output and guidance, which have their own kernel.

    Its loops: guided noise, noise, and any other row.
    """
    rows = {"guided": "langevin", "drawn": "langevin", "ode": "ode", "x0": "ancestral"}
    rows |= {"bounded": "to_pixels", "everything": "everything"}
    layouts: dict[str, Callable[[Any], Any]] = {
        "usual": lambda call: call,
        "usual_last": lambda call: call.map(_last),
    }
    for name, row in rows.items():
        for layout, change in layouts.items():
            for dtype in DTYPES:
                for shape in [(2, 3, 32, 32), TURNS[1]]:

                    def make(shape=shape, row=row, dtype=dtype, name=name, change=change):
                        call = _plain(step(shape, row, dtype))
                        call = replace(call, guidance=None) if name == "drawn" else call
                        return change(call).args

                    if shape in SHAPES or name in ("guided", "drawn"):
                        yield Case("reverse_step", _name(layout, name, dtype, shape), make)
    for shape in [(3, 8), (3, 12), (2, 5, 24), (2, 2, 2, 2)]:  # twelve elements are three quads
        yield Case("reverse_step", _name("usual", shape), _step(_plain, shape=shape)[0])


def adaptive_arguments(
    shape: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2
) -> Arguments:
    """x, h, h_ahead, alive, coeffs: step sizes below, in and above their bounds, sample 2 dead."""
    x, h = torch.rand(*shape), 0.1 * torch.randn(*shape)
    change = torch.linspace(-1e-3, 5e-3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    ahead = h * (1 - change) + 1e-5 * torch.randn(*shape)
    alive = torch.arange(shape[0]) != 2
    coeffs = torch.tensor([0.05e-3, 1e-5, 1e-1, 1e-3, 256 / 255, -1 / 510, 0.0, 1.0])
    return x, h.to(dtypes[0]), ahead.to(dtypes[1]), alive, coeffs


def _adaptive_step() -> Iterator[Case]:
    def both(name: str, make: Callable[[], Arguments]) -> Iterator[Case]:
        yield Case("adaptive_step", name, make)
        yield Case(
            "adaptive_step_backward", name, lambda: (torch.randn_like(make()[0]), *make())
        )  # fmt: skip

    for shape in [*SHAPES, *LARGE]:
        yield from both(_name(shape), lambda s=shape: adaptive_arguments(s))
    for dtypes in [(LOW[0], LOW[0]), (LOW[1], torch.float32)]:
        yield from both(_name(*dtypes), lambda d=dtypes: adaptive_arguments((5, 3, 16, 16), d))
    for dtype in DTYPES:  # three channels of 1024 pixels: vectors, in registers

        def last(dtype: torch.dtype = dtype) -> Arguments:
            x, h, ahead, *rest = adaptive_arguments((3, 3, 32, 32), (dtype, torch.float32))
            return _last(x), _last(h), ahead, *rest

        yield from both(_name("last", dtype), last)
    for view in VIEWS:

        def viewed(view: str = view) -> Arguments:
            *states, alive, coeffs = adaptive_arguments((5, 3, 13, 17))
            return *(views_of(t)[view] for t in states), alive, coeffs

        yield from both(view, viewed)
    yield from both("zero", lambda: (*(0 * t for t in adaptive_arguments((4, 2, 3, 5))[:3]),
                                     *adaptive_arguments((4, 2, 3, 5))[3:]))  # fmt: skip


def _confidence() -> Iterator[Case]:
    def both(name: str, logits: Callable[[], Tensor]) -> Iterator[Case]:
        for quantity in ("log_confidence", "margin"):
            if quantity == "margin" and logits().shape[1] < 2:
                continue
            yield Case(
                "confidence_cotangent", f"{name} {quantity}", lambda q=quantity: (logits(), q)
            )
            yield Case(
                "confidence_cotangent_backward",
                f"{name} {quantity}",
                lambda q=quantity: (torch.randn(len(logits())), torch.randn_like(logits()),
                                    logits(), q),
            )  # fmt: skip

    for shape in [(1, 1), (33, 2), (5, 10), (9, 31), (3, 32), (2, 33), (33, 1000), (2, 30011)]:
        for dtype in DTYPES:
            yield from both(
                _name(shape, dtype), lambda s=shape, d=dtype: (4 * torch.randn(s)).to(d)
            )
    yield from both("ties", lambda: torch.randint(0, 2, (33, 70)).float())
    yield from both("transposed", lambda: torch.randn(40, 9).T)
    yield from both("not_finite", not_finite_logits)


def not_finite_logits() -> Tensor:
    """Rows with infinities and NaN in every role, and one without."""
    rows = torch.randn(7, 40)
    rows[0, 5], rows[1, 39], rows[2, 3] = torch.nan, torch.inf, -torch.inf
    rows[3], rows[4] = -torch.inf, torch.nan
    rows[5, 1] = rows[5, 2] = torch.inf
    return rows


def _seeded(case: Case) -> Case:
    def make() -> Arguments:
        torch.manual_seed(7)
        return case.make()

    return Case(case.op, case.name, make)


CASES = [
    _seeded(case)
    for family in (_normal, _perturb, _reverse_step, _usual_step, _adaptive_step, _confidence)
    for case in family()
]


# Samples in registers, in shared memory and in clusters; both layouts; whole vectors and elements.
_EVERY_WAY = ("large", "160x160", "last", "2x3x32x32", "3x12", "wrapping")


def every_kernel() -> list[Case]:
    """Cases that run every kernel, in every way it is launched, and every ninth of the others."""
    return [
        case
        for number, case in enumerate(CASES)
        if number % 9 == 0 or any(word in case.name for word in _EVERY_WAY)
    ]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal in shape, type, strides and every bit; a NaN equals a NaN."""
    if (actual.shape, actual.dtype, actual.stride()) != (
        expected.shape,
        expected.dtype,
        expected.stride(),
    ):
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    if not torch.equal(actual.isnan(), expected.isnan()):
        return False
    a, b = (torch.where(t.isnan(), 0.0, t.float()) for t in (actual, expected))
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
