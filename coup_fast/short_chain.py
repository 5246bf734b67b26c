"""Purifiers with fewer steps than the one they come from: for self-tests and for measurements."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from coup_fast import methods
from coup_fast.graphs import Graphs
from coup_fast.options import attribute_of
from coup_fast.plan import OUT_BIAS, OUT_HI, OUT_LO, OUT_SCALE, AdaptivePlan, Plan
from coup_fast.purifier import Purifier


def _with_plan(purifier: Purifier, plan: Plan | AdaptivePlan, **options: Any) -> Purifier:
    """The same models and seed under another plan, with other options of the purifier."""
    other = copy.copy(purifier)
    other.plan = plan
    other._tables = {}
    other._graphs = Graphs()
    for name, value in options.items():
        setattr(other, attribute_of(name), value)
    return other


def with_options(purifier: Purifier, **options: Any) -> Purifier:
    """The same purifier with other values of its own options (`gradient`, `states`, …)."""
    return _with_plan(purifier, purifier.plan, **options)


def first_steps(purifier: Purifier, steps: int) -> Purifier:
    """The purifier's first `steps` rows (all, if it has fewer), then its way back to pixels."""
    plan = purifier.plan
    if isinstance(plan, AdaptivePlan):
        return _with_plan(purifier, replace(plan, coeffs=plan.coeffs[:steps]))
    coeffs = plan.coeffs[:steps].copy()
    way_back = [OUT_LO, OUT_HI, OUT_SCALE, OUT_BIAS]
    coeffs[-1, way_back] = plan.coeffs[-1, way_back]
    short = replace(
        plan,
        coeffs=coeffs,
        times=plan.times[:steps],
        guided=plan.guided[:steps],
        noisy=plan.noisy[:steps],
    )
    return _with_plan(purifier, short)


def longer_steps(purifier: Purifier, steps: int) -> Purifier:
    """The method over the same times in `steps` steps, where it has that option; else its first."""
    if isinstance(purifier.plan, AdaptivePlan) or purifier.plan.num_steps <= steps:
        return first_steps(purifier, steps)
    if "num_steps" not in methods.options(purifier.method):
        return first_steps(purifier, steps)
    model = purifier.score_model
    options = {key: value for key, value in purifier.options.items() if key != "step_size"}
    options["num_steps"] = steps
    plan = methods.plan(purifier.method, model.schedule, model.kind, **options)
    return _with_plan(purifier, plan)
