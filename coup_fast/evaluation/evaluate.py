"""An evaluation from configuration to report: units of work in order, on one or more processes.

Rounds. For each group of as many batches as there are ranks, row after row, every rank computes its
batch of that row; rank 0 writes the results before the next round. So ranks work on units of equal
cost, all rows have seen the same images at any time, and an interruption costs each rank one batch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coup_fast.evaluation.arrays import checked_data
from coup_fast.evaluation.config import EvalConfig
from coup_fast.evaluation.distributed import World, local_device, world
from coup_fast.evaluation.provenance import package_code
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.sources import ModelLoader, given_loader, load_images, model_loader
from coup_fast.evaluation.state import EvaluationError, State, Unit, digest
from coup_fast.evaluation.work import Worker
from coup_fast.malloc import give_back_freed_memory
from coup_fast.score_model import ClassifierFunction, ScoreModel

Say = Callable[[str], None]


def evaluate(
    config: EvalConfig,
    out: Path | str,
    *,
    models: ModelLoader | tuple[ScoreModel, ClassifierFunction] | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    device: torch.device | str = "cpu",
    say: Say | None = None,
    timeout: float = 1800.0,
    report_only: bool = False,
    interval: float = 30.0,
) -> Report | None:
    """Run the missing part of an evaluation, and report the whole.

    Args:
        config: see `coup_fast.evaluation.config.from_dict`.
        out: the output folder. Its `state/` keeps every finished batch, so that the same call
            continues after a stop.
        models: a function of "vp" or "ncsn" that returns (ScoreModel, classifier), or one such
            pair, in place of what config.models names. Models stay on their devices.
        data: images [N, C, H, W] float32 in [0, 1] and labels [N], in place of config.data.
        device: where to compute. With several processes, "cuda" gives each of them a GPU.
        say: receives a line about each finished unit, on rank 0.
        timeout: seconds to wait for other ranks.
        report_only: compute nothing; report the batches that all rows have finished.
        interval: seconds after which `say` also hears how far an unfinished unit is.

    Returns:
        The report on rank 0, and None on the others. Under torchrun (or with a process group) the
        ranks share the work.

    Raises:
        ValueError: the configuration is wrong.
        TypeError: a value of the configuration is of the wrong kind.
        StateError: the state in `out` does not belong to this configuration, or is damaged.
        EvaluationError: something stopped the run on its way, such as a full disk, NaN from a
            network or a rank that died. What was finished before stays.
    """
    say = say or (lambda _: None)
    ticker = _Ticker(say, interval)
    package_code()  # as it is now, before hours of computing
    device = torch.device(device)
    with world(timeout, device) as ranks, _reproducible(config.threads):
        device = local_device(device)
        images, labels = (
            load_images(config.data) if data is None else checked_data(data, config.data.images)
        )
        load = model_loader(config.models, device) if models is None else given_loader(models)
        worker = Worker(config, images, labels, load, device, ticker.step)
        identity = worker.identity()
        state: State | None = None
        try:
            state, done = _open(ranks, Path(out) / "state", identity, report_only)
            if not report_only:
                _run_all(worker, ranks, state, done, ticker)
            return None if state is None else Report(config, identity, dict(state.done))
        finally:
            if state is not None:
                state.close()


class _Ticker:
    """Tells of finished units, and now and then how far the present one is."""

    def __init__(self, say: Say, interval: float) -> None:
        self.say, self.interval = say, interval
        self.unit, self.started, self.last = "", 0.0, 0.0

    def begin(self, unit: str) -> None:
        """From now on it is about this unit."""
        self.unit, self.started = unit, time.monotonic()
        self.last = self.started

    def step(self, what: str) -> None:
        """Part of a unit is done; said if nothing was for `interval` seconds."""
        now = time.monotonic()
        if self.unit and now - self.last >= self.interval:
            self.last = now
            self.say(f"{self.unit}: {what} ({now - self.started:.0f} s)")


def _open(
    ranks: World, folder: Path, identity: dict[str, Any], read_only: bool
) -> tuple[State | None, set[Unit]]:
    """Rank 0 opens the state; all learn which units are finished, or why it cannot be used."""
    own = digest(json.loads(json.dumps(identity)))
    identities = ranks.gather(own)
    state: State | None = None
    verdict: dict[str, Any] = {"error": None, "done": []}
    error: EvaluationError | None = None
    if ranks.rank == 0:
        try:
            different = [str(rank) for rank, other in enumerate(identities) if other != own]
            if different:
                raise EvaluationError(
                    f"rank {', '.join(different)} has another configuration, data, models or "
                    "versions than rank 0; all must be alike"
                )
            state = State(folder, identity, read_only)
            verdict["done"] = sorted(state.done)
        except EvaluationError as found:
            error, verdict["error"] = found, str(found)
    verdict = json.loads(ranks.broadcast(json.dumps(verdict)))
    if error is not None:
        raise error
    if verdict["error"] is not None:
        raise EvaluationError(f"rank 0: {verdict['error']}")
    return state, {(batch, row) for batch, row in verdict["done"]}


def rounds(batches: int, rows: int, ranks: int, done: set[Unit]) -> Iterator[dict[int, Unit]]:
    """The unfinished units of each round, by rank; rounds with nothing to do are left out."""
    for first in range(0, batches, ranks):
        for row in range(rows):
            units = {rank: (first + rank, row) for rank in range(min(ranks, batches - first))}
            todo = {rank: unit for rank, unit in units.items() if unit not in done}
            if todo:
                yield todo


def _run_all(
    worker: Worker, ranks: World, state: State | None, done: set[Unit], ticker: _Ticker
) -> None:
    config = worker.config
    total = len(worker.batches) * len(config.rows)
    if done and state is not None:
        ticker.say(f"{len(done)} of {total} batches were finished before")
    finished = len(done)
    for todo in rounds(len(worker.batches), len(config.rows), ranks.size, done):
        row = config.rows[next(iter(todo.values()))[1]]
        if state is not None:  # on rank 0
            ticker.begin(f"{finished + len(todo)}/{total}  {row.name}")
        messages = ranks.gather(json.dumps(_run_one(worker, ranks, todo.get(ranks.rank))))
        verdict = ""
        if state is not None:
            verdict = _keep(state, [json.loads(message) for message in messages], todo)
            finished += len(todo)
            seconds = max(json.loads(m)["run"]["seconds"] for m in messages)
            ticker.say(f"{finished}/{total}  {row.name}  {seconds:.1f} s")
        verdict = ranks.broadcast(verdict)
        if verdict:
            raise EvaluationError(verdict)


def _run_one(worker: Worker, ranks: World, unit: Unit | None) -> dict[str, Any]:
    """This rank's message of a round: a result, an error, or nothing to do."""
    start = time.perf_counter()
    result, error = None, None
    if unit is not None:
        try:
            result = worker.run(unit)
        except Exception as found:
            if ranks.size == 1:
                raise
            name = "" if isinstance(found, EvaluationError) else f"{type(found).__name__}: "
            error = f"rank {ranks.rank}: {name}{found}"
        give_back_freed_memory()
    run = {
        "seconds": round(time.perf_counter() - start, 3),
        "host": platform.node(),
        "rank": ranks.rank,
        "ranks": ranks.size,
        "process": os.getpid(),
        "code": package_code(),
    }
    return {"result": result, "error": error, "run": run}


def _keep(state: State, messages: list[dict[str, Any]], todo: dict[int, Unit]) -> str:
    """Write the results of a round; "" or what went wrong."""
    errors = [message["error"] for message in messages if message["error"]]
    for rank, unit in todo.items():
        message = messages[rank]
        if message["result"] is not None:
            try:
                state.add(unit, message["result"], message["run"])
            except EvaluationError as error:
                errors.append(str(error))
    return "; ".join(errors)


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """The same order of summation in every process: fixed threads, deterministic convolutions."""
    before = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cudnn.deterministic, cudnn.benchmark = flags
