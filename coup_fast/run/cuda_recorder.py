"""What turns the body of a loop into a replay: CUDA graphs, and the streams around them.

`coup_fast.run.captured` says what a body is and when it is captured; the tests have another
`Recorder`, for the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from coup_fast.run.steps import Beside


class Recorder(Protocol):
    """Turns bodies into replays, and puts the runs of one loop in order."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run the body as it will be captured: compilers, autotuners and workspaces settle."""

    def waits(self, body: Callable[[], None]) -> bool:
        """Run the body again; whether it made the host wait for the device."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """A function that does again, on the same memory, what the body does."""

    def beside(self) -> Beside:
        """Where the score network runs while the classifier does."""

    def in_order(self) -> Any:
        """Context of one run: after the one before, wherever that was enqueued."""

    def in_use(self, tensors: Iterable[Tensor]) -> None:
        """These are worked on where the caller is: their memory is not to be given away before."""


class _SideStream:
    """A stream that branches off the current one on entry, and joins it again on `join`."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.entered: list[Any] = []
        self.branched = False

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        self.branched = True
        self.entered.append(torch.cuda.stream(self.stream))
        self.entered[-1].__enter__()

    def __exit__(self, *error: object) -> None:
        self.entered.pop().__exit__(*error)

    def join(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)
        self.branched = False


class CudaRecorder:
    """CUDA graphs that share one memory pool, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.side = _SideStream(device)
        self.done: torch.cuda.Event | None = None

    def warm_up(self, body: Callable[[], None]) -> None:
        """As torch asks for: on the stream of the capture."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            body()
        current.wait_stream(self.stream)

    def waits(self, body: Callable[[], None]) -> bool:
        """By torch's debug mode. A capture would find out too, but one that fails may leave torch's
        random generators and allocator unusable."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.warm_up(body)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        return any("called a synchronizing CUDA operation" in str(w.message) for w in caught)

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Capture the body. Other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        self.side.branched = False
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                try:
                    body()
                finally:  # a model's own exception: let the capture end as it should
                    if self.side.branched:
                        self.side.join()
        except BaseException:
            self._mend()
            raise
        replay: Callable[[], None] = graph.replay
        return replay

    def _mend(self) -> None:
        """After a capture that CUDA ended, torch's generator refuses to draw until one ends well,
        and the allocator believes that the pool is being filled."""
        with suppress(AttributeError, RuntimeError):  # it is not, after an exception of the body
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self.device)

    def beside(self) -> Beside:
        return self.side

    @contextmanager
    def in_order(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            if self.done is not None:
                torch.cuda.current_stream().wait_event(self.done)
            try:
                yield
            finally:  # a run that stopped on its way has enqueued work as well
                self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.done.record()

    def in_use(self, tensors: Iterable[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            tensor.record_stream(stream)
