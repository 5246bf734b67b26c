"""What a callable holds, as far as it can be seen from outside.

Users hand over modules, but also lambdas around modules, bound methods and partials. What such a
function would call is found where Python keeps it: in closures, default values, attributes,
containers, and the global variables that its code names. What a C extension or a string hides is
not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_LIMIT = 20_000  # objects that are looked at, so that no callable takes for ever
_LIBRARIES = {"torch", "numpy", "builtins", "typing", "collections", "functools", "coup_fast"}
_PLAIN = (Tensor, str, bytes, int, float, complex, bool, type(None), type, ModuleType, CodeType)


def reachable(function: Any, stop: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """The callable itself and the objects that it holds, each once; not what `stop` ones hold."""
    pending = [function]
    seen: dict[int, Any] = {}
    while pending and len(seen) < _LIMIT:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, _PLAIN):
            continue
        seen[id(thing)] = thing  # kept, so that no other object gets its id
        yield thing
        if not stop(thing):
            pending.extend(_held(thing))


def _of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", None)).partition(".")[0] in _LIBRARIES


def _held(thing: Any) -> Iterable[Any]:
    if isinstance(thing, FunctionType):
        return () if _of_library(thing) else _held_by_function(thing)
    if isinstance(thing, MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if not isinstance(thing, nn.Module) and _of_library(type(thing)):
        return ()
    code = getattr(type(thing), "forward" if isinstance(thing, nn.Module) else "__call__", None)
    return [*getattr(thing, "__dict__", {}).values(), code]


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from function.__dict__.values()  # `__wrapped__` is one
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if not isinstance(value, ModuleType):
            yield value
        elif value.__name__.partition(".")[0] not in _LIBRARIES:
            yield from (vars(value)[inner] for inner in names & vars(value).keys())


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
