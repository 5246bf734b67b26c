"""Fast and exact adversarial purification for PyTorch.

    clean = coup_fast.purify(images, score_model, classifier, method="coup")

images are floats [B, C, H, W] in [0, 1]. `load_bundled()` returns a score model and a classifier to
try it on, and `ScoreModel` takes a network of yours. `Purifier` and `PurifiedClassifier` keep the
models and options of such calls, and `methods` names the methods. `_EXPORTS` and `_SUBMODULES` list
the public surface. A module is imported when its name is first used, so importing coup_fast costs
next to nothing beyond torch itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from coup_fast import _extension
from coup_fast._extension import build_info
from coup_fast._version import __version__

if TYPE_CHECKING:  # for type checkers and editors; at run time a name is imported when it is used
    from coup_fast import methods, noise, ops, reference
    from coup_fast.attacks.eot import eot_gradient
    from coup_fast.benchmarking.fast_setting import fast_setting
    from coup_fast.gradient_check import check_gradient
    from coup_fast.models.bundled import load_bundled
    from coup_fast.purified_classifier import PurifiedClassifier
    from coup_fast.purifier import Purifier, purify
    from coup_fast.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, VPSchedule
    from coup_fast.score_model import EnergyModel, ScoreModel

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {
    "DiscreteSchedule": "coup_fast.schedules",
    "EDMSchedule": "coup_fast.schedules",
    "EnergyModel": "coup_fast.score_model",
    "FlowSchedule": "coup_fast.schedules",
    "PurifiedClassifier": "coup_fast.purified_classifier",
    "Purifier": "coup_fast.purifier",
    "ScoreModel": "coup_fast.score_model",
    "VPSchedule": "coup_fast.schedules",
    "check_gradient": "coup_fast.gradient_check",
    "eot_gradient": "coup_fast.attacks.eot",
    "fast_setting": "coup_fast.benchmarking.fast_setting",
    "load_bundled": "coup_fast.models.bundled",
    "purify": "coup_fast.purifier",
}

# Public packages and modules, `coup_fast.attacks` without an import of it too.
_SUBMODULES = (
    "app",
    "attacks",
    "benchmarking",
    "cli",
    "data",
    "evaluation",
    "files",
    "gradient_check",
    "integrations",
    "malloc",
    "methods",
    "models",
    "noise",
    "ops",
    "options",
    "plan",
    "reference",
    "schedules",
    "stiffness",
    "training",
)

__all__ = [
    "DiscreteSchedule",
    "EDMSchedule",
    "EnergyModel",
    "FlowSchedule",
    "PurifiedClassifier",
    "Purifier",
    "ScoreModel",
    "VPSchedule",
    "__version__",
    "build_info",
    "check_gradient",
    "eot_gradient",
    "fast_setting",
    "load_bundled",
    "methods",
    "noise",
    "ops",
    "purify",
    "reference",
]

_extension.load()


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"coup_fast.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'coup_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
