"""Checkpoint files of others: reading them safely, and saying exactly what does not fit.

Files are unpickled with `weights_only=True` only (tensors and plain containers; nothing in a file
can run). A state dict fits a module if names and shapes are equal: nothing is skipped or guessed.
Knows no architecture. Needs torch; safetensors for .safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coup_fast.files import FileError, reading

State = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

_CHECKPOINT = "a checkpoint of tensors and plain containers (torch.load with weights_only=True)"
_SHOWN = 5  # names listed of each kind of mismatch


def read_state(path: str | Path) -> Any:
    """What a checkpoint file holds, tensors on the CPU: a dict of tensors, or whatever was saved.

    Args:
        path: a file of `torch.save` (either format), or `.safetensors`.

    Raises:
        FileNotFoundError: no such file. FileError, a ValueError: not a checkpoint, or one that
        holds objects other than dense tensors and plain containers. ImportError: safetensors is
        missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    cure = (
        "If it is one and you trust it, save its state dict alone: "
        "torch.save(model.state_dict(), path)"
    )
    with reading(path, _CHECKPOINT, cure):
        found = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(found, path)
    return found


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


def _read_safetensors(path: Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install 'coup-fast[models]'") from error
    with reading(path, "a safetensors file"):
        tensors: State = load_file(path)
    return tensors


def describe(found: Any) -> str:
    """What an object of a checkpoint is, in a few words for an error message."""
    if isinstance(found, Tensor):
        return f"a tensor {list(found.shape)}"
    if isinstance(found, Mapping):
        names = [str(name) for name in found]
        return f"a dict of {len(names)} entries ({_listed(names)})"
    if isinstance(found, list | tuple):
        entries = ", ".join(describe(entry) for entry in found[:_SHOWN])
        return f"a {type(found).__name__} of {len(found)} entries ({entries})"
    return f"{type(found).__name__} {str(found)[:40]}"


def as_state(found: Any, what: str) -> State:
    """`found` as a state dict: names to tensors.

    Args:
        found: an object of a checkpoint. what: names it in the error ("model of file.pth").

    Raises:
        ValueError: it is something else.
    """
    if isinstance(found, Mapping) and found:
        others = [name for name, value in found.items() if not isinstance(value, Tensor)]
        if not others and all(isinstance(name, str) for name in found):
            return dict(found)
    raise ValueError(f"{what} should be a state dict (names to tensors); it is {describe(found)}")


def strip_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> State:
    """Names without `prefix` (DataParallel's by default) if all of them have it, else as they are.

    A state dict where only some names have the prefix is left alone, for `check_fits` to report.
    """
    if all(name.startswith(prefix) for name in state):
        return {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return dict(state)


def check_fits(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """That names, shapes and kinds of `state` are exactly those of `module.state_dict()`.

    Real floating-point numbers belong where the module has them, whatever their precision, and no
    NaN is among them.

    Args:
        module: on any device, meta included. what: names the state in the error.

    Raises:
        ValueError: lists what is missing, what is left over, and which entries differ or are NaN.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    left_over = [name for name in state if name not in expected]
    differing = [
        f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    floating = {name for name, tensor in expected.items() if tensor.is_floating_point()}
    other_kinds = [
        f"{name} is {tensor.dtype}, expected {'real' if name in floating else 'whole'} numbers"
        for name, tensor in state.items()
        if name in expected and tensor.is_floating_point() != (name in floating)
    ]
    unknown = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.device.type != "meta" and tensor.isnan().any()
    ]
    problems = [
        f"{len(names)} {about}: {_listed(names)}"
        for about, names in (
            ("missing", missing),
            ("unexpected", left_over),
            ("of another shape", differing),
            ("of another kind", other_kinds),
            ("with NaN", unknown),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{what} does not fit {type(module).__name__}: {len(state)} entries found, "
            f"{len(expected)} expected; " + "; ".join(problems)
        )


def build_with(
    build: Callable[[], Module], state: Mapping[str, Tensor], what: str, dtype: torch.dtype | None
) -> Module:
    """The module of `build` holding `state`, in eval mode on the CPU; no random initialisation.

    Args:
        build: makes the module. It runs on the meta device, so every parameter and buffer must be
            in the state dict (a buffer that is not, `persistent=False`, would stay empty).
        state: its whole state dict. what: names it in the error.
        dtype: for floating-point entries; None keeps the file's.

    Raises:
        ValueError: names or shapes differ (`check_fits`).
    """
    with torch.device("meta"):
        module = build()
    check_fits(module, state, what)
    # A copy where no cast makes one: a file may share one storage between entries.
    module.load_state_dict(
        {
            name: tensor.to(dtype=dtype, copy=True)
            if dtype is not None and tensor.is_floating_point()
            else tensor.clone()
            for name, tensor in state.items()
        },
        assign=True,
    )
    return module.eval()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
