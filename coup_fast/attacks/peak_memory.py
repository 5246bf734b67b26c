"""How many bytes of tensors are alive at once: a measurement that needs no allocator's statistics.

On CUDA the allocator counts; on the CPU nobody does, and a process's resident size remembers
freed memory. So every operator's outputs are seen as they are made (autograd's own operators in
backward passes included), and their storages' ends are waited for. Scratch memory within an
operator is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager: bytes alive now (`current`) and at most (`peak`), of storages made inside.

    Storages made before it count nothing, so the numbers are what the code inside added.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._alive: set[int] = set()

    def _end(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.current -= size

    def _see(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in inputs or storage.nbytes() == 0:
            return
        self._alive.add(key)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._end, key, storage.nbytes()).atexit = False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and look at what it returns that it was not given."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, tuple(kwargs.values())))}
        for tensor in _tensors(out):
            self._see(tensor, inputs)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, list | tuple):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `run` has alive at once, above those alive before it.

    On CUDA by the allocator's count (its peak statistics are reset); elsewhere by `LiveBytes`.
    """
    if device.type != "cuda":
        live = LiveBytes()
        with live:
            run()
        return live.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(before)
