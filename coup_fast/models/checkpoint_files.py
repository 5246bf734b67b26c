"""Reading checkpoint files of others safely, and naming what is no checkpoint.

Files are unpickled with `weights_only=True` only: tensors, plain containers and the few classes of
`_HARMLESS`, which hold values and run nothing. Knows no architecture. Needs torch; safetensors for
.safetensors files.
"""

from __future__ import annotations

import argparse
import re
import types
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coup_fast.files import FileError, reading
from coup_fast.models.state import State, as_state, describe, unwrapped

_CHECKPOINT = "a checkpoint of tensors and plain containers (torch.load with weights_only=True)"
_HEAD = 512  # bytes looked at; a tar archive names itself at byte 257
_SHOWN = 5  # names listed

# What files begin with that are often saved under a checkpoint's name.
_KINDS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: not head.strip(b"\0"), "it holds nothing but zeros: an unfinished download"),
    (
        lambda head: head.startswith(b"version https://git-lfs.github.com/spec/"),
        "it is a Git LFS pointer, not the file itself: run git lfs pull in its clone",
    ),
    (
        lambda head: re.match(rb"\s*<(!doctype html|html|head|\?xml)", head, re.I) is not None,
        "it is a web page, which a download gives where a login or a confirmation is asked for: "
        "open its address in a browser",
    ),
    (lambda head: head[257:262] == b"ustar", "it is a tar archive: unpack it with tar -xf"),
    (lambda head: head.startswith(b"\x1f\x8b"), "it is compressed by gzip: unpack it"),
    (lambda head: head.startswith(b"\xfd7zXZ"), "it is compressed by xz: unpack it"),
    (lambda head: head.startswith(b"\x89HDF"), "it is an HDF5 file, such as Keras writes"),
    (lambda head: head.startswith(b"\x93NUMPY"), "it is a NumPy file"),
)


def read_state(path: str | Path) -> Any:
    """What a checkpoint file holds, tensors on the CPU: a dict of tensors, or whatever was saved.

    Beside tensors and plain containers it may hold `argparse.Namespace`, `types.SimpleNamespace`
    and NumPy scalars, which training scripts save with their weights.

    Args:
        path: a file of `torch.save` (either format), or `.safetensors`.

    Raises:
        FileNotFoundError: no such file. FileError, a ValueError: not a checkpoint (the error says
        what it is instead), or one that holds other objects. ImportError: safetensors is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_kind(path, _CHECKPOINT)
    cure = (
        "If it is one and you trust it, save its state dict alone: "
        "torch.save(model.state_dict(), path)"
    )
    with reading(path, _CHECKPOINT, cure):
        try:
            with torch.serialization.safe_globals(_HARMLESS):
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            names = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
            if not names:
                raise
            raise FileError(
                f"{path} cannot be read as {_CHECKPOINT}: it holds objects of {names[0]}, and "
                f"opening them could run code. {cure}"
            ) from error
        _check_plain(found, path)
    return found


def read_trained(
    path: str | Path, ema: bool | None, expected: Collection[str], buffers: Collection[str] = ()
) -> State:
    """The weights in a list [state dict, optimizer, epoch, step, EMA parameters], or a bare dict.

    Song's and ermongroup's code write such lists. ema: None takes the EMA where there is one.
    expected: as for `unwrapped`. buffers: names that the EMA lacks, taken from the state dict.

    Raises FileNotFoundError, and ValueError for anything else or for an EMA that is not there.
    """
    found = read_state(path)
    if isinstance(found, Mapping):
        if ema:
            raise ValueError(
                f"{path} holds no EMA parameters: it is {describe(found)}, not a list with them as "
                "its fifth entry. A bare state dict may be the EMA itself: leave ema out"
            )
        return unwrapped(as_state(found, str(path)), expected)
    if not isinstance(found, list) or len(found) not in (4, 5):
        raise ValueError(
            f"{path} should be a state dict, or a list of a state dict, an optimizer, an epoch, a "
            f"step and EMA parameters; it is {describe(found)}"
        )
    state = unwrapped(as_state(found[0], f"{path}, entry 0"), expected)
    if ema is False or (ema is None and len(found) == 4):
        return state
    if len(found) == 4:
        raise ValueError(f"{path} holds no EMA parameters: it is {describe(found)}")
    average = unwrapped(as_state(found[4], f"{path}, entry 4"), expected)
    unmatched = sorted(set(state) ^ set(average) ^ set(buffers))
    if unmatched:
        raise ValueError(
            f"{path}: EMA parameters and state dict do not match in {', '.join(unmatched[:5])}"
        )
    return {**state, **average}


def _check_kind(path: Path, expected: str) -> None:
    """Raise FileError, with what it is instead, for a file that torch.save did not write."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    said = "it is empty" if not head else None
    said = said or next((name for is_one, name in _KINDS if is_one(head)), None)
    if said is None and head.startswith(b"PK"):
        said = _of_zip(path)
    elif said is None and not head.startswith(b"\x80"):  # every binary pickle does
        said = f"torch.save did not write it, it begins with {head[:16]!r}"
    if said is not None:
        raise FileError(f"{path} cannot be read as {expected}: {said}")


def _of_zip(path: Path) -> str | None:
    """What a zip archive is that torch.save did not write; None: it did, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged directory meets any error of zipfile's
        return None  # torch says what is damaged
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript archive (torch.jit.save), which holds code"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    more = ", …" if len(names) > _SHOWN else ""
    return f"it is a zip archive of {', '.join(names[:_SHOWN])}{more}: unpack it"


def _harmless() -> list[Any]:
    """Classes beyond torch's own that files may hold: values only, whatever the file says."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdg"}
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        np.dtype,
        *sorted(kinds, key=str),
        # The function has moved; files name the place it had when they were written.
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


_HARMLESS = _harmless()


def _check_plain(found: Any, path: Path) -> None:
    """Raise FileError if there is a tensor without values of its own in memory."""
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, list | tuple | set):
        for entry in found:
            _check_plain(entry, path)
    elif isinstance(found, Tensor) and (
        found.layout != torch.strided or found.device.type != "cpu" or found.is_quantized
    ):
        raise FileError(
            f"{path} holds a tensor {list(found.shape)} that is "
            f"{'quantized' if found.is_quantized else found.layout} on {found.device.type}; "
            "dense tensors are needed"
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install 'coup-fast[models]'") from error
    with path.open("rb") as file:
        head = file.read(_HEAD)
    said = (
        "it is empty"
        if not head
        else next((name for is_one, name in _KINDS[1:] if is_one(head)), None)
    )
    if said is not None:
        raise FileError(f"{path} cannot be read as a safetensors file: {said}")
    with reading(path, "a safetensors file"):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors
