"""Whole training runs: data and task to a weights file with its facts.

This is what `coup-fast train` calls. Data are divided in data.py, networks and defaults chosen in
recipes.py, losses are in dsm.py and classifier.py, the loop in trainer.py, what is reported in
measures.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.data import Source
from coup_fast.evaluation.distributed import local_device, world
from coup_fast.evaluation.sources import tensor_digest
from coup_fast.models.conv_net import ConvNet
from coup_fast.models.naf_net import NAFNet
from coup_fast.models.network_files import (
    build_network,
    load_network,
    network_arguments,
    save_network,
)
from coup_fast.models.unet import UNet
from coup_fast.training import measures
from coup_fast.training.batches import as_pixels
from coup_fast.training.checkpoint import averaged_network, is_checkpoint
from coup_fast.training.classifier import classifier_loss, shifted
from coup_fast.training.data import TrainingData, load_data
from coup_fast.training.dsm import VPNoise, ncsn_loss, vp_loss
from coup_fast.training.log import Log
from coup_fast.training.recipes import RECIPES, Recipe, recipe_for
from coup_fast.training.trainer import Objective, Trainer
from coup_fast.training.transfer import ncsn_from_vp

INIT_TIME = 0.1  # whose denoiser an NCSN network starts from with `init`
LOGGED = 256  # held-out images that a log measures
_LATER = "What the last checkpoint holds is kept: run the same command again to go on."
_KINDS = {"score": "eps", "ncsn": "ncsn", "classifier": "classifier"}
_NAMES = {  # of the kinds of files, in errors
    "eps": "a VP score network",
    "score": "a VP energy network",
    "ncsn": "an NCSN",
    "classifier": "a classifier",
}


def train(
    task: str,
    source: Source,
    out: Path,
    *,
    overrides: dict[str, Any] | None = None,
    network: str | None = None,
    arguments: dict[str, Any] | None = None,
    energy: bool = False,
    large: bool = False,
    init: Path | None = None,
    flip: bool | None = None,
    log: Path | None = None,
    log_every: int = 0,
    device: torch.device | str = "cpu",
    save_every: float = 60.0,
    half: bool = False,
    progress: bool = True,
    timeout: float = 1800.0,
) -> dict[str, Any] | None:
    """Run one task from data to `out` (safetensors) and return the facts stored with it.

    Under torchrun the processes share each batch; the first one writes, and the others return None.

    Args:
        task: "score" (VP), "ncsn" (ADP) or "classifier".
        source: the images, see `load_data`.
        out: weights file; the checkpoint is `out` + ".checkpoint" and is resumed if present.
        overrides: fields of `TrainConfig` that replace the recipe's.
        network: class of the network in place of the recipe's.
        arguments: of that class, in place of the recipe's.
        energy: train a scalar `EnergyUNet` by the same loss.
        large: the recipe for a GPU instead of the one for a processor.
        init: weights file to start from, or a training's checkpoint, of which the averaged weights
            count: a network of this task, whose class and arguments the run takes over, or for
            "ncsn" a trained VP network, see `ncsn_from_vp`.
        flip: mirror half of the images; default: the recipe's choice for CIFAR-10, no for others.
        log: folder for numbers and strips of pictures while it runs, see `Log`.
        log_every: steps between two of its entries; 0: a twentieth of all.
        half: store float16 weights.
        timeout: seconds that processes wait for each other.
    """
    with world(timeout, torch.device(device), _LATER) as ranks:
        device = local_device(torch.device(device))
        data = load_data(source, task)
        recipe = recipe_for(source.name, task, network, data.shape, data.train.num_classes, large)
        if energy and recipe.network != "UNet":
            raise ValueError("energy is for the network UNet.")
        config = replace(recipe.config, **(overrides or {}))
        if "batch_size" not in (overrides or {}):
            config = replace(config, batch_size=min(config.batch_size, len(data.train.images)))
        name = "EnergyUNet" if energy else recipe.network
        chosen = {**recipe.arguments, **(arguments or {})}
        _check_arguments(recipe.network, arguments or {})
        kind = "score" if energy and task == "score" else _KINDS[task]
        flip = source.name == "cifar10" if flip is None else flip
        config = replace(config, alternating_flip=config.alternating_flip and flip)
        facts: dict[str, Any] = {"kind": kind, **_facts_of(source, task, data, flip)}
        if task == "score" and recipe.vp.t_max < 1.0:
            facts["t_max"] = recipe.vp.t_max
        if init is not None:
            given = {**(arguments or {}), "in_channels": data.shape[0]}
            if task == "classifier":
                given["num_classes"] = data.train.num_classes
            own = name if network or energy else None
            model = initialised(init, task, kind, own, given)
            name, chosen = type(model).__name__, model.config  # type: ignore[assignment]
            if config.momentum is not None and "learning_rate" not in (overrides or {}):
                raise ValueError(
                    f"init: the recipe's learning rate of {config.learning_rate:g} is that of a "
                    "new network and destroys a trained one: give learning_rate, such as 0.01"
                )
            facts["init"] = hashlib.sha256(init.read_bytes()).hexdigest()
        else:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                model = build_network(name, chosen)
            if isinstance(model, ConvNet):
                model.whiten_patches(as_pixels(data.train.images[:5000]))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        called = _callable_network(model, energy or name == "EnergyUNet")
        _check_fits(called, name, data.shape)
        labels = data.train.labels
        if labels is None:
            labels = torch.zeros(len(data.train.images), dtype=torch.int64)
        written = None if log is None or ranks.rank else _log(log, kind, recipe, data)
        trainer = Trainer(
            called,
            _objective(task, kind, recipe, flip, config.alternating_flip),
            data.train.images,
            labels,
            config,
            checkpoint=out.with_name(out.name + ".checkpoint"),
            identity={"network": name, "arguments": json.dumps(chosen), **facts},
            device=device,
            save_every=save_every,
            progress=progress,
            watch=None if written is None else written.write,
            watch_every=log_every or max(1, config.steps // 20),
            ranks=ranks,
        )
        if written is not None:
            written.resume(trainer.state.step)
        averaged = trainer.run()
        if ranks.rank != 0:
            return None
        facts["training"] = {**asdict(config), "bfloat16": trainer.bfloat16}
        facts["seconds"] = round(trainer.state.seconds)
        facts["loss"] = trainer.state.history[-1][1]
        facts["report"] = measures.final_report(kind, recipe, averaged, data)
        plain = averaged.network if called is not model else averaged
        assert isinstance(plain, nn.Module)
        save_network(out, plain, facts, torch.float16 if half else torch.float32)
        return facts


def _facts_of(source: Source, task: str, data: TrainingData, flip: bool) -> dict[str, Any]:
    """What the file says about its data; for a user's own, so much that no other set fits."""
    name = source.name if source.folder or ":" in source.name else Path(source.name).name
    facts: dict[str, Any] = {"dataset": name, "images": len(data.train.images)}
    if (source.name, task) in RECIPES:
        return facts
    tensors = [x for x in (data.train.images, data.train.labels) if x is not None]
    facts |= {"data": tensor_digest(*tensors), "size": list(data.shape[1:]), "flip": flip}
    if data.train.classes:
        facts["classes"] = list(data.train.classes)
    return facts


