"""Classifiers of others as modules from pixels in [0, 1] to logits.

Any `nn.Module` with that convention is a classifier already; this fetches those of RobustBench and
timm by name, where these packages are installed, and fills a given architecture from a file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coup_fast.files import FileError
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.normalized import Normalized
from coup_fast.models.state import (
    State,
    as_state,
    check_fits,
    describe,
    prefixes_of,
    state_keys,
    under,
    unwrapped,
)

PACKAGES = ("robustbench", "timm")


def load_classifier(
    source: str | Path,
    *,
    architecture: nn.Module | Callable[[], nn.Module] | None = None,
    key: str | None = None,
    prefix: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> nn.Module:
    """Load a classifier of pixels in eval mode: [B, C, H, W] in [0, 1] -> logits [B, K].

    Args:
        source: "robustbench:NAME" takes the options of its `load_model` (dataset="cifar10",
            threat_model="Linf", model_dir="./models"); the model normalises inside.
            "timm:NAME" takes the options of `create_model` (pretrained=True by default); mean and
            std come from the model's pretrained_cfg, and images are not resized.
            A path is a `.safetensors` file of `save_network`, or a state dict for `architecture`.
        architecture: for a file, the module to fill, or a function that builds it.
        key: for a file that holds more than a state dict, the entry to take ("a.b" is nested).
        prefix: for a file, take only the names that begin with it ("ema_model."). Prefixes that
            all names have (`module.`, `_orig_mod.`, `model.`, ...) go without it.
        mean: for a file or timm, one number per channel: the network takes (pixels - mean)/std.
        std: goes with mean.
        device: where it goes.
        **options: of RobustBench's `load_model` or timm's `create_model`.

    Raises:
        ImportError: the named package is missing.
        FileNotFoundError: there is no such file.
        ValueError: the name is unknown, an option has no use here, or the file does not fit; the
            message says what was found and expected.
    """
    package, colon, name = str(source).partition(":")
    if colon and package in PACKAGES:
        if any(given is not None for given in (architecture, key, prefix)):
            raise ValueError("architecture, key and prefix are for files")
        load = _robustbench if package == "robustbench" else _timm
        network = load(name, mean, std, options)
    else:
        if options:
            raise ValueError(f"a file takes no option {', '.join(options)}")
        network = _file(Path(source), architecture, key, prefix)
        network = _normalised(network, mean, std)
    return network.eval().to(device)


def _normalised(
    network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    if (mean is None) != (std is None):
        raise ValueError(f"give mean and std together, got mean={mean} and std={std}")
    return network if mean is None or std is None else Normalized(network, mean, std)


def _package(name: str, path: str) -> Any:
    """The module `path` of a package, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise ImportError(
            f"a classifier '{name}:…' needs the package {name} and what it imports "
            f"(pip install {name}); importing {path} failed: {error}"
        ) from error


def _robustbench(
    name: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    options: Mapping[str, Any],
) -> nn.Module:
    if mean is not None or std is not None:
        raise ValueError("RobustBench's models take pixels as they are; leave out mean and std")
    load = _package("robustbench", "robustbench.utils").load_model
    try:
        network: nn.Module = load(model_name=name, **options)
    except KeyError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "its defaults"
        raise ValueError(f"RobustBench has no model {name!r} for {given}") from error
    return network


def _timm(
    name: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    options: Mapping[str, Any],
) -> nn.Module:
    timm = _package("timm", "timm")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() lists them")
    network: nn.Module = timm.create_model(name, **{"pretrained": True, **options})
    if mean is None and std is None:
        config: Any = network.pretrained_cfg
        mean, std = config["mean"], config["std"]
        channels = options.get("in_chans", len(mean))
        if channels != len(mean):
            raise ValueError(
                f"timm:{name} says how to normalise {len(mean)} channels, but in_chans is "
                f"{channels}; give mean and std"
            )
    return _normalised(network, mean, std)


def _file(
    path: Path,
    architecture: nn.Module | Callable[[], nn.Module] | None,
    key: str | None,
    prefix: str | None,
) -> nn.Module:
    if architecture is None and path.suffix == ".safetensors":
        from coup_fast.models.network_files import load_network

        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint file {path}")
        try:
            return load_network(path)[0]
        except FileError as error:
            raise FileError(f"{error}; or give architecture=, the module it is for") from error
    found, what = read_state(path), str(path)
    for entry in key.split(".") if key else ():
        if not isinstance(found, Mapping) or entry not in found:
            held = ", ".join(map(str, found)) if isinstance(found, Mapping) else "no entries"
            raise ValueError(f"{what} has no entry {entry!r}; it has {held}")
        found, what = found[entry], f"{what}[{entry}]"
    try:
        state = as_state(found, what)
    except ValueError as error:
        above = f"{key}." if key else ""
        keys = [f"key={above + name!r}" for name in state_keys(found)]
        cure = f"give {' or '.join(keys)}" if keys else "no entry of it is one"
        raise ValueError(f"{error}; {cure}") from error
    if architecture is None:
        raise ValueError(
            f"{what} holds weights alone: give architecture=, the module that they are for"
        )
    network = architecture if isinstance(architecture, nn.Module) else architecture()
    expected = network.state_dict()
    bare = unwrapped(_below(state, prefix, what), expected)
    try:
        check_fits(network, bare, what)
    except ValueError as error:
        fitting = [] if prefix else [name for name in prefixes_of(state, expected) if name]
        if not fitting:
            raise
        choices = " or ".join(f"prefix={name!r}" for name in fitting)
        raise ValueError(f"{error}. Its names fit below {choices}: name one") from error
    network.load_state_dict(bare)
    return network


def _below(state: State, prefix: str | None, what: str) -> State:
    """The entries below a prefix that the user names."""
    if not prefix:
        return state
    chosen = under(state, prefix if prefix.endswith(".") else f"{prefix}.")
    if not chosen:
        raise ValueError(
            f"no name of {what} begins with prefix={prefix!r}; it is {describe(state)}"
        )
    return chosen
