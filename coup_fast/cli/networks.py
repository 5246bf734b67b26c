"""Networks that a command runs on: a bundled set, or the user's own files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast.cli.common import CommandError, plain_errors
from coup_fast.files import FileError, reading

if TYPE_CHECKING:
    import torch
    from torch import nn

    from coup_fast import ScoreModel

# --score-format: module and function of the loader, and whether it takes a configuration.
FORMATS = {
    "coup-fast": ("coup_fast.models.network_files", "load_network", False),
    "score-sde": ("coup_fast.models.score_sde", "load_score_sde", True),
    "guided-diffusion": ("coup_fast.models.guided_diffusion", "load_guided_diffusion", True),
    "edm": ("coup_fast.models.edm", "load_edm", True),
    "ddpm": ("coup_fast.models.ddpm", "load_ddpm", False),
    "lucidrains": ("coup_fast.models.lucidrains", "load_lucidrains", False),
    "ncsnv2": ("coup_fast.models.ncsnv2", "load_ncsnv2", False),
    "diffusers": ("coup_fast.models.diffusers_pipelines", "load_diffusers", False),
}


# Channels, height and width of the images each bundled set takes.
IMAGE_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@dataclass(frozen=True)
class Networks:
    """What a purifier is made of, and the images that it takes.

    size: height and width; None: the networks' files do not say.
    """

    score_model: ScoreModel
    classifier: nn.Module | None
    channels: int
    size: tuple[int, int] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name the networks."""
    add = parser.add_argument
    add(
        "--bundled",
        default="mnist",
        metavar="NAME",
        help="bundled models: mnist (default) or cifar10",
    )
    add("--score", type=Path, metavar="PATH", help="your score network, in place of a bundled one")
    add(
        "--score-format",
        choices=list(FORMATS),
        help="what --score is: a file of coup-fast train (the default for .safetensors), a folder "
        "of diffusers (the default for folders), or a checkpoint of score_sde (DiffPure's and "
        "COUP's for CIFAR-10), guided-diffusion, EDM, DDPM (ermongroup's, pesser's), lucidrains or "
        "NCSNv2",
    )
    add("--score-config", metavar="NAME", help="configuration that its loader takes")
    add(
        "--classifier",
        metavar="FILE|NAME",
        help="your classifier: a file of coup-fast train, robustbench:NAME or timm:NAME",
    )
    add(
        "--size",
        type=image_size,
        metavar="HxW",
        help="image size of the networks, such as 32 or 28x32, where their files do not say it",
    )


def image_size(text: str) -> tuple[int, int]:
    """argparse type: "32" or "28x32" as height and width."""
    words = text.lower().split("x")
    parts = [int(word) if word.isdecimal() else 0 for word in words]
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"must be a size as 32 or 28x32, got {text!r}")
    return parts[0], parts[-1]


def load(args: argparse.Namespace, device: torch.device) -> Networks:
    """The networks that the options name, in eval mode on `device`."""
    if args.score is None:
        for option in ("score_format", "score_config"):
            if getattr(args, option) is not None:
                raise CommandError(f"--{option.replace('_', '-')} is about a file: give --score")
        score_model, classifier = load_bundled(args.bundled, args.method, device)
        channels, *size = IMAGE_SHAPES[args.bundled]
        if args.classifier is not None:
            classifier = _classifier(args.classifier, device)
        return Networks(score_model, classifier, channels, args.size or (size[0], size[1]))
    score_model = _score_model(args.score, args.score_format, args.score_config).to(device)
    own = None if args.classifier is None else _classifier(args.classifier, device)
    channels = score_model.in_channels or 3
    size_of = (_declared_size(network) for network in (own, score_model.network))
    return Networks(score_model, own, channels, args.size or next(filter(None, size_of), None))


def load_bundled(name: str, method: str, device: torch.device) -> tuple[ScoreModel, nn.Module]:
    """The bundled score model that a method takes, and the classifier, on `device`."""
    from coup_fast.models import bundled

    try:
        return bundled.load_bundled(name, score=bundled.score_for(method), device=device)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error


def _score_model(path: Path, kind: str | None, config: str | None) -> ScoreModel:
    from coup_fast import ScoreModel

    if not path.exists():
        raise CommandError(f"{path} does not exist")
    if kind is None:
        if not path.is_dir() and path.suffix != ".safetensors":
            others = ", ".join(name for name in FORMATS if name not in ("coup-fast", "diffusers"))
            raise CommandError(f"{path}: say what it is with --score-format ({others})")
        kind = "diffusers" if path.is_dir() else "coup-fast"
    module, function, configurable = FORMATS[kind]
    if config is not None and not configurable:
        raise CommandError(f"--score-format {kind} takes no --score-config")
    loader = getattr(import_module(module), function)
    loaded = _read(loader, path, *([] if config is None else [config]))
    if isinstance(loaded, ScoreModel):
        return loaded
    network, facts = loaded
    if facts.get("kind", "classifier") == "classifier":
        raise CommandError(f"{path} holds a {facts['network']}, which is no score network")
    with plain_errors(), reading(path, "a score network"):
        return ScoreModel(network, kind=facts["kind"], t_max=facts.get("t_max")).eval()


def _classifier(source: str, device: torch.device) -> nn.Module:
    if source.partition(":")[0] in ("robustbench", "timm"):
        from coup_fast.models.robustbench_timm import load_classifier

        named: nn.Module = _read(load_classifier, source).to(device)
        return named
    from coup_fast.models.network_files import load_network

    if not Path(source).exists():
        raise CommandError(f"{source} does not exist")
    network, facts = _read(load_network, Path(source))
    if facts.get("kind", "classifier") != "classifier":
        raise CommandError(
            f"{source} holds a score network ({facts['kind']}), which is no classifier"
        )
    classifier: nn.Module = network.to(device)
    return classifier


def _read(loader: Any, path: Path | str, *rest: str) -> Any:
    """What a loader makes of a file or a name; its objections as one sentence."""
    try:
        with reading(path, "a network"):
            return loader(path, *rest)
    except (FileError, ImportError, FileNotFoundError) as error:
        raise CommandError(" ".join(str(error).split())) from error


def _declared_size(network: Any) -> tuple[int, int] | None:
    """The image size that a network's configuration names, or None."""
    config = getattr(network, "config", None)
    for name in ("size", "image_size", "sample_size"):
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if isinstance(value, int):
            return value, value
    return None