def _check_arguments(network: str, arguments: dict[str, Any]) -> None:
    known = network_arguments(network)
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"a {network} has no {unknown[0]!r}; it takes {', '.join(known)}")


@torch.no_grad()
def _check_fits(network: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
    """One call, so that a network that cannot take the images says so before the training."""
    network.eval()
    try:
        network(
            torch.zeros(1, *shape), *([] if name in ("ConvNet", "Classifier") else [torch.ones(1)])
        )
    except (ValueError, RuntimeError) as error:
        text = "x".join(map(str, shape))
        raise ValueError(
            f"a {name} of these arguments cannot take images of {text} (channels x height x "
            f"width): {' '.join(str(error).split())}"
        ) from error


def initialised(
    init: Path,
    task: str,
    kind: str,
    name: str | None,
    given: dict[str, Any],
) -> nn.Module:
    """The network in the file `init`, to go on with; for "ncsn" also made of a VP network.

    name: the class that was asked for, if any. given: arguments that it must have.
    Raises ValueError if the file does not fit.
    """
    trained, described = _stored(init)
    moved = task == "ncsn" and described["kind"] == "eps" and kind == "ncsn"
    if described["kind"] != kind and not moved:
        held = _NAMES.get(described["kind"], f"a {described['kind']} network")
        also = f" or {_NAMES['eps']}" if task == "ncsn" and kind == "ncsn" else ""
        raise ValueError(f"init: {init} holds {held}; {_NAMES[kind]}{also} is needed.")
    if name is not None and type(trained).__name__ != name:
        raise ValueError(
            f"init: {init} holds a {type(trained).__name__}, and {name} was asked for."
        )
    config: dict[str, Any] = trained.config  # type: ignore[assignment]
    wanted = {**given, "time_conditioned": True} if moved else given
    differing = {k: (config.get(k), v) for k, v in wanted.items() if config.get(k) != v}
    if differing:
        words = ", ".join(f"{k} {old!r}, here {new!r}" for k, (old, new) in differing.items())
        raise ValueError(f"init: {init} holds another network than this run needs: {words}.")
    if not moved:
        return trained
    if not isinstance(trained, UNet | NAFNet):
        raise ValueError(
            f"init: an ncsn network starts from a UNet or NAFNet, and {init} holds another."
        )
    return ncsn_from_vp(trained, VPNoise(), INIT_TIME)


def _stored(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a weights file, or the averaged one of a training's checkpoint."""
    training = path.suffix == ".checkpoint" or is_checkpoint(path)
    return averaged_network(path) if training else load_network(path)


def _callable_network(network: nn.Module, energy: bool) -> nn.Module:
    if not energy:
        return network
    from coup_fast.score_model import EnergyModel

    return EnergyModel(network)


def _objective(
    task: str, kind: str, recipe: Recipe, flip: bool, flipped: bool = False
) -> Objective:
    """The loss of a task. flip: whether images are mirrored; flipped: and arrive so."""
    if task == "classifier":
        smoothing = 0.1 if flip else 0.0
        return functools.partial(classifier_loss, flip=flip and not flipped, smoothing=smoothing)

    def score_loss(
        network: nn.Module,
        images: Tensor,
        _: Tensor,
        rng: torch.Generator,
        rows: slice = slice(None),
    ) -> Tensor:
        x = shifted(images, rng, reach=0, flip=True) if flip and not flipped else images
        if task == "ncsn":
            return ncsn_loss(network, x, rng, recipe.ncsn, rows)
        return vp_loss(network, x, rng, recipe.vp, kind, rows)

    return score_loss


def _log(folder: Path, kind: str, recipe: Recipe, data: TrainingData) -> Log:
    def measure(network: nn.Module) -> dict[str, float]:
        return measures.running_report(kind, recipe, network, data, LOGGED)

    def draw(network: nn.Module) -> Tensor:
        return measures.strip(kind, recipe, network, data.held_out.images)

    return Log(folder, measure, None if kind == "classifier" else draw)
