"""Random arguments: what no argument may be is refused by its name, before any model is called.

`pytest --hypothesis-profile=fuzz` takes other and many more examples.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np
import torch
from helpers.random_runs import RUN_OPTIONS, Classifier, outcome
from helpers.tiny import SHORT, TinyNetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel

EXAMPLES = settings.default.max_examples


def number(low: float, high: float, whole: bool = False) -> Callable[[Any], bool]:
    """Whether a value may be taken for a number in [low, high]."""
    kinds = (int, np.integer) if whole else Real

    def right(value: Any) -> bool:
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and low <= value <= high and value == value and abs(value) < math.inf

    return right


def one_of(*choices: Any) -> Callable[[Any], bool]:
    """Whether a value is equal to a choice: 1 to True, and what NumPy and torch make of either."""

    def right(value: Any) -> bool:
        with contextlib.suppress(ValueError, RuntimeError):  # of several elements
            return any(bool(value == choice) for choice in choices)
        return False

    return right


# What may be taken for each option; everything else is to be refused by the option's name.
METHOD_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "t_star": lambda value: value is None or number(0, 1)(value),
    "num_steps": lambda value: value is None or number(1, 1000, whole=True)(value),
    "step_size": lambda value: value is None or number(1e-5, 1)(value),
    "guidance_scale": number(0, math.inf),
    "guidance_norm": one_of("none", "normalised", "clipped"),
    "guidance_solver": one_of("explicit", "stable"),
    "guidance_max_norm": lambda value: value is None or number(0, math.inf)(value),
    "solver": one_of("euler", "exponential"),
    "variance": one_of("fixed-small", "fixed-large", "learned"),
    "forward_noise": one_of(True, False),
    "clip_denoised": one_of(True, False),
    "clamp_output": one_of(True, False),
    "eta": number(0, 1),
    "rounds": number(1, 1000, whole=True),
    "sigma": lambda value: value is None or number(0, math.inf)(value),
    "tau": number(0, math.inf),
    "not_an_option": lambda value: False,
}
ARGUMENTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "method": METHOD_ARGUMENTS,
    "run": {
        **{name: one_of(*choices) for name, choices in RUN_OPTIONS.items()},
        "compile": one_of(True, False),
        "precision": one_of("fp32"),
        "check_values": one_of(True, False),
        "max_batch": lambda value: value is None or number(1, math.inf, whole=True)(value),
        "seed": number(0, 2**64 - 1, whole=True),
        "method": lambda value: False,
        "classifier": lambda value: value is None or callable(value),
        "score_model": lambda value: False,
    },
    "call": {
        "images": lambda value: False,
        "sample_ids": lambda value: value is None,
        "draw": number(0, 2**63 - 1, whole=True),
        "noise": lambda value: value is None,
    },
    "defence": {
        "num_draws": number(1, 9, whole=True),
        "vote": one_of("logits", "softmax", "majority"),
        "fresh_draws": one_of(True, False),
        "purifier": lambda value: False,
        "classifier": callable,
    },
    "score model": {
        "kind": one_of("eps", "score", "x0", "ncsn"),
        "time_scale": number(1e-30, 1e30),
        "t_max": lambda value: value is None or number(1e-9, 1)(value),
        "network": callable,
        "schedule": lambda value: value is None,
    },
}
JUNK: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.5, math.nan, math.inf, 10**400, 2**64, 2**63),
    *("", "text", "auto", "1", b"bytes", [], [1], (), {}, {"a": 1}, set(), object(), print, type),
    *(np.float64(0.5), np.int64(3), np.array([1.0, 2.0]), np.array("auto"), 1 + 1j),
    *(torch.tensor(1.0), torch.tensor(1), torch.rand(2), torch.rand(2, 3, 8, 8).to("meta")),
    *(torch.rand(2, 3, 8, 8).to_sparse(), nn.Identity(), ScoreModel, Fraction(1, 2), Decimal(1)),
]
ARGUMENT = st.sampled_from([(kind, name) for kind, names in ARGUMENTS.items() for name in names])


def called_with(given: dict[tuple[str, str], Any], method: str, calls: list[int]) -> Any:
    """A good call of a defence, but for these arguments."""
    of = {kind: {n: v for (k, n), v in given.items() if k == kind} for kind in ARGUMENTS}
    network = TinyNetwork(3, pull=6.0 if method == "adp" else 0.0).eval()
    classifier = Classifier(3).eval()
    for module in (network, classifier):
        module.register_forward_hook(lambda *_: calls.append(1))
    score_model = {"network": network, "kind": SHORT[method][0]} | of["score model"]
    purifier = {"score_model": ScoreModel(**score_model), "classifier": classifier}
    purifier |= {"method": method, **SHORT[method][1]} | of["method"] | of["run"]
    defence = {"purifier": Purifier(**purifier), "classifier": classifier} | of["defence"]
    call = {"images": torch.rand(2, 3, 8, 8)} | of["call"]
    defended = PurifiedClassifier(**defence)
    return (defended.purifier if "noise" in call else defended)(**call)


@settings(max_examples=EXAMPLES * 4)
@given(
    st.dictionaries(ARGUMENT, st.sampled_from(JUNK), min_size=1, max_size=2),
    st.sampled_from(["coup", "ddpm", "gdmp", "adp", "one-shot"]),
)
def test_a_wrong_argument_is_named(given: dict[tuple[str, str], Any], method: str) -> None:
    names = [name for _, name in given]
    if all(ARGUMENTS[kind][name](value) for (kind, name), value in given.items()):
        return
    if len(set(names)) < len(names):
        return
    calls: list[int] = []
    result, said = outcome(lambda: called_with(given, method, calls))
    assert result is None, f"{given} is taken"
    error = said[-1]
    assert any(re.search(rf"\b{name.replace('_', '[ _]')}\b", error) for name in names), error
    assert re.match("TypeError|ValueError|RuntimeError", error)
    assert not calls, "a model was called before"
