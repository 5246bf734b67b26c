"""Networks as safetensors files that say how to build themselves; needs torch and safetensors.

The metadata's `coup_fast` entry is JSON: the network's class and arguments, what it predicts
(`kind`), and how it was trained.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.files import FileError, reading, whole_file
from coup_fast.models.classifier import Classifier
from coup_fast.models.conv_net import ConvNet
from coup_fast.models.naf_net import NAFNet
from coup_fast.models.state import build_with
from coup_fast.models.unet import EnergyUNet, UNet

_CLASSES = {
    "UNet": UNet,
    "EnergyUNet": EnergyUNet,
    "NAFNet": NAFNet,
    "Classifier": Classifier,
    "ConvNet": ConvNet,
}


def build_network(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The network class of that name with these arguments, randomly initialised."""
    if name not in _CLASSES:
        known = f"there are {', '.join(_CLASSES)}{checks.nearest(name, _CLASSES)}"
        raise ValueError(f"unknown network {name!r}; {known}")
    network: nn.Module = _CLASSES[name](**arguments)
    return network


def network_arguments(name: str) -> list[str]:
    """The names of the arguments of a network class."""
    return list(inspect.signature(_CLASSES[name]).parameters)


def save_network(
    path: Path, network: nn.Module, facts: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write a network of this package and what is known about it to a .safetensors file.

    Args:
        path: the file; it is written whole or not at all.
        network: a `UNet`, `NAFNet`, `EnergyUNet`, `Classifier` or `ConvNet`.
        facts: for JSON; `load_network` returns them.
        dtype: in which floating-point weights are stored.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {
        name: _to(tensor.detach().cpu(), dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }
    description = {"network": type(network).__name__, "arguments": network.config, **facts}
    content = save(tensors, metadata={"coup_fast": json.dumps(description)})
    with whole_file(path) as file:
        file.write(content)


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of a file, in float32 and eval mode, and the description stored with it.

    The weights are in channels_last, in which convolutions are faster (docs/design.md, The loop).

    Raises:
        FileError: the file was not written by `save_network`, or is damaged; this is a ValueError.
    """
    from safetensors import safe_open

    with reading(path, "a network that save_network wrote"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "coup_fast" not in metadata:
                raise FileError(
                    f"{path} does not say which network it holds; save it with save_network"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description: dict[str, Any] = json.loads(metadata["coup_fast"])
        name, arguments = description["network"], description["arguments"]
        _check_depth(arguments, len(tensors))
        network = build_with(
            lambda: build_network(name, arguments), tensors, str(path), torch.float32
        )
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, description


def _check_depth(arguments: dict[str, Any], tensors: int) -> None:
    """That a network has no more levels and blocks than there are tensors for them.

    Widths need no bound: a network takes no memory until its shapes were found in the file.
    """
    for name, value in arguments.items():
        depth = len(value) if isinstance(value, list) else value if name == "blocks" else 0
        if depth > tensors:
            raise ValueError(f"{name} asks for {depth} parts, and it holds {tensors} tensors")


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
