"""The processes of a launch: who they are, what they tell each other, who has died.

In an evaluation, every rank hands its result to rank 0 after each round, which alone touches the
disk, and hears whether to go on. What travels are a few hundred bytes of text from the host's
memory, so gloo carries it on any machine; with CUDA the default group is NCCL's beside it, for
models that use it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from coup_fast.evaluation.state import EvaluationError

LATER = "The finished batches are kept: run the same command again to go on."


class World:
    """One process alone."""

    rank: int = 0
    size: int = 1

    def gather(self, message: str) -> list[str]:
        """The messages of all ranks in order, on rank 0; [] on the others."""
        return [message]

    def broadcast(self, message: str) -> str:
        """What rank 0 says."""
        return message

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, JSON data; None on the others if it raises there."""
        made, text = None, "null"
        if self.rank == 0:
            try:
                made = make()
                text = json.dumps(made)
            except BaseException:
                self.broadcast("null")
                raise
        said = self.broadcast(text)
        return made if self.rank == 0 else json.loads(said)


class Group(World):
    """The ranks of a torch.distributed launch.

    timeout: seconds to wait for a rank that is behind the others. later: what an error says about
    how to go on. Raises EvaluationError, naming the rank, when one has died or is too late.
    """

    def __init__(self, timeout: float, later: str = LATER) -> None:
        self.later = later
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout = timedelta(seconds=timeout)
        self.control: Any = dist.new_group(backend="gloo", timeout=self.timeout)

    def gather(self, message: str) -> list[str]:
        """See `World`."""
        self._meet()
        messages: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._named():
            dist.gather_object(message, messages, dst=0, group=self.control)
        return messages or []

    def broadcast(self, message: str) -> str:
        """See `World`."""
        messages = [message]
        with self._named():
            dist.broadcast_object_list(messages, src=0, group=self.control)
        return messages[0]

    def _meet(self) -> None:
        """A barrier that says who is missing."""
        with self._named():
            dist.monitored_barrier(self.control, self.timeout)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EvaluationError(self._who(str(error))) from error

    def _who(self, text: str) -> str:
        later = self.later
        missing = re.search(r"Ranks? (\d+(?:, \d+)*) failed to pass monitoredBarrier", text)
        only = "1" if self.rank == 0 and self.size == 2 else None  # whatever gloo says of it
        if ranks := missing[1] if missing else only:
            few = "," not in ranks
            return (
                f"rank{'' if few else 's'} {ranks} of {self.size} died or did not finish a batch "
                f"within {self.timeout.total_seconds():g} s of the others (--timeout). {later}"
            )
        if self.rank != 0:
            ended = "which died or ended with an error of its own"
            return f"rank {self.rank} lost contact with rank 0, {ended}. {later}"
        return f"rank 0 lost contact with another rank ({text.splitlines()[0]}). {later}"


@contextmanager
def world(timeout: float, device: torch.device, later: str = LATER) -> Iterator[World]:
    """The world that the environment describes: torchrun's (RANK, WORLD_SIZE, …), or one process.

    A process group that exists already is used and kept. Raises EvaluationError at once for ranks
    that cannot meet.
    """
    if dist.is_available() and dist.is_initialized():
        yield Group(timeout, later)
        return
    if _launched() == 1:
        yield World()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=max(timeout, 60)))
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise EvaluationError(f"the processes could not find each other: {first}") from error
    try:
        yield Group(timeout, later)
    finally:
        dist.destroy_process_group()


def _launched() -> int:
    """How many processes the environment says there are, its numbers checked."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    local = os.environ.get("LOCAL_RANK", "0")
    if rank is None:
        return 1
    numbers = all(re.fullmatch("[0-9]+", text) for text in (rank, size, local))
    if not numbers or not int(rank) < int(size):
        raise EvaluationError(
            "RANK must be one of 0 to WORLD_SIZE - 1 and LOCAL_RANK a number, got "
            f"RANK={rank!r}, WORLD_SIZE={size!r}, LOCAL_RANK={local!r}; torchrun sets them"
        )
    return int(size)


def local_device(device: torch.device) -> torch.device:
    """`cuda` becomes this rank's GPU where a launcher started several processes."""
    local = os.environ.get("LOCAL_RANK")
    if str(device) == "cuda" and local is not None:
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return device
