"""Values of a configuration, as a TOML file gives them: each is checked where it is read.

Every function raises TypeError or ValueError that names the place, what was given and what it
should have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coup_fast import checks


def known(section: str, given: Any, names: Iterable[str]) -> dict[str, Any]:
    """A copy of a table, all of whose keys are among `names`."""
    names = list(names)
    result = table(section, given)
    unknown = [key for key in result if key not in names]
    if unknown:
        raise ValueError(
            f"{section} has no {', '.join(map(repr, unknown))}; it takes {names}"
            f"{checks.nearest(unknown[0], names)}"
        )
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
        if value is not None:  # as an option of a method may be
            for one in values:
                checks.number(f"each of {key}" if listed else key, one)
        if listed:
            symbol = {"t_star": "t*", "guidance_scale": "λ"}.get(key, key)
            found = [
                ({**one, key: number}, f"{name} {symbol}={number:g}")
                for one, name in found
                for number in values
            ]
    return found
