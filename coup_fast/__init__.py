"""Fused diffusion purification for PyTorch.

    clean = coup_fast.purify(images, score_model, classifier, method="coup")

images: [B, C, H, W] floats in [0, 1]. `load_bundled()` returns a score model and a classifier to
try it on, `ScoreModel` takes a network of yours, `Purifier` and `PurifiedClassifier` keep the
models and options of such calls, `methods` names the methods. The public surface is listed in
`_EXPORTS`; a name's module is imported when the name is first used, so that importing
coup_fast costs next to nothing beyond torch itself.
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
    from coup_fast.gradient_check import check_gradient
    from coup_fast.models.bundled import load_bundled
    from coup_fast.purified_classifier import PurifiedClassifier
    from coup_fast.purifier import Purifier, purify
    from coup_fast.schedules import DiscreteSchedule, EDMSchedule, VPSchedule
    from coup_fast.score_model import EnergyModel, ScoreModel

# Public name -> module that defines it; a submodule stands for itself.
_EXPORTS: dict[str, str] = {
    "DiscreteSchedule": "coup_fast.schedules",
    "EDMSchedule": "coup_fast.schedules",
    "EnergyModel": "coup_fast.score_model",
    "PurifiedClassifier": "coup_fast.purified_classifier",
    "Purifier": "coup_fast.purifier",
    "ScoreModel": "coup_fast.score_model",
    "VPSchedule": "coup_fast.schedules",
    "check_gradient": "coup_fast.gradient_check",
    "eot_gradient": "coup_fast.attacks.eot",
    "load_bundled": "coup_fast.models.bundled",
    "methods": "coup_fast.methods",
    "noise": "coup_fast.noise",
    "ops": "coup_fast.ops",
    "purify": "coup_fast.purifier",
    "reference": "coup_fast.reference",
}

__all__ = [
    "DiscreteSchedule",
    "EDMSchedule",
    "EnergyModel",
    "PurifiedClassifier",
    "Purifier",
    "ScoreModel",
    "VPSchedule",
    "__version__",
    "build_info",
    "check_gradient",
    "eot_gradient",
    "load_bundled",
    "methods",
    "noise",
    "ops",
    "purify",
    "reference",
]

_extension.load()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'coup_fast' has no attribute {name!r}")
    module = importlib.import_module(_EXPORTS[name])
    value = module if _EXPORTS[name] == f"coup_fast.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
