"""The loop as CUDA graphs: a step's body is captured once and replayed for every step.

A body works on buffers that stay where they are, and finds its row, time and keys by a step number
that lives on the device and that it advances itself. So a replay needs nothing from the host, and
rows that do the same kinds of work (network or not, guided or not, noisy or not) share one graph.
What is here knows runs, not methods. The recorder (`coup_fast.run.cuda_recorder`) turns bodies into
replays; the tests have one for the CPU.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coup_fast._torch.calls import NetworkForm
from coup_fast._torch.locks import ForkLock
from coup_fast._torch.modules import module_of
from coup_fast.run.cuda_recorder import CudaRecorder, Recorder
from coup_fast.run.progress import Tell
from coup_fast.run.steps import Run, State
from coup_fast.run.tables import Noise, RowTable
from coup_fast.run.warn import warn

_KEPT = 8  # captured loops of one purifier

# A capture waits for the whole device, which another thread's capture forbids: one at a time. A
# model that purifies may capture within a warm-up, so the locks are reentrant.
_CAPTURES: dict[torch.device, ForkLock] = {}


def _capturing(device: torch.device) -> Any:
    return _CAPTURES.setdefault(device, ForkLock(reentrant=True)).current


class _Lookup:
    """A table of which any item is the row that the device's step number says."""

    def __init__(self, table: Tensor, step: Tensor, numbers: Tensor | None = None) -> None:
        self.table = table
        self.step = step
        self.numbers = numbers  # of each step's row in the table, where it is not the step's

    def __getitem__(self, index: Any) -> Tensor:
        at = self.step if self.numbers is None else self.numbers.index_select(0, self.step)
        return self.table.index_select(0, at)[0]


class CapturedLoop:
    """All steps of a run over static buffers; serves every run of the same kind.

    Made from the first run and its images, whose memory it does not keep.
    """

    def __init__(self, run: Run, images: Tensor, recorder: Recorder) -> None:
        self.recorder = recorder
        with recorder.in_order():
            self.step = torch.zeros(1, dtype=torch.int64, device=images.device)
            self.state: State = run.start(images)
            self.attacked = run.attacked(images)
            self.keys = _clone(run.noise.keys)
            self.memory = [self.step, *self.state]  # of this loop, but not of its graphs' pool
            self.memory += [t for t in (self.attacked, self.keys) if t is not None]
            static = self._static(run)
            kinds: dict[Any, Callable[[], None]] = {}
            self.replays = []
            for k, _ in enumerate(run.noise_index):
                kind = run.kind(k)
                if kind not in kinds:
                    kinds[kind] = self._capture(static, k)
                self.replays.append(kinds[kind])

    def _static(self, run: Run) -> Run:
        """The run, finding what belongs to a step by the step number on the device."""
        tables, numbers = run.tables, [index or 0 for index in run.noise_index]
        number_of = torch.tensor(numbers, dtype=torch.int64).to(self.step.device)
        rows = torch.stack([tables.rows[k] for k, _ in enumerate(numbers)])
        times = torch.stack([tables.times[k] for k, _ in enumerate(numbers)])
        self.memory += [number_of, rows, times]
        static = copy.copy(run)
        static.tables = replace(
            tables, rows=_Lookup(rows, self.step), times=_Lookup(times, self.step)
        )
        static.noise = Noise(
            keys=None if self.keys is None else _Lookup(self.keys, self.step, number_of)
        )
        static.beside = self.recorder.beside()
        return static

    def _capture(self, static: Run, k: int) -> Callable[[], None]:
        def body() -> None:
            state = static.step_(k, self.state, self.attacked)
            for buffer, value in zip(self.state, state, strict=True):
                if value is not buffer:
                    buffer.copy_(value)
            self.step.add_(1)

        cached = torch.is_autocast_cache_enabled()
        if torch.is_autocast_enabled(self.step.device.type):
            torch.set_autocast_cache_enabled(False)  # a caller's is emptied before the replays
        try:
            return self._recorded(body, k)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _recorded(self, body: Callable[[], None], k: int) -> Callable[[], None]:
        self.step.fill_(k)
        self.recorder.warm_up(body)
        self.step.fill_(k)
        if self.recorder.waits(body):
            raise CaptureError("a model makes the host wait for the device")
        self.step.fill_(k)
        try:
            return self.recorder.record(body)
        except Exception as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # what happened first, not what came of it
                cause = cause.__context__
            raise CaptureError(f"{type(cause).__name__}: {cause}") from error

    def final_state(self, run: Run, images: Tensor, tell: Tell | None = None) -> State:
        """The final state of a run of the kind that was captured; waits for nothing itself."""
        with self.recorder.in_order():
            for buffer, value in zip(self.state, run.start(images), strict=True):
                buffer.copy_(value)
            attacked = run.attacked(images)
            if self.attacked is not None and attacked is not None:
                self.attacked.copy_(attacked)
            if self.keys is not None and isinstance(run.noise.keys, Tensor):
                self.keys.copy_(run.noise.keys)
            self.step.zero_()
            try:
                for done, replay in enumerate(self.replays, 1):
                    replay()
                    if tell is not None:
                        tell(done)
            finally:
                self.recorder.in_use(self.memory)
            return tuple(buffer.clone() for buffer in self.state)


def _clone(keys: RowTable | None) -> Tensor | None:
    return keys.clone() if isinstance(keys, Tensor) else None


class CaptureError(RuntimeError):
    """A body that ran could not be captured."""


