"""The weights that come with the package, and the settings that suit them.

`weights/MODEL_CARD_<set>.md` says how they were trained and what they reach. Needs torch and
safetensors.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coup_fast import checks
from coup_fast.models.network_files import load_network
from coup_fast.score_model import ScoreModel

WEIGHTS = Path(__file__).parent / "weights"

# SHA-256 of each file in WEIGHTS.
CHECKSUMS = {
    "mnist_vp.safetensors": ("17e1a4745a02388f9fea50ae5326a1289418b91581da870f4eee00b481acd8b4"),
    "mnist_ncsn.safetensors": ("eb35f5e823655acf00c46c2e7822203aaeb11b9ad062d5d1406e7a8587252320"),
    "mnist_classifier.safetensors": (
        "2fad9a3d89acca61410234527a8c98692578ee0e39e8af9a09fe51081c428cf2"
    ),
    "cifar10_vp.safetensors": ("9bf29a91bf3387b56cb2e090e6c6973b1c923a34b4a8d72d7340f6746d8ce1ec"),
    "cifar10_ncsn.safetensors": (
        "18fba6af7fcb44c310ba11f271fa67af969543d5d45c686256125c5fb78553c4"
    ),
    "cifar10_classifier.safetensors": (
        "5fecc655fd0765214e9d0e50cea49cf7471d833655756029190ce2f9775070bd"
    ),
}
SCORES = ("vp", "ncsn")

# Chosen under an l-infinity PGD attack on the classifier alone, on images that neither training nor
# a report has seen; the methods' own defaults stay as published for CIFAR-10. The model card says
# what was tried.
_SETTINGS: dict[str, dict[str, Any]] = {
    # COUP and DiffPure keep the published time and 100 Euler steps; ADP takes less noise and longer
    # steps than published.
    "mnist": {
        "epsilon": 0.15,
        "attack_steps": 40,
        "methods": {
            "coup": {"t_star": 0.1},
            "diffpure": {"t_star": 0.1},
            "adp": {"sigma": 0.1, "step_lambda": 0.5},
        },
    },
    # Half of the published time, ten steps of the exponential solver; ADP as for MNIST.
    "cifar10": {
        "epsilon": 8 / 255,
        "attack_steps": 40,
        "methods": {
            "coup": {"t_star": 0.05, "num_steps": 10, "solver": "exponential"},
            "diffpure": {"t_star": 0.05, "num_steps": 10, "solver": "exponential"},
            "adp": {"sigma": 0.1, "step_lambda": 0.5},
        },
    },
}
BUNDLED = tuple(_SETTINGS)
"""The names that `load_bundled` takes."""


def load_bundled(
    name: str = "mnist", *, score: str = "vp", device: torch.device | str = "cpu"
) -> tuple[ScoreModel, nn.Module]:
    """Load the bundled score model and the classifier it defends, in eval mode and float32.

    Args:
        name: "mnist" or "cifar10".
        score: which score network: "vp" predicts the noise of the VP-SDE, for every method but
            ADP; "ncsn" is the unconditional NCSNv2 network for ADP.
        device: where both models go.

    Returns:
        (score_model, classifier). The classifier maps pixels in [0, 1], [B, 1, 28, 28] or
        [B, 3, 32, 32], to logits [B, 10].

    Raises:
        ValueError: the name or score is unknown.
        RuntimeError: a weights file is damaged.
        ImportError: safetensors is missing.
    """
    _check_name(name)
    checks.choice("score", score, SCORES)
    network, facts = _load(f"{name}_{score}.safetensors")
    classifier, _ = _load(f"{name}_classifier.safetensors")
    score_model = ScoreModel(network, kind=facts["kind"], t_max=facts.get("t_max"))
    return score_model.eval().to(device), classifier.to(device)


def score_for(method: str) -> str:
    """Which score network a method takes: ADP an NCSN, the others a diffusion model."""
    return "ncsn" if method == "adp" else "vp"


def bundled_settings(name: str = "mnist") -> dict[str, Any]:
    """The settings that suit a bundled set, chosen on validation images.

    `epsilon` and `attack_steps` are those of the weak attack. `methods` maps a method's name to
    the options chosen for it.

    Raises:
        ValueError: the name is unknown.
    """
    _check_name(name)
    return copy.deepcopy(_SETTINGS[name])


def describe_bundled(name: str = "mnist") -> dict[str, dict[str, Any]]:
    """How each file was trained: the network, the settings, seconds, and losses or accuracy.

    Raises ValueError for an unknown name.
    """
    _check_name(name)
    return {file: _load(file)[1] for file in CHECKSUMS if file.startswith(f"{name}_")}


def _check_name(name: str) -> None:
    if name not in _SETTINGS:
        known = f"there is {', '.join(BUNDLED)}{checks.nearest(name, BUNDLED)}"
        raise ValueError(f"there is no bundled model {name!r}; {known}")


def _load(file: str) -> tuple[nn.Module, dict[str, Any]]:
    path = WEIGHTS / file
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != CHECKSUMS[file]:
        raise RuntimeError(
            f"{path} is damaged: SHA-256 {digest}, expected {CHECKSUMS[file]}; reinstall coup-fast."
        )
    try:
        return load_network(path)
    except ImportError as error:
        raise ImportError(
            "the bundled models need safetensors: pip install 'coup-fast[models]'"
        ) from error
