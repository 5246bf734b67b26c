"""State dicts of others: the names below their wrappers, and saying exactly what does not fit.

A state dict fits a module if names and shapes are equal: nothing is skipped or guessed. Knows no
architecture and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

_SHOWN = 5  # names listed of each kind of mismatch
# Segments that wrappers of PyTorch put inside of names; no module is called so.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


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


def _is_state(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and len(found) > 0
        and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
        )
    )


def state_keys(found: Any) -> list[str]:
    """The entries of a checkpoint that are state dicts, as "a" or, within another, "a.b"."""
    keys = []
    for name, entry in found.items() if isinstance(found, Mapping) else ():
        keys += [str(name)] * _is_state(entry)
        within = entry.items() if isinstance(entry, Mapping) else ()
        keys += [f"{name}.{inner}" for inner, value in within if _is_state(value)]
    return keys


def as_state(found: Any, what: str) -> State:
    """`found` as a state dict: names to tensors.

    Args:
        found: an object of a checkpoint. what: names it in the error ("model of file.pth").

    Raises:
        ValueError: it is something else.
    """
    if _is_state(found):
        return dict(found)
    raise ValueError(f"{what} should be a state dict (names to tensors); it is {describe(found)}")


def unwrapped(state: Mapping[str, Tensor], expected: Collection[str] = ()) -> State:
    """`state` under the names that it has without its wrappers.

    That are `module.` (DataParallel, AveragedModel), `_orig_mod.` (torch.compile, which may stand
    inside of names), `model.` or `net.` (Lightning), any other prefix that all names share, and
    AveragedModel's counter `n_averaged`. A prefix that only some names have stays, for `check_fits`
    to report, and so does a wrapper's name where `expected` has it too.

    Args:
        expected: names of the module to fill; the prefix is the one under which most of them are
            found. Where they are not known, the whole common prefix goes.
    """
    state, expected = dict(state), set(expected)
    if "n_averaged" not in expected and len(state) > 1 and _is_number(state.get("n_averaged")):
        del state["n_averaged"]
    if not expected or not expected.issuperset(state):
        for wrapper in _WRAPPERS:
            if not any(wrapper in name for name in expected):
                bare = {name.replace(wrapper, ""): tensor for name, tensor in state.items()}
                state = bare if len(bare) == len(state) else state
    prefixes = _common_prefixes(state)

    def found(prefix: str) -> int:
        return sum(name[len(prefix) :] in expected for name in state)

    prefix = max(prefixes, key=found) if expected else prefixes[-1]
    return {name[len(prefix) :]: tensor for name, tensor in state.items()}


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries below `prefix`, without it; the others are left out."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def prefixes_of(state: Mapping[str, Tensor], expected: Collection[str]) -> list[str]:
    """The prefixes under which `state` has all names of `expected`, sorted."""
    longest = max(expected, key=len, default="")
    candidates = {name[: -len(longest)] for name in state if longest and name.endswith(longest)}
    return sorted(
        prefix
        for prefix in candidates
        if (not prefix or prefix.endswith(".")) and all(prefix + name in state for name in expected)
    )


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes of whole segments that all names share, beginning with the empty one."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ["".join(f"{segment}." for segment in shared[:n]) for n in range(len(shared) + 1)]


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


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
