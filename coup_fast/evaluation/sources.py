"""Images and models of an evaluation, and fingerprints of them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.data import Look, Source, read_images
from coup_fast.evaluation.config import Data
from coup_fast.score_model import ClassifierFunction, ScoreModel

# "vp", or "ncsn" for ADP -> the score model and the classifier that is defended.
ModelLoader = Callable[[str], tuple[ScoreModel, ClassifierFunction]]


def load_images(data: Data) -> tuple[Tensor, Tensor]:
    """images [N, C, H, W] float32 in [0, 1] and labels [N] int64, N = data.images.

    Raises ValueError or TypeError if there are too few or they are not images and labels,
    FileNotFoundError, ImportError.
    """
    found = read_images(Source(data.name, data.folder, Look(data.size, data.color)), data.split)
    images, labels = found.images, found.labels
    if labels is None:
        raise ValueError(
            f"{data.name} has no labels, and an evaluation needs them; in a folder, the pictures "
            "of a class stand in a sub-folder of its name"
        )
    if data.images > len(images):
        raise ValueError(f"{data.name} has {len(images)} images, {data.images} were asked for")
    generator = torch.Generator().manual_seed(data.seed)
    chosen = torch.randperm(len(images), generator=generator)[: data.images]
    images, labels = images[chosen], labels[chosen]
    return images.float() / 255 if images.dtype == torch.uint8 else images.float(), labels.long()


def model_loader(name: str, device: torch.device) -> ModelLoader:
    """The loader that a configuration's `models` names, giving models on `device`.

    Raises ValueError for a name that is none, ImportError if its module cannot be imported. The
    loader raises TypeError if the function returns something else.
    """
    if ":" not in name:
        from coup_fast.models.bundled import load_bundled

        return lambda score: load_bundled(name, score=score, device=device)
    found = named_function("models", name)
    function = name.rpartition(":")[2]

    def load(score: str) -> tuple[ScoreModel, ClassifierFunction]:
        pair = _pair(f"models {name!r}: {function}({score!r}) must return", found(score))
        score_model, classifier = pair
        if isinstance(classifier, nn.Module):
            classifier = classifier.to(device)
        return score_model.to(device), classifier

    load.__wrapped__ = found  # type: ignore[attr-defined]  # whose code is the models' code
    return load


def named_function(what: str, name: str) -> Callable[..., Any]:
    """The function that "module:function" names. what: whose name it is, for errors.

    Raises ImportError if the module cannot be imported, ValueError if it has no such function.
    """
    module, _, function = name.rpartition(":")
    try:
        found = getattr(_module(module), function, None)
    except (ImportError, ValueError) as error:  # an empty module name is a ValueError
        raise ImportError(f"{what} {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{what} {name!r}: {module} has no function {function!r}")
    result: Callable[..., Any] = found
    return result


def foreign_defence(
    name: str, options: Mapping[str, Any], device: torch.device
) -> ClassifierFunction:
    """The defence that "module:function" builds with these options, on `device`.

    Raises what `named_function` does, and TypeError for what cannot be called.
    """
    defended = named_function("method of [[defence]]", name)(**options)
    if not callable(defended):
        raise TypeError(
            f"method of [[defence]] {name!r} must return a module or callable from pixels "
            f"[B, C, H, W] to scores [B, K], got {type(defended).__name__}"
        )
    if isinstance(defended, nn.Module):
        return defended.to(device)
    return defended  # type: ignore[no-any-return]


def given_loader(models: Any) -> ModelLoader:
    """The loader for `models` of `evaluate`: a function, or the pair that it would return.

    Raises TypeError for anything else, and so does the loader for what a function returns.
    """
    if callable(models) and not isinstance(models, nn.Module):

        def load(score: str) -> tuple[ScoreModel, ClassifierFunction]:
            return _pair(f"models({score!r}) must return", models(score))

        load.__wrapped__ = models  # type: ignore[attr-defined]
        return load
    pair = _pair("models must be a function that is called with 'vp' or 'ncsn', or", models)
    return lambda score: pair


def _pair(wanted: str, found: Any) -> tuple[ScoreModel, ClassifierFunction]:
    """`found`, if it is (ScoreModel, classifier). wanted: begins the sentence of the error."""
    parts = tuple(found) if isinstance(found, tuple | list) else ()
    if len(parts) == 2 and isinstance(parts[0], ScoreModel) and callable(parts[1]):
        return parts[0], parts[1]
    given, cure = type(found).__name__, ""
    if parts:
        given = f"({', '.join(type(part).__name__ for part in parts)})"
    if len(parts) == 2 and callable(parts[0]) and not isinstance(parts[0], ScoreModel):
        cure = '; write (coup_fast.ScoreModel(network, kind="eps"), classifier)'
    raise TypeError(f"{wanted} (ScoreModel, classifier), got {given}{cure}")


def _module(name: str) -> ModuleType:
    """The module of that name, or of that file where the name ends in .py. Raises ImportError."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise ImportError(f"{name} is not a file (relative to the current folder)")
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tensor_digest(*tensors: Tensor) -> str:
    """SHA-256 of dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{plain.dtype} {list(plain.shape)} ".encode())
        total.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
