"""The networks of an evaluation: each pair is loaded once, for all defences that name it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from coup_fast.evaluation.fingerprints import fingerprint
from coup_fast.evaluation.sources import ModelLoader, model_loader
from coup_fast.run import validation
from coup_fast.score_model import ClassifierFunction, ScoreModel


class Networks:
    """Score models and classifiers by the name that defences give them, loaded at first need.

    Args:
        load: the loader for defences that name no models.
        name: of those models, for errors.
        images: [N, C, H, W], which the networks have to take.
        device: where the models go that defences name.
    """

    def __init__(self, load: ModelLoader, name: str, images: Tensor, device: torch.device) -> None:
        self._loaders, self._default, self._images, self._device = {"": load}, name, images, device
        self._pairs: dict[str, dict[str, tuple[ScoreModel, ClassifierFunction]]] = {}
        self._fingerprints: dict[str, dict[str, Any]] = {}

    def of(self, models: str, score: str) -> tuple[ScoreModel, ClassifierFunction]:
        """The score model ("vp" or "ncsn") and the classifier of these models; "": the default.

        A classifier that both score models come with is one object, so that what was found of it
        holds for all.

        Raises ValueError for networks of other channels than the images', and what `model_loader`
        and its loader raise.
        """
        pairs, known = self._pairs.setdefault(models, {}), self._fingerprints.setdefault(models, {})
        if score in pairs:
            return pairs[score]
        if models not in self._loaders:
            self._loaders[models] = model_loader(models, self._device)
        score_model, classifier = self._loaders[models](score)
        self._check_channels(models or self._default, score_model, classifier)
        own = fingerprint(classifier)
        for other, (_, its_classifier) in pairs.items():
            if known[other]["classifier"] == own:
                classifier = its_classifier
        known[score] = {"score_model": fingerprint(score_model), "classifier": own}
        pairs[score] = score_model, classifier
        return pairs[score]

    def _check_channels(
        self, models: str, score_model: ScoreModel, classifier: ClassifierFunction
    ) -> None:
        for name, network in (("classifier", classifier), ("score model", score_model.network)):
            try:
                validation.check_channels(name, network, self._images)
            except ValueError as error:
                raise ValueError(f"models {models!r}: {error}") from error

    def loader_code(self, models: str = "") -> dict[str, str]:
        """Digests of the code that loads these models."""
        code: dict[str, str] = fingerprint(inspect.unwrap(self._loaders[models]))["code"]
        return code

    def identity(self) -> dict[str, Any]:
        """Fingerprints of all that was loaded, by score model; what defences name, by its name."""
        named = {
            models: {"loader": self.loader_code(models), **found}
            for models, found in self._fingerprints.items()
            if models
        }
        return self._fingerprints.get("", {}) | ({"named": named} if named else {})
