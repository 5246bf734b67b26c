"""The options of a run, whatever the method: their defaults and what each may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args, overload

from coup_fast import checks
from coup_fast._torch.locks import ForkLock

SELF_CAPTURING = ("reduce-overhead", "max-autotune")  # these modes capture CUDA graphs themselves

Backend = Literal["auto", "compiled", "reference"]
Gradient = Literal["exact", "autograd", "bpda", "none"]
States = Literal["device", "host", "sqrt"]
GuidanceGradient = Literal["full", "stopped"]
Compile = Literal[
    True, False, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
]
Precision = Literal["fp32", "tf32", "bf16"]
AutoFlag = Literal["auto", True, False]

_CHOICES: dict[str, tuple[object, ...]] = {
    "backend": get_args(Backend),
    "gradient": get_args(Gradient),
    "states": get_args(States),
    "verify_states": (True, False),
    "guidance_gradient": get_args(GuidanceGradient),
    "check_values": (True, False),
    "compile": get_args(Compile),
    "cuda_graph": get_args(AutoFlag),
    "precision": get_args(Precision),
    "channels_last": get_args(AutoFlag),
}


@dataclass(frozen=True)
class RunOptions:
    """The options that every purifier takes; `coup_fast.Purifier` says what they mean.

    Raises ValueError listing the choices, TypeError for a max_batch or graph_memory that is no int.
    """

    backend: Backend = "auto"
    gradient: Gradient = "exact"
    states: States = "device"
    verify_states: bool = False
    graph_memory: int = 0
    guidance_gradient: GuidanceGradient = "full"
    check_values: bool = True
    compile: Compile = False
    cuda_graph: AutoFlag = "auto"
    precision: Precision = "fp32"
    channels_last: AutoFlag = "auto"
    max_batch: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():  # 1 is True, and kept as that
            object.__setattr__(self, name, checks.choice(name, getattr(self, name), choices))
        object.__setattr__(
            self, "graph_memory", checks.integer("graph_memory", self.graph_memory, 0)
        )
        if self.max_batch is not None:
            object.__setattr__(self, "max_batch", checks.integer("max_batch", self.max_batch, 1))


RUN_OPTIONS = tuple(field.name for field in fields(RunOptions))


class _HasOptions(Protocol):
    run_options: RunOptions


T = TypeVar("T")
_lock = ForkLock()  # of everybody's `run_options`


class RunOption(Generic[T]):
    """One of a purifier's `run_options` as an attribute; setting it checks the value."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, purifier: None, owner: type) -> RunOption[T]: ...

    @overload
    def __get__(self, purifier: _HasOptions, owner: type) -> T: ...

    def __get__(self, purifier: _HasOptions | None, owner: type) -> RunOption[T] | T:
        if purifier is None:
            return self
        value: T = getattr(purifier.run_options, self.name)
        return value

    def __set__(self, purifier: _HasOptions, value: T) -> None:
        with _lock.current:  # or an option that another thread sets meanwhile would be lost
            changed: dict[str, Any] = {self.name: value}
            purifier.run_options = replace(purifier.run_options, **changed)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of a run, and the others, which are the method's. TypeError for one of a call."""
    if "progress" in options:
        raise TypeError("progress belongs to a call: purifier(images, progress=…)")
    own = {name: value for name, value in options.items() if name in RUN_OPTIONS}
    return own, {name: value for name, value in options.items() if name not in RUN_OPTIONS}
