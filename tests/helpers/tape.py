"""CUDA graphs on the CPU, for tests: operators are written down once and done again as they were.

As a captured graph does, a replay repeats the operators on the same memory and knows nothing of the
host: Python values and the outcome of Python branches are those of the recording. Not a test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coup_fast.run.captured import Graphs
from coup_fast.run.steps import InOrder

WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")


def tensors(tree) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for item in tree for t in tensors(item)] if isinstance(tree, list | tuple) else []


class Tape(TorchDispatchMode):
    """Writes down each operator with its arguments and results, and counts those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.waits += func.overloadpacket._qualified_op_name in WAITS
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tensors(out)))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                again = tensors(func(*args, **kwargs))
                for result, value in zip(results, again, strict=True):
                    if value.data_ptr() != result.data_ptr():  # no view, not in place
                        result.detach().copy_(value)


class Joined(InOrder):
    """Counts branches, and whether each was joined."""

    def __init__(self) -> None:
        self.branches = self.joins = 0

    def __enter__(self) -> None:
        assert self.branches == self.joins
        self.branches += 1

    def join(self) -> None:
        self.joins += 1


class TapeRecorder:
    """A `Recorder` of tapes."""

    tape = Tape

    def __init__(self) -> None:
        self.warm_ups = self.captures = 0
        self.side = Joined()

    def warm_up(self, body: Callable[[], None]) -> None:
        self.warm_ups += 1
        body()

    def waits(self, body: Callable[[], None]) -> bool:
        with self.tape() as tape:
            self.warm_up(body)
        return tape.waits > 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        tape = self.tape()
        with tape:
            body()
        self.captures += 1
        return tape.replay

    def beside(self) -> Joined:
        return self.side

    def in_order(self):
        return nullcontext()

    def in_use(self, tensors) -> None:
        assert all(isinstance(tensor, Tensor) for tensor in tensors)


class TapeGraphs(Graphs):
    """A purifier's graphs where the CPU has tapes for graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.tapes = TapeRecorder()

    def recorder(self, device: torch.device) -> TapeRecorder:
        return self.tapes
