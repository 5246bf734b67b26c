"""Sample inputs of the operators, shared by the tests of the kernels. Not a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from coup_fast import noise
from coup_fast.plan import ROW_COLUMNS as STEP_COLUMNS
from coup_fast.plan import START_COLUMNS, blank_row
from helpers import interpreter

LOW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW)
NORMS = ("none", "normalised", "clipped", "stable")


def step_row(**columns: float) -> Tensor:
    """float32 [19]: nothing contributes but what is given (and variance and g_max are finite)."""
    row = blank_row()
    for name, value in ({"g_max": 9.0, "log_var_lo": -4.0, "log_var_hi": -2.5} | columns).items():
        row[STEP_COLUMNS.index(name)] = value
    return torch.tensor(row, dtype=torch.float32)


def perturb_row(**columns: float) -> Tensor:
    """float32 [8]: 2 u - 1 unless given."""
    values = dict(zip(START_COLUMNS, (2, -1, 0, 0, -np.inf, np.inf, 1, 0), strict=True))
    return torch.tensor([float((values | columns)[k]) for k in START_COLUMNS])


STEP_ROWS = {
    "langevin": step_row(v=1.001, w=-0.0064, c=0.3, d=0.0457),
    "ode": step_row(v=1.0004, w=-0.0031),
    "ancestral": step_row(p=1.2, q=-0.7, x0_lo=-1, x0_hi=1, u=0.3, v=0.7, d=0.2),
    "to_pixels": step_row(v=1.1, w=-0.3, d=0.4, out_lo=-1, out_hi=1, out_scale=0.5, out_bias=0.5),
    "everything": step_row(
        p=1.1,
        q=-0.3,
        x0_lo=-1,
        x0_hi=0.9,
        u=0.5,
        v=0.6,
        w=0.2,
        c=0.7,
        e=0.1,
        d=0.3,
        out_lo=-1.5,
        out_hi=1.5,
        out_scale=0.5,
        out_bias=0.5,
        x_var=0.2,
        z_var=0.4,
    ),
}


@dataclass(frozen=True)
class Step:
    """Arguments of one call of reverse_step."""

    x: Tensor
    model_out: Tensor | None
    coeffs: Tensor
    keys: Tensor | None = None
    guidance: Tensor | None = None
    reference: Tensor | None = None
    noise: Tensor | None = None
    guidance_norm: str = "none"
    margin: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor | str | None, ...]:
        return tuple(vars(self).values())

    def map(self, change) -> Step:
        """The same with every tensor of the state's shape changed; keys and coeffs stay."""
        names = ("x", "model_out", "guidance", "reference", "noise")
        given = {k: getattr(self, k) for k in names}
        return replace(self, **{k: None if t is None else change(t) for k, t in given.items()})

    def with_noise(self, noise: Tensor) -> Step:
        return replace(self, keys=None, noise=noise)

    def truth(self) -> Tensor:
        """float64, by the formula; noise has to be given."""
        assert self.keys is None
        step = self.map(lambda t: t.double())
        return interpreter.step(
            self.coeffs.double().numpy(),
            step.x,
            step.model_out,
            step.guidance,
            step.reference,
            step.noise,
            self.guidance_norm,
            self.margin,
        )

    def magnitude(self) -> Tensor:
        """float64: the sum of the magnitudes of the terms."""
        row = self.coeffs.double().numpy().copy()
        signed = [STEP_COLUMNS.index(name) for name in ("log_var_lo", "log_var_hi")]
        row = np.where(np.isin(np.arange(len(row)), signed), row, np.abs(row))
        for name, value in (
            ("x0_lo", -np.inf),
            ("out_lo", -np.inf),
            ("x0_hi", np.inf),
            ("out_hi", np.inf),
        ):
            row[STEP_COLUMNS.index(name)] = value
        step = self.map(lambda t: t.double().abs())
        if self.model_out is not None and self.model_out.shape[1] == 2 * self.x.shape[1]:
            channels = self.x.shape[1]
            variance = self.model_out[:, channels:].double()
            step = replace(step, model_out=torch.cat([step.model_out[:, :channels], variance], 1))
        return interpreter.step(
            row,
            step.x,
            step.model_out,
            step.guidance,
            step.reference,
            step.noise,
            self.guidance_norm,
            self.margin,
        )


def keys_of(batch: int, shape: tuple[int, ...], number: int = 1, seed: int = 5) -> Tensor:
    """Keys of noise tensor `number` of samples 0, 1, ... of this shape."""
    return noise.step_keys(seed, range(batch), 0, number + 1, int(np.prod(shape)))[number]


def step(
    shape: tuple[int, ...] = (5, 3, 13, 17),
    row: str = "everything",
    dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
    learned: bool = False,
    guidance_norm: str = "none",
) -> Step:
    """A call with every input, noise under keys. dtype: of model_out, guidance and reference."""
    model, guide, reference = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    batch, channels, *space = shape
    doubled = (batch, channels * (2 if learned else 1), *space)
    return Step(
        x=torch.randn(shape),
        model_out=torch.randn(doubled).to(model),
        coeffs=STEP_ROWS[row],
        keys=keys_of(batch, tuple(shape[1:])),
        guidance=torch.randn(shape).to(guide),
        reference=torch.randn(shape).to(reference),
        guidance_norm=guidance_norm,
        margin=4 * torch.randn(batch) if guidance_norm == "stable" else None,
    )


VIEWS = [
    *("slice", "every_other", "unaligned", "channels_apart"),
    *("channels_last", "slice_last", "transposed"),
]


def views_of(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in memory in every way the operators read; the last three in 4 dimensions."""
    batch, channels, *space = tensor.shape
    wide = tensor.new_empty(batch, channels + 2, *space)
    wide[:, 1:-1] = tensor
    rows = tensor.new_empty(2 * batch, channels, *space)
    rows[::2] = tensor
    shifted = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    shifted.copy_(tensor)
    apart = tensor.new_empty(batch, 2 * channels, *space)
    apart[:, ::2] = tensor
    views = {"slice": wide[:, 1:-1], "every_other": rows[::2], "unaligned": shifted}
    views["channels_apart"] = apart[:, ::2]
    if tensor.ndim == 4:
        views["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
        views["slice_last"] = wide.contiguous(memory_format=torch.channels_last)[:, 1:-1]
        views["transposed"] = tensor.mT.contiguous().mT
    return views


def ulps(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| in units in the last place of expected (float64) in actual's dtype."""
    rounded = expected.to(actual.dtype).abs()
    spacing = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)).double()
    return (actual.double() - expected).abs() / (spacing - rounded.double())
