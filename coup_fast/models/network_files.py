"""Networks as safetensors files that say how to build themselves; needs torch and safetensors.

The metadata's `coup_fast` entry is JSON: the network's class and arguments, what it predicts
(`kind`), and how it was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast.files import whole_file
from coup_fast.models.classifier import Classifier
from coup_fast.models.conv_net import ConvNet
from coup_fast.models.naf_net import NAFNet
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
        raise ValueError(f"unknown network {name!r}; there are {', '.join(_CLASSES)}.")
    network: nn.Module = _CLASSES[name](**arguments)
    return network


def save_network(
    path: Path, network: nn.Module, facts: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write `network` (one of ours) and `facts` about it; floating weights are stored as dtype."""
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
    """The network of a file (float32, eval mode) and the description stored with it.

    Weights are in channels_last, in which convolutions are faster (docs/design.md, The loop).

    Raises:
        ValueError: if the file was not written by `save_network`.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "coup_fast" not in metadata:
            raise ValueError(
                f"{path} does not say which network it holds; save it with save_network."
            )
        tensors = {
            name: _to(file.get_tensor(name), torch.float32)
            for name in file.keys()  # noqa: SIM118
        }
    description: dict[str, Any] = json.loads(metadata["coup_fast"])
    network = build_network(description["network"], description["arguments"])
    network.load_state_dict(tensors)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval(), description


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
