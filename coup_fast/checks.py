"""Checks of single arguments: each returns the value that it checked.

A wrong type raises TypeError and a wrong value ValueError, with one sentence per kind of argument:
the argument's name, what it must be, what was given. Nothing here knows what the values are for.
"""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

MAX_INT64 = 2**63 - 1
MAX_THREADS = 1024  # far more than help; OpenMP ends a process that asks for too many
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """A finite real number in [low, high]; `above` leaves out low itself, and `below` high."""
    error: type[Exception] = TypeError
    if not isinstance(value, bool) and isinstance(value, Real):
        error = ValueError
        with suppress(OverflowError):  # 10**400 is no float
            result = float(value)
            inside = low < result if above else low <= result
            inside = inside and (result < high if below else result <= high)
            if inside and math.isfinite(result):
                return result
    left = "(" if above or math.isinf(low) else "["
    right = ")" if below or math.isinf(high) else "]"
    bounded = not math.isinf(low) or not math.isinf(high)
    expected = f"a number in {left}{low:g}, {high:g}{right}" if bounded else "a finite number"
    raise error(_sentence(name, expected, value))


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A Python or NumPy integer in [low, high]; without `high`, of at least `low`.

    No bool is an integer here, and no tensor: reading one may wait for a device.
    """
    error: type[Exception] = TypeError
    if not isinstance(value, bool) and isinstance(value, int | np.integer):
        error, result = ValueError, operator.index(value)
        if low <= result and (high is None or result <= high):
            return result
    within = f"of at least {low}" if high is None else f"in [{_bound(low)}, {_bound(high)}]"
    raise error(_sentence(name, f"an int {within}", value))


def integers(name: str, value: Any, low: int, high: int) -> tuple[int, ...]:
    """A non-empty sequence of integers in [low, high]."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(_sentence(name, "a non-empty sequence of ints", value))
    return tuple(integer(f"each of {name}", item, low, high) for item in value)


def numbers(
    name: str, value: Any, low: float, high: float, *, above: bool = False
) -> tuple[float, ...]:
    """A non-empty sequence of finite numbers in [low, high]; `above` leaves out low itself."""
    value = value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
        raise TypeError(_sentence(name, "a non-empty sequence of numbers", value))
    return tuple(number(f"each of {name}", item, low, high, above=above) for item in value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(_sentence(name, "True or False", value))
    return value


def choice(name: str, value: Any, choices: Collection[T]) -> T:
    """The one of `choices` that `value` equals."""
    with suppress(ValueError, RuntimeError):  # of an array or tensor, whose comparison is one
        for known in choices:
            if value == known:
                return known
    sentence = _sentence(name, f"one of {', '.join(map(str, choices))}", value)
    raise ValueError(sentence + nearest(value, choices))


def nearest(given: Any, names: Iterable[Any]) -> str:
    """The end of a sentence about a name that is none of `names`: the one that is meant, if any."""
    known = {name.lower(): name for name in names if isinstance(name, str)}
    found = difflib.get_close_matches(given.lower(), known, 1) if isinstance(given, str) else []
    return f"; did you mean {known[found[0]]!r}?" if found else ""


def ids(
    name: str,
    value: Tensor | Iterable[int],
    count: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Integers that name samples, as int64 [B]; `count` is B where it is known.

    value: a tensor, an array, or anything ordered that holds integers. device: where they go. By
    default a tensor stays where it is, and others follow PyTorch.
    """
    expected = f"integers [{'B' if count is None else count}], one per sample"
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.dtype != np.uint64:
        value = torch.from_numpy(value.astype(np.int64)).to(device or torch.get_default_device())
    if not isinstance(value, Tensor):
        one = isinstance(value, np.ndarray) and value.ndim == 0
        unordered = isinstance(value, str | bytes | Set | Mapping)
        if one or unordered or not isinstance(value, Iterable):
            raise TypeError(_sentence(name, expected, value))
        checked = [_id(f"each of {name}", item) for item in value]
        value = torch.tensor(checked, dtype=torch.int64, device=device)
    elif value.dtype not in ID_DTYPES:
        raise TypeError(_tensor_sentence(name, expected, value))
    if value.ndim != 1 or count not in (None, len(value)):
        raise ValueError(_tensor_sentence(name, expected, value))
    return value.to(device=device, dtype=torch.int64)


def _id(name: str, value: Any) -> int:
    if type(value) is int and -(2**63) <= value <= MAX_INT64:
        return value
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in ID_DTYPES:
        return int(value)
    return integer(name, value, -(2**63), MAX_INT64)


def draw(name: str, value: Any, count: int, device: torch.device) -> int | Tensor:
    """The draw of `count` samples: one integer >= 0, or a tensor int64 [count] of one for each.

    Values of a tensor on another device than the CPU are not looked at (`draw_values`): that waits.
    """
    if not isinstance(value, Tensor):
        return integer(name, value, 0, MAX_INT64)
    if value.dtype != torch.int64 or tuple(value.shape) != (count,):
        raise ValueError(
            _tensor_sentence(name, f"an int or an int64 tensor [{count}], one per sample", value)
        )
    if value.device.type == "cpu":
        draw_values(name, value)
    return value.to(device)


def draw_values(name: str, value: Tensor) -> None:
    """No draw of the tensor is negative; waits for its device."""
    if bool((value < 0).any()):
        raise ValueError(_sentence(f"each of {name}", "an int of at least 0", int(value.min())))


def _sentence(name: str, expected: str, value: Any) -> str:
    return f"{name} must be {expected}, got {reprlib.repr(value)}"


def _tensor_sentence(name: str, expected: str, value: Tensor) -> str:
    return f"{name} must be {expected}, got {value.dtype} {list(value.shape)}"


def _bound(value: int) -> str:
    """2^64 - 1 says more than 18446744073709551615."""
    power = value + 1 if value > 0 else -value
    if power < 2**20 or power & (power - 1):
        return str(value)
    text = f"2^{power.bit_length() - 1}"
    return f"{text} - 1" if value > 0 else f"-{text}"
