"""Fingerprints of models: all that they compute with, as far as Python shows it.

The weights are not all of a network. Buffers that are not saved, numbers and strings among its
attributes, its hooks, and the files that its classes and functions are written in decide as much.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Their code is told by a version or by the digest of this package; Python's changes no number.
_KNOWN_CODE = {"coup_fast", "torch", "numpy", *sys.stdlib_module_names} - {"__main__"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, np.generic, type(None))


def fingerprint(model: Any) -> dict[str, Any]:
    """Digests of a module or callable: of its tensors, its other values, and its code by module.

    Seen are parameters, buffers (those that are not saved too) and attributes of modules; closures,
    defaults and read globals of functions; partials and bound methods; containers, dataclasses and
    namespaces of plain values. Of other objects only the class and its code are.
    """
    walk = _Walk()
    walk.visit("", model)
    return {
        "tensors": walk.tensors.hexdigest(),
        "values": walk.values.hexdigest(),
        "code": dict(sorted(walk.code.items())),
    }


def _is_known(thing: FunctionType | type) -> bool:
    return (thing.__module__ or "__main__").partition(".")[0] in _KNOWN_CODE


def _code_of(thing: FunctionType | type) -> dict[str, str]:
    """Digest of the file that a function or class stands in, by the name of its module.

    Without a file (a notebook, `python -c`) of its instructions, by its own name. {} for code of
    this package, torch, NumPy and Python.
    """
    if _is_known(thing):
        return {}
    name = thing.__module__ or "__main__"
    file = _file_of(name)
    if file is not None:
        return {name: hashlib.sha256(file.read_bytes()).hexdigest()}
    total = hashlib.sha256()
    functions = vars(thing).values() if isinstance(thing, type) else [thing]
    for part in functions:
        if isinstance(part, FunctionType):
            for text in _instructions(part.__code__):
                total.update(text)
    return {f"{name}.{thing.__qualname__}": total.hexdigest()}


def _file_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    path = Path(file) if file else None
    return path if path is not None and path.is_file() else None


def _instructions(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield repr(constant).encode()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Walk:
    """Visits what a model holds in an order that is the same in every process."""

    def __init__(self) -> None:
        self.tensors, self.values = hashlib.sha256(), hashlib.sha256()
        self.code: dict[str, str] = {}
        self._seen: dict[int, tuple[int, Any]] = {}  # kept, so that no other object gets its id

    def visit(self, place: str, value: Any) -> None:
        """Add a value; an object that was met before is not visited again."""
        if isinstance(value, Tensor):
            self._tensor(place, value)
        elif isinstance(value, np.ndarray):
            about = f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
            self._say(place, about)
        elif isinstance(value, _PLAIN):
            self._say(place, repr(value))
        elif id(value) in self._seen:
            self._say(place, f"object {self._seen[id(value)][0]}")
        else:
            self._seen[id(value)] = len(self._seen), value
            self._say(place, type(value).__qualname__)
            for name, part in self._parts(value):
                self.visit(f"{place}.{name}", part)

    def _say(self, place: str, text: str) -> None:
        self.values.update(f"{place}={text}\n".encode())

    def _tensor(self, place: str, tensor: Tensor) -> None:
        self.tensors.update(f"{place}={tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.device.type == "meta":
            return
        plain = tensor.detach().cpu()
        if plain.layout != torch.strided or plain.is_quantized:
            self.tensors.update(repr(plain).encode())
            return
        data = plain.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
        self.tensors.update(data.numpy().tobytes())

    def _parts(self, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, type):
            self.code |= _code_of(value)
        elif isinstance(value, FunctionType):
            self.code |= _code_of(value)
            yield from self._of_function(value)
        elif isinstance(value, MethodType):
            yield "self", value.__self__
            yield "function", value.__func__
        elif isinstance(value, partial):
            yield from (("function", value.func), ("args", value.args), ("options", value.keywords))
        elif isinstance(value, Mapping):
            yield from ((repr(key), part) for key, part in value.items())
        elif isinstance(value, list | tuple):
            yield from ((str(i), part) for i, part in enumerate(value))
        elif isinstance(value, set | frozenset):
            yield from (("item", item) for item in sorted(map(repr, value)))
        else:
            for kind in type(value).__mro__:
                self.code |= _code_of(kind)
            if isinstance(value, nn.Module):
                yield from _of_module(value)
            elif dataclasses.is_dataclass(value):
                yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            elif isinstance(value, SimpleNamespace):
                yield from sorted(vars(value).items())

    @staticmethod
    def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield "defaults", function.__defaults__
        yield "options", function.__kwdefaults__
        file = _file_of(function.__module__ or "__main__")
        installed = file is not None and {"site-packages", "dist-packages"} & set(file.parts)
        if installed or _is_known(function):
            return
        for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
            value = function.__globals__[name]
            if not isinstance(value, ModuleType):
                yield name, value


def _of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    yield from module.named_children()
    for name, value in sorted(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if name.endswith("_hooks") and isinstance(value, Mapping):  # by numbers of the process
            value = list(value.values())
        yield name, value
