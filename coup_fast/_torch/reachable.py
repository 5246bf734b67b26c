"""What a callable holds, as far as it can be seen from outside.

Users hand over modules, but also lambdas around modules, bound methods and partials. What such a
function would call is found where Python keeps it: in closures, default values, the global
variables that its code reads, and attributes. What a C extension or a string hides is not found.
"""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_LIMIT = 20_000  # objects that are looked at, so that no callable takes for ever
_DEPTH = 4  # how far `modules_behind`, which every run asks, follows callables that call callables
_LIBRARIES = {"torch", "numpy", "builtins", "typing", "collections", "functools", "coup_fast"}
_PLAIN = (Tensor, str, bytes, int, float, complex, bool, type(None), type, ModuleType, CodeType)
_CONTAINERS = (dict, list, tuple, set, frozenset)
_CALLS = (FunctionType, MethodType, partial)


def reachable(function: Any, stop: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """The callable itself and the objects that it holds, each once; not what `stop` ones hold.

    Containers and the parts of modules are looked into: what attacks a model asks here.
    """
    return _walk(function, lambda thing: () if stop(thing) else _held(thing), _LIMIT)


def modules_behind(function: Any) -> tuple[nn.Module, ...]:
    """The modules that a callable can be seen to call, each once: what protects models asks here.

    Beside the module itself, or the one whose bound method it is, those that callables hold, one
    behind the other: a function, a partial, a callable object, a module's attribute (an energy
    network may be a function). A container is not looked into, because what it holds may be there
    for other uses; nor are the parts of a module, which belong to it.
    """
    found = _walk(function, _called, _DEPTH)
    return tuple(thing for thing in found if isinstance(thing, nn.Module))


def _walk(start: Any, held: Callable[[Any], Iterable[Any]], depth: int) -> Iterator[Any]:
    """What is nearest comes first; `depth` is how far away it may be."""
    pending = deque([(start, 0)])
    seen: dict[int, Any] = {}
    while pending and len(seen) < _LIMIT:
        thing, away = pending.popleft()
        if id(thing) in seen or isinstance(thing, _PLAIN):
            continue
        seen[id(thing)] = thing  # kept, so that no other object gets its id
        yield thing
        if away < depth:
            pending.extend((part, away + 1) for part in held(thing))


def _held(thing: Any) -> Iterable[Any]:
    """All that a thing holds."""
    if isinstance(thing, _CALLS):
        return _held_by_callable(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, _CONTAINERS):
        return list(thing)
    return _held_by_object(thing)


def _called(thing: Any) -> Iterable[Any]:
    """What a thing holds and may call when it is called."""
    held: Iterable[Any] = ()
    if isinstance(thing, _CALLS):
        held = _held_by_callable(thing)
        owner = getattr(thing, "__self__", None)
        if owner is not None and not isinstance(owner, nn.Module):
            held = [*held, *_held_by_object(owner)]
    elif isinstance(thing, nn.Module):
        held = vars(thing).values()
    elif callable(thing):
        held = _held_by_object(thing)
    return [part for part in held if not isinstance(part, _CONTAINERS)]


def _of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", None)).partition(".")[0] in _LIBRARIES


def _held_by_object(thing: Any) -> Iterable[Any]:
    if not isinstance(thing, nn.Module) and _of_library(type(thing)):
        return ()
    code = getattr(type(thing), "forward" if isinstance(thing, nn.Module) else "__call__", None)
    return [*getattr(thing, "__dict__", {}).values(), code]


def _held_by_callable(function: Any) -> Iterable[Any]:
    if isinstance(function, MethodType):
        return function.__self__, function.__func__
    if isinstance(function, partial):
        return function.func, *function.args, *function.keywords.values()
    return () if _of_library(function) else _held_by_function(function)


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from function.__dict__.values()  # `__wrapped__` is one
    variables, names = _read(function.__code__)
    for name in variables:
        value = function.__globals__.get(name)
        if not isinstance(value, ModuleType):
            yield value
        elif value.__name__.partition(".")[0] not in _LIBRARIES:
            yield from (vars(value)[inner] for inner in names if inner in vars(value))


@lru_cache(maxsize=1024)
def _read(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Global variables that code reads, functions inside it included; and all names in it."""
    variables = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inside = _read(constant)
            variables += inside[0]
            names += inside[1]
    return tuple(dict.fromkeys(variables)), tuple(dict.fromkeys(names))
