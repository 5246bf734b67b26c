"""What the compiled operators accept and return, known without running them.

These fakes run where there are no values: for torch.compile, for FakeTensor, and for every call in
which a tensor is on meta, because PyTorch then asks the fake instead of the kernel. So they refuse
what the kernels refuse, in the same words: `_Arguments` is csrc/calls/arguments.h in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_check: Callable[..., None] = torch._check

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NORMS = ("none", "normalised", "clipped", "stable")
QUANTITIES = ("log_confidence", "margin")
STEP_COLUMNS = 19
PERTURB_COLUMNS = ADAPTIVE_COLUMNS = 8
MAX_CLASSES = 2**31 - 1
MAX_ELEMENTS = 2**60
SIZES_EXPECTED = "must have fewer than 2^60 elements (a size of 0 counted as 1)"


def _sizes(sizes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {_sizes(tensor.shape)}"


def _fit(sizes: Sequence[Any]) -> bool:
    """Whether products of the sizes stay far from the end of int64; symbols are left to kernels."""
    left = MAX_ELEMENTS - 1
    for size in sizes:
        left //= size if isinstance(size, int) and size > 1 else 1
    return left > 0


class _Arguments:
    """Checks the arguments of one call against its state, a tensor [B, C, ...]."""

    def __init__(self, op: str, name: str, state: Tensor) -> None:
        self.op, self.name, self.state = op, name, state
        self.given(name, state)
        self.require(
            state.ndim >= 2, name, "must be [B, C, ...] with two dimensions or more, got", state
        )
        self.require(_fit(state.shape), name, f"{SIZES_EXPECTED}, got", state)

    def require(self, condition: Any, name: str, expected: str, given: Tensor) -> None:
        """condition: a bool, or a SymBool, which becomes a guard of the compiled program."""
        _check(condition, lambda: f"coup_fast::{self.op}: {name} {expected} {_text(given)}")

    def given(self, name: str, tensor: Tensor | None) -> None:
        """PyTorch lets None pass for a tensor."""
        _check(
            tensor is not None,
            lambda: f"coup_fast::{self.op}: {name} must be a tensor, got None",
        )

    def shape(self, name: str, given: Tensor, sizes: Sequence[Any], expected: str) -> None:
        self.require(given.ndim == len(sizes), name, expected, given)
        for size, wanted in zip(given.shape, sizes, strict=True):
            self.require(size == wanted, name, expected, given)

    def same_device(self, name: str, tensor: Tensor) -> None:
        _check(
            tensor.device == self.state.device,
            lambda: (
                f"coup_fast::{self.op}: {name} is on {tensor.device}, but {self.name} is on "
                f"{self.state.device}; they must be on the same device"
            ),
        )

    def float32_state(self) -> None:
        self.require(
            self.state.dtype == torch.float32,
            self.name,
            "must be float32 (coup_fast.reference takes float64), got",
            self.state,
        )

    def any_float(self, name: str, tensor: Tensor) -> None:
        self.same_device(name, tensor)
        expected = "must be float32, float16 or bfloat16, got"
        self.require(tensor.dtype in FLOATS, name, expected, tensor)

    def same_shape(self, name: str, tensor: Tensor) -> None:
        self.given(name, tensor)
        sizes = self.state.shape
        expected = f"must have the shape of {self.name}, {_sizes(sizes)}, got"
        self.shape(name, tensor, sizes, expected)
        self.any_float(name, tensor)

    def same_shape_if_given(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self.same_shape(name, tensor)

    def model_out(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            batch, channels, *pixels = sizes = self.state.shape
            if tensor.ndim >= 2 and tensor.shape[1] == 2 * channels:
                channels *= 2
            expected = f"must have the shape of x, {_sizes(sizes)}, or twice its channels, got"
            self.shape("model_out", tensor, (batch, channels, *pixels), expected)
            self.any_float("model_out", tensor)

    def row_of(
        self, name: str, tensor: Tensor, dtype: torch.dtype, sizes: Sequence[Any], expected: str
    ) -> None:
        self.given(name, tensor)
        self.require(tensor.dtype == dtype, name, expected, tensor)
        self.shape(name, tensor, sizes, expected)
        self.same_device(name, tensor)

    def keys(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            batch = self.state.shape[0]
            expected = f"must be int64 [{batch}, 2] (one row for each sample), got"
            self.row_of("keys", tensor, torch.int64, (batch, 2), expected)

    def coeffs(self, tensor: Tensor, columns: int) -> None:
        expected = f"must be one row, float32 [{columns}], got"
        self.row_of("coeffs", tensor, torch.float32, (columns,), expected)

    def alive(self, tensor: Tensor) -> None:
        batch = self.state.shape[0]
        expected = f"must be bool [{batch}] (one for each sample), got"
        self.row_of("alive", tensor, torch.bool, (batch,), expected)

    def guidance_norm(self, text: str) -> None:
        _check(
            text in NORMS,
            lambda: (
                f"coup_fast::{self.op}: guidance_norm must be none, normalised, clipped or stable, "
                f"got {text}"
            ),
        )

    def per_sample(self, name: str, tensor: Tensor) -> None:
        batch = self.state.shape[0]
        self.row_of(name, tensor, torch.float32, (batch,), f"must be float32 [{batch}], got")

    def margin(self, tensor: Tensor | None, norm: str, guidance: Tensor | None) -> None:
        stable = norm == "stable" and guidance is not None
        _check(
            stable == (tensor is not None),
            lambda: (
                f"coup_fast::{self.op}: margin must be given where guidance is and guidance_norm "
                f"is stable, and only there, got guidance_norm {norm}, "
                f"{'no ' if guidance is None else ''}guidance and "
                f"{'no' if tensor is None else 'a'} margin"
            ),
        )
        if tensor is not None:
            self.per_sample("margin", tensor)

    def dense_state(self) -> None:
        strides = self.state.stride()
        self.require(
            self.state.is_contiguous() or _layout(self.state) != torch.contiguous_format,
            self.name,
            "must be contiguous or channels_last to be written in place, got a view with strides "
            f"{_sizes(strides)},",
            self.state,
        )


def _layout(like: Tensor) -> torch.memory_format:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.ndim)
    if layout is None or like.is_contiguous() or not like.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def _dense_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What csrc/calls/tensors.h new_dense makes: contiguous, or channels_last as `like` is."""
    return torch.empty_like(like, dtype=dtype, memory_format=_layout(like))


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    def given() -> str:
        return f"got shape {_sizes(shape)} and keys {_text(keys)}"

    right = keys.dtype == torch.int64 and keys.ndim == 2 and len(shape) > 0
    for condition in (right, right and keys.shape[1] == 2, right and shape[0] == keys.shape[0]):
        _check(
            condition,
            lambda: f"coup_fast::normal: keys must be int64 [B, 2] and shape [B, ...], {given()}",
        )
    for size in shape:
        _check(size >= 0, lambda: f"coup_fast::normal: sizes must not be negative, {given()}")
    _check(_fit(shape), lambda: f"coup_fast::normal: shape {SIZES_EXPECTED}, {given()}")
    return keys.new_empty(shape, dtype=torch.float32)


