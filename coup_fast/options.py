"""The options of the purifier itself, whatever the method: defaults and what each may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coup_fast import validation
from coup_fast.backends import BACKENDS
from coup_fast.calls import COMPILE_MODES, PRECISIONS
from coup_fast.gradients import GRADIENTS, STATES
from coup_fast.graphs import CUDA_GRAPH
from coup_fast.guidance import GUIDANCE_GRADIENTS


@dataclass(frozen=True)
class Option:
    """default: the value where none is given. choices: all values; None: a count or None."""

    default: Any
    choices: tuple[Any, ...] | None = (True, False)


# All other options go to the method.
PURIFIER_OPTIONS: Mapping[str, Option] = {
    "backend": Option("auto", BACKENDS),
    "gradient": Option("exact", GRADIENTS),
    "states": Option("device", STATES),
    "verify_states": Option(False),
    "guidance_gradient": Option("full", GUIDANCE_GRADIENTS),
    "check_values": Option(True),
    "compile": Option(False, (True, False, *COMPILE_MODES)),
    "cuda_graph": Option("auto", CUDA_GRAPH),
    "precision": Option("fp32", PRECISIONS),
    "channels_last": Option("auto", ("auto", True, False)),
    "max_batch": Option(None, None),
}


def attribute_of(name: str) -> str:
    """The purifier's attribute that holds an option; `nn.Module.compile` is a method."""
    return "compile_networks" if name == "compile" else name


def take_options(options: dict[str, Any]) -> dict[str, Any]:
    """The purifier's own options, removed from `options`, checked, completed by their defaults.

    Raises ValueError listing the choices, TypeError for a count that is no int.
    """
    own = {}
    for name, option in PURIFIER_OPTIONS.items():
        value = own[name] = options.pop(name, option.default)
        if option.choices is not None:
            validation.check_choice(name, value, option.choices)
        elif value is not None:
            validation.check_count(name, value)
    return own
