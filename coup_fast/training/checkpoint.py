"""The file of a training run: one line with format and checksum, then what `torch.save` writes.

A file is read only if its checksum fits, so that no damaged byte becomes a weight and none reaches
the unpickler. Knows nothing of what the content means.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from coup_fast.files import whole_file

FORMAT = 1
_HEADER = "coup_fast training checkpoint, format {}, sha256 {}\n"
_LENGTH = len(_HEADER.format(FORMAT, "0" * 64))


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, replacing an old file only when the new one is on the disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole_file(path) as file:
        file.write(_header(buffer.getbuffer()))
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The content of a file of `write_checkpoint`, its tensors on `device`.

    Raises ValueError if the file is damaged, is none of ours, or is of another format: files of
    versions that wrote no checksum are refused too, since nothing shows whether they are whole.
    """
    whole = path.read_bytes()
    header, payload = whole[:_LENGTH], memoryview(whole)[_LENGTH:]
    if header != _header(payload):
        raise ValueError(f"{path} {_fault(whole)}")
    content: dict[str, Any] = torch.load(
        io.BytesIO(payload), map_location=device, weights_only=True
    )
    return content


def _header(payload: bytes | memoryview) -> bytes:
    return _HEADER.format(FORMAT, hashlib.sha256(payload).hexdigest()).encode()


def _fault(whole: bytes) -> str:
    """What is wrong with a file whose header does not fit, and what to do."""
    cure = "It was left as it is; delete it to train from the start, or choose another --out."
    ours, other = (_HEADER.format(n, "").partition(", sha256")[0].encode() for n in (FORMAT, ""))
    if whole.startswith(b"PK\x03\x04"):
        return (
            "has no checksum: an earlier coup_fast wrote it, or it is no checkpoint of a training. "
            f"Finish that run with the version that began it. {cure}"
        )
    if whole.startswith(other) and not whole.startswith(ours):
        stated = whole[len(other) :].partition(b",")[0][:20].decode("ascii", "replace")
        return f"has format {stated}; this coup_fast reads format {FORMAT}. {cure}"
    return f"is damaged or not a training checkpoint: its checksum does not fit. {cure}"