def _perturb(
    op: str, images: Tensor, coeffs: Tensor, keys: Tensor | None, noise: Tensor | None
) -> _Arguments:
    arguments = _Arguments(op, "images", images)
    arguments.any_float("images", images)
    arguments.same_shape_if_given("noise", noise)
    arguments.keys(keys)
    arguments.coeffs(coeffs, PERTURB_COLUMNS)
    return arguments


def perturb(
    images: Tensor, coeffs: Tensor, keys: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    _perturb("perturb", images, coeffs, keys, noise)
    return _dense_like(images, torch.float32)


def perturb_backward(
    grad: Tensor, images: Tensor, coeffs: Tensor, keys: Tensor | None, noise: Tensor | None
) -> Tensor:
    _perturb("perturb_backward", images, coeffs, keys, noise).same_shape("grad", grad)
    return _dense_like(images)


def _reverse_step(
    op: str,
    x: Tensor,
    model_out: Tensor | None,
    coeffs: Tensor,
    keys: Tensor | None = None,
    guidance: Tensor | None = None,
    reference: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_norm: str = "none",
    margin: Tensor | None = None,
) -> _Arguments:
    arguments = _Arguments(op, "x", x)
    arguments.float32_state()
    arguments.model_out(model_out)
    arguments.same_shape_if_given("guidance", guidance)
    arguments.same_shape_if_given("reference", reference)
    arguments.same_shape_if_given("noise", noise)
    arguments.keys(keys)
    arguments.coeffs(coeffs, STEP_COLUMNS)
    arguments.guidance_norm(guidance_norm)
    arguments.margin(margin, guidance_norm, guidance)
    return arguments


def reverse_step(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    _reverse_step("reverse_step", x, *args, **kwargs)
    return _dense_like(x)


def reverse_step_(x: Tensor, *args: Any, **kwargs: Any) -> None:
    _reverse_step("reverse_step_", x, *args, **kwargs).dense_state()


def reverse_step_backward(
    grad: Tensor,
    x: Tensor,
    model_out: Tensor | None,
    coeffs: Tensor,
    keys: Tensor | None,
    guidance: Tensor | None,
    reference: Tensor | None,
    noise: Tensor | None,
    guidance_norm: str,
    margin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, model_out, coeffs, keys, guidance, reference, noise, guidance_norm, margin)
    _reverse_step("reverse_step_backward", *inputs).same_shape("grad", grad)
    gm, gg, gr = (
        x.new_empty(0) if tensor is None else _dense_like(tensor)
        for tensor in (model_out, guidance, reference)
    )
    return _dense_like(x), gm, gg, gr, x.new_empty(0 if margin is None else x.shape[0])


def _adaptive_step(
    op: str, x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
) -> _Arguments:
    arguments = _Arguments(op, "x", x)
    arguments.float32_state()
    arguments.same_shape("h", h)
    arguments.same_shape("h_ahead", h_ahead)
    arguments.alive(alive)
    arguments.coeffs(coeffs, ADAPTIVE_COLUMNS)
    return arguments


def adaptive_step(
    x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _adaptive_step("adaptive_step", x, h, h_ahead, alive, coeffs)
    batch = x.shape[0]
    return _dense_like(x), alive.new_empty(batch), x.new_empty(batch)


def adaptive_step_backward(
    grad: Tensor, x: Tensor, h: Tensor, h_ahead: Tensor, alive: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _adaptive_step("adaptive_step_backward", x, h, h_ahead, alive, coeffs)
    arguments.same_shape("grad", grad)
    return _dense_like(x), _dense_like(h), _dense_like(h_ahead)


def _logits(op: str, logits: Tensor, quantity: str) -> _Arguments:
    arguments = _Arguments(op, "logits", logits)
    _check(
        quantity in QUANTITIES,
        lambda: f"coup_fast::{op}: quantity must be log_confidence or margin, got {quantity}",
    )
    expected = "must be [B, K] with at least one class, got"
    arguments.require(logits.ndim == 2, "logits", expected, logits)
    arguments.require(logits.shape[1] >= 1, "logits", expected, logits)
    arguments.require(logits.shape[1] <= MAX_CLASSES, "logits", expected, logits)
    if quantity == "margin":
        expected = "must have at least two classes for the margin, got"
        arguments.require(logits.shape[1] >= 2, "logits", expected, logits)
    arguments.any_float("logits", logits)
    return arguments


def confidence_cotangent(logits: Tensor, quantity: str = "log_confidence") -> tuple[Tensor, Tensor]:
    _logits("confidence_cotangent", logits, quantity)
    return logits.new_empty(logits.shape[0], dtype=torch.float32), _dense_like(logits)


def confidence_cotangent_backward(
    grad_value: Tensor, grad_cotangent: Tensor, logits: Tensor, quantity: str = "log_confidence"
) -> Tensor:
    arguments = _logits("confidence_cotangent_backward", logits, quantity)
    arguments.per_sample("grad_value", grad_value)
    arguments.same_shape("grad_cotangent", grad_cotangent)
    return _dense_like(logits)


FAKES: tuple[Callable[..., Any], ...] = (
    normal,
    perturb,
    perturb_backward,
    reverse_step,
    reverse_step_,
    reverse_step_backward,
    adaptive_step,
    adaptive_step_backward,
    confidence_cotangent,
    confidence_cotangent_backward,
)


def register() -> None:
    for fake in FAKES:
        torch.library.register_fake(f"coup_fast::{fake.__name__}", fake)