class Graphs:
    """The captured loops of a purifier, by kind of run; copies and pickles start without any."""

    def __init__(self) -> None:
        self.reason: str | None = "nothing has run yet"  # None: the last run was replayed
        self._loops: OrderedDict[Any, CapturedLoop | str | None] = OrderedDict()
        self._places: Any = None
        self._recorders: dict[torch.device, Recorder] = {}
        self._lock = ForkLock()
        self._replays_in: int | None = None  # the thread that holds the lock

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return type(self), ()

    def recorder(self, device: torch.device) -> Recorder | None:
        """The device's recorder, or None where there are no graphs."""
        if device.type != "cuda":
            return None
        if device not in self._recorders:
            self._recorders[device] = CudaRecorder(device)
        return self._recorders[device]

    def final_state(self, run: Run, images: Tensor, tell: Tell | None = None) -> State | None:
        """The run's final state by replays, or None where the run has to be eager.

        By the option `cuda_graph`: "auto" captures a kind of run when it comes the second time; a
        run that cannot be captured is eager for good, with one warning. True captures at once, and
        raises RuntimeError where that fails, ValueError where it cannot be tried.
        """
        choice = run.options.cuda_graph
        if self._replays_in == threading.get_ident():  # `tell` purifies, and would wait for itself
            self.reason = "it was called between the steps of another run, by that one's progress"
            _check_eager(self.reason, choice)
            return None
        with self._lock.current, torch.inference_mode(False), torch.no_grad():
            self.reason = self._why_eager(run, images, choice)
            if self.reason is not None:
                _check_eager(self.reason, choice)
                return None
            loop = self._loop(run, images, choice)
            if loop is None:
                return None
            self._replays_in = threading.get_ident()
            try:
                return loop.final_state(run, images, tell)
            finally:
                self._replays_in = None

    def _why_eager(self, run: Run, images: Tensor, choice: bool | str) -> str | None:
        if choice is False:
            return "cuda_graph=False"
        if self.recorder(images.device) is None:
            return f"images are on {images.device}, and graphs are CUDA's"
        if run.calls.captures_graphs:
            return (
                f"compile={run.calls.compile!r} captures graphs of its own; "
                "'max-autotune-no-cudagraphs' leaves that to the loop"
            )
        if run.noise.tensors is not None:
            return "noise is given; graphs generate it"
        if images.device.type == "cuda":
            with torch.cuda.device(images.device):
                if torch.cuda.is_current_stream_capturing():
                    return "the caller is capturing a graph of its own"
        if choice == "auto":
            for model in run.models:
                if isinstance(model, NetworkForm):
                    model = model.network
                if model is not None and module_of(model) is None:
                    return (
                        "a model is a plain callable, whose tensors may move unseen; make it a "
                        "module, or ask for cuda_graph=True if they stay where they are"
                    )
        return None

    def _loop(self, run: Run, images: Tensor, choice: bool | str) -> CapturedLoop | None:
        places = _places(run)
        if places != self._places:  # captured addresses would be stale
            self._loops.clear()
            self._recorders.clear()  # a memory pool ends with the last of its graphs
            self._places = places
        device = images.device.type
        cast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        layout = images.is_contiguous(memory_format=torch.channels_last)
        kind = (images.shape, images.dtype, images.device, layout, id(run.tables))
        options = run.options
        calls = (options.backend, options.precision, options.channels_last, options.compile)
        key = (*kind, cast, calls, _algorithms())
        known = self._loops.get(key)
        if known is None and choice == "auto" and key not in self._loops:
            self._keep(key, None)
            self.reason = "the first run of this kind; the next is captured"
            return None
        if known is None or (isinstance(known, str) and choice is True):
            known = self._captured(run, images, choice)
        self._keep(key, known)
        if isinstance(known, str):
            self.reason = known
            return None
        return known

    def _captured(self, run: Run, images: Tensor, choice: bool | str) -> CapturedLoop | str:
        recorder = self.recorder(images.device)
        assert recorder is not None
        try:
            with _capturing(images.device):
                return CapturedLoop(run, images, recorder)
        except CaptureError as error:
            reason = f"the step cannot be captured ({error})"
            self._recorders.pop(images.device, None)  # its pool may still be in use
            if choice is True:
                raise RuntimeError(f"cuda_graph=True: {reason}") from error
            warn(f"the loop runs without CUDA graphs: {reason}")
            return reason

    def _keep(self, key: Any, loop: CapturedLoop | str | None) -> None:
        self._loops[key] = loop
        self._loops.move_to_end(key)
        while len(self._loops) > _KEPT:
            self._loops.popitem(last=False)


def _check_eager(reason: str, choice: bool | str) -> None:
    """Raises ValueError, with the reason of an eager run, where graphs were asked for."""
    if choice is True:
        raise ValueError(f"cuda_graph=True: {reason}")


def _algorithms() -> tuple[Any, ...]:
    """PyTorch's flags of the process by which it chooses kernels, once and for all in a graph."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.fp32_precision,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.deterministic,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def _places(run: Run) -> tuple[Any, ...]:
    """Where the models' tensors are, and their modules' modes: what a graph takes for granted."""
    places: list[Any] = []
    for model in run.models:
        places.append(id(model))
        module = module_of(model)
        for part in () if module is None else module.modules():
            places.append(part.training)
            for tensors in (part._parameters, part._buffers, vars(part)):
                places += [
                    (tensor.data_ptr(), tensor.dtype, tensor.stride())
                    for tensor in tensors.values()
                    if isinstance(tensor, Tensor)
                ]
    return tuple(places)
