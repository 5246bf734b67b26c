"""The file of a training run: one line with format and checksum, then what `torch.save` writes.

A file is read only if its checksum fits, so that no damaged byte becomes a weight and none reaches
the unpickler.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coup_fast.files import whole_file
from coup_fast.models.network_files import build_network

FORMAT = 1
_CURE = "It was left as it is; delete it to train from the start, or choose another --out."
_HEADER = "coup_fast training checkpoint, format {}, sha256 {}\n"
_LENGTH = len(_HEADER.format(FORMAT, "0" * 64))


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, replacing an old file only when the new one is on the disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole_file(path) as file:
        file.write(_header(buffer.getbuffer()))
        file.write(buffer.getbuffer())


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as those of `write_checkpoint`, of this or another format."""
    start = _HEADER.partition("{}")[0].encode()
    with path.open("rb") as file:
        return file.read(len(start)) == start


def read_checkpoint(path: Path, device: torch.device, cure: str = _CURE) -> dict[str, Any]:
    """The content of a file of `write_checkpoint`, its tensors on `device`.

    cure: what to do about a file that cannot be read, a sentence.
    Raises ValueError if the file is damaged, is none of ours, or is of another format: files of
    versions that wrote no checksum are refused too, since nothing shows whether they are whole.
    """
    whole = path.read_bytes()
    header, payload = whole[:_LENGTH], memoryview(whole)[_LENGTH:]
    if header != _header(payload):
        raise ValueError(f"{path} {_fault(whole)} {cure}".rstrip())
    content: dict[str, Any] = torch.load(
        io.BytesIO(payload), map_location=device, weights_only=True
    )
    return content


def averaged_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The averaged network of a run that `coup_fast.training.runs.train` began, and its facts.

    Returns the network in float32 and eval mode, and what the run's weights file would say of it,
    with "step" in place of what is known at the end only.

    Raises ValueError as `read_checkpoint` does, or if the run did not say which network it trains.
    """
    content = read_checkpoint(path, torch.device("cpu"), cure="")
    identity = content["identity"]
    if "network" not in identity or "arguments" not in identity:
        raise ValueError(f"{path} does not say which network it holds; coup-fast train wrote none")
    network = build_network(identity["network"], json.loads(identity["arguments"]))
    average = {
        name.removeprefix("module."): tensor
        for name, tensor in content["average"].items()
        if name.startswith("module.")
    }
    network.load_state_dict(average)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval(), {**identity, "step": content["state"]["step"]}


def _header(payload: bytes | memoryview) -> bytes:
    return _HEADER.format(FORMAT, hashlib.sha256(payload).hexdigest()).encode()


def _fault(whole: bytes) -> str:
    """What is wrong with a file whose header does not fit."""
    ours, other = (_HEADER.format(n, "").partition(", sha256")[0].encode() for n in (FORMAT, ""))
    if whole.startswith(b"PK\x03\x04"):
        return (
            "has no checksum: an earlier coup_fast wrote it, or it is no checkpoint of a training. "
            "Finish that run with the version that began it."
        )
    if whole.startswith(other) and not whole.startswith(ours):
        stated = whole[len(other) :].partition(b",")[0][:20].decode("ascii", "replace")
        return f"has format {stated}; this coup_fast reads format {FORMAT}."
    return "is damaged or not a training checkpoint: its checksum does not fit."
