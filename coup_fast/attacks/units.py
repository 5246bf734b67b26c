"""Norms and lengths as people write them: "Linf", inf, "L2"; 8/255, "8/255".

Everything that an attack is told passes through here once, so that 8 of 255 grey levels is never
taken for 8 times the whole range of a pixel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from coup_fast import checks
from coup_fast.attacks.ball import NORMS
from coup_fast.run.warn import warn

_SPELLINGS = {
    "linf": ("linf", "inf", "infinity", "linfinity", "l∞", "ℓ∞", "∞"),
    "l2": ("l2", "2", "2.0", "ℓ2", "ℓ₂", "l₂", "euclidean"),
}
_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*"
_FRACTION = re.compile(rf"{_NUMBER}(?:/{_NUMBER})?", re.IGNORECASE)


def norm(value: Any) -> str:
    """ "linf" or "l2". Takes other spellings, and numbers: math.inf, 2. Raises ValueError."""
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    spelling = re.sub(r"[\s_-]", "", str(value)).lower() if plain else None
    for name, spellings in _SPELLINGS.items():
        if spelling in spellings:
            return name
    return checks.choice("norm", value, NORMS)


def number(name: str, value: Any) -> Any:
    """The number that a text such as "8/255" or "0.03" stands for; other values as they are.

    Raises TypeError for a text that is no number, ValueError for a division by 0.
    """
    if not isinstance(value, str):
        return value
    match = _FRACTION.fullmatch(value)
    if match is None or (match[2] is not None and float(match[2]) == 0):
        error = TypeError if match is None else ValueError
        raise error(f'{name} must be a number or a fraction such as "8/255", got {value!r}')
    return float(match[1]) / float(match[2] or 1)


def numbers(name: str, value: Any) -> Any:
    """The same for each value of a list or tuple."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [number(f"each of {name}", one) for one in value]
    return number(name, value)


def length(name: str, value: Any, norm: str) -> float:
    """A length > 0 in pixels of [0, 1]; for "linf" at most 1. Raises TypeError or ValueError."""
    result = checks.number(name, number(name, value), 0, math.inf, above=True)
    if norm == "linf" and result > 1:
        raise ValueError(
            f"{name} must be in (0, 1], in pixels of [0, 1], got {value!r}{_in_bytes(result)}"
        )
    return result


def check_radius(eps: float, norm: str, numel: int) -> None:
    """Whether an ℓ2 ball is smaller than all images of `numel` pixels. ValueError if not.

    Warns of one that lets a pixel change by a quarter of its range, in the root mean square.
    """
    if norm != "l2" or numel == 0:
        return
    whole = math.sqrt(numel)
    if eps >= whole:
        raise ValueError(
            f"eps = {eps:g} in the ℓ2 norm holds every image of {numel} values in [0, 1] (it must "
            f"be below {whole:.4g}){_in_bytes(eps)}"
        )
    if eps > whole / 4:
        warn(
            f"eps = {eps:g} in the ℓ2 norm lets each of {numel} values change by "
            f"{eps / whole:.2g} of its range, in the root mean square{_in_bytes(eps)}"
        )


def _in_bytes(value: float) -> str:
    return f'; {value:g} of 255 grey levels is {value:g} / 255 (or "{value:g}/255")'
