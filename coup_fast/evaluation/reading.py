"""Values of a configuration, as a TOML file gives them: each is checked where it is read.

Every function raises TypeError or ValueError that names the place, what was given and what it
should have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def known(section: str, given: Any, names: Iterable[str]) -> dict[str, Any]:
    """A copy of a table, all of whose keys are among `names`."""
    names = list(names)
    result = table(section, given)
    unknown = [key for key in result if key not in names]
    if unknown:
        raise ValueError(f"{section} has no {', '.join(map(repr, unknown))}; it takes {names}")
    return result


def table(section: str, given: Any) -> dict[str, Any]:
    """A copy of a table."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{section} must be a table, got {given!r}")
    return dict(given)


def tables(name: str, given: Any) -> list[Mapping[str, Any]]:
    """The tables of a `[[name]]`."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, Mapping) for one in given):
        raise TypeError(f"{name} must be tables, each under [[{name}]], got {given!r}")
    return list(given)


def count(name: str, value: Any, least: int = 1) -> int:
    """An int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    return value


def texts(name: str, value: Any) -> list[str]:
    """A list of strings."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise TypeError(f"{name} must be a list of strings, got {value!r}")
    return list(value)


def flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def expand(given: Mapping[str, Any], swept: Iterable[str]) -> list[tuple[dict[str, Any], str]]:
    """One dictionary for each value of swept keys that hold a list, and what to call it.

    Values of swept keys are numbers, alone too.
    """
    found: list[tuple[dict[str, Any], str]] = [(dict(given), "")]
    for key in swept:
        if key not in given:
            continue
        value = given[key]
        listed = isinstance(value, list | tuple)
        values = list(value) if listed else [value]
        if not values:
            raise ValueError(f"{key} is an empty list")
        for one in values:
            optional = one is None and not listed  # options of a method may be None
            if isinstance(one, bool) or not (optional or isinstance(one, int | float)):
                raise TypeError(f"{key} must be a number or a list of numbers, got {value!r}")
        if listed:
            symbol = {"t_star": "t*", "guidance_scale": "λ"}.get(key, key)
            found = [
                ({**one, key: number}, f"{name} {symbol}={number:g}")
                for one, name in found
                for number in values
            ]
    return found
