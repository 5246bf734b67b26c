"""The training loop: optimiser, an average of the weights, checkpoints that resume exactly.

Knows nothing of scores or classes; an objective maps (network, images, labels, generator) to a
loss. The order of the data is a function of (seed, epoch) and the noise of (seed, step), so a run
that was killed and resumed ends with the same bits as one that was not, on the same machine and
with the same number of threads.

Several processes share each batch. Every one draws the random numbers of the whole batch and uses
those of its rows (a fifth argument of the objective), so a step is the same step on any number of
processes, but for rounding, dropout and the statistics of batch normalisation.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from coup_fast.evaluation.distributed import World
from coup_fast.files import lock
from coup_fast.training.batches import batches
from coup_fast.training.checkpoint import read_checkpoint, write_checkpoint
from coup_fast.training.optimizers import build_optimizer, set_learning_rate
from coup_fast.training.stopping import deferred_stop

_SCHEDULE = ("steps", "cooldown")  # fields of TrainConfig that change no step but by its rate
_TOLD_EVERY = 30.0  # seconds between two lines, where there is no terminal for a bar

Objective = Callable[..., Tensor]  # see the module's docstring
Watch = Callable[[int, float, float, nn.Module], str]  # step, seconds, loss, averaged network


@dataclass(frozen=True)
class TrainConfig:
    """What decides the result of a run, beside data, network and objective.

    The learning rate rises linearly over `warmup` steps and falls to zero along a half cosine. With
    `cooldown` it stays constant and falls to zero linearly over that share of the steps, the last
    ones: a run can then be given more or fewer steps until its fall begins.

    Args:
        steps: of the optimiser.
        batch_size: images in each step.
        learning_rate: at its highest.
        warmup: steps over which it rises.
        ema: decay of the averaged weights, per step.
        grad_clip: largest norm of a step's gradient.
        seed: of the order of images and of the noise.
        precision: "float32", "bfloat16" (autocast) or "auto" (bfloat16 where the hardware has it).
        cooldown: share of the steps, in (0, 1], or None for the half cosine.
        momentum: of SGD in Nesterov's form; None: Adam.
        weight_decay: of SGD.
        norm_bias_rate: of SGD, the learning rate of batch normalisation's biases over that of the
            other parameters.
        alternating_flip: mirror half of the images in the first epoch and the other half in the
            next, in turns (Jordan 2024, arXiv 2404.00498).
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    ema: float = 0.999
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    cooldown: float | None = None
    momentum: float | None = None
    weight_decay: float = 0.0
    norm_bias_rate: float = 1.0
    alternating_flip: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the given step, 0 <= step < steps."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        if self.cooldown is None:
            fall = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        else:
            fall = min(1.0, (self.steps - step) / max(1.0, self.cooldown * self.steps))
        return self.learning_rate * rise * fall


@dataclass
class TrainState:
    """Where a run stands; `history` holds (step, mean loss since the last entry).

    `loss_sum` and `loss_count` are of the steps since the last entry.
    """

    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0


def debiased_average(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """Update of an exponential moving average that gives the first weights no extra share.

    After n steps the average is Σ decay^(n-i) wᵢ / Σ decay^(n-i), i = 1 … n, so that a run shorter
    than 1 / (1 - decay) steps is averaged too and not held at its random start.
    """

    @torch.no_grad()
    def update(averages: Any, weights: Any, count: Tensor | int) -> None:
        share = (1.0 - decay) / (1.0 - decay ** (int(count) + 1))
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.lerp_(weight, share)
            else:  # a counter of batches
                average.copy_(weight)

    return update


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (AVX512-BF16 or AMX; CUDA sm_80+)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Trainer:
    """One run: `Trainer(...).run()` trains to the end and returns the averaged network.

    Args:
        network: initialised module; trained in place.
        objective: see the module's docstring; images and labels arrive on `device`.
        images: [N, C, H, W], uint8 or floats in [0, 1].
        labels: [N] int64.
        config: the numbers of the run.
        checkpoint: file to resume from if it exists; written after the first step that ends more
            than `save_every` seconds after the last writing, and at the end.
        identity: what else decides the result (network configuration, data set); a checkpoint
            of another identity or configuration is refused, unless the only difference is in
            the learning rates of steps that it has not taken yet.
        device: where to train.
        save_every: seconds between two writings of the checkpoint.
        log_every: steps between two entries of the history.
        progress: show a bar.
        watch: called on the first process, with the averaged network in eval mode; what it returns
            is shown with the progress.
        watch_every: steps between two of its calls.
        ranks: the processes that share each batch, of which the first writes the checkpoint. All
            need the same images and the same checkpoint file.

    Raises:
        ValueError: the checkpoint is damaged, without a checksum, or belongs to another run, or an
            argument is out of range, or the processes do not begin alike.
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: in `run`, after SIGINT or SIGTERM, when the step is at its end and the
            checkpoint is written.
        BlockingIOError: in `run`, while another process trains with this checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        images: Tensor,
        labels: Tensor,
        config: TrainConfig,
        *,
        checkpoint: Path | None = None,
        identity: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
        save_every: float = 60.0,
        log_every: int = 100,
        progress: bool = True,
        watch: Watch | None = None,
        watch_every: int = 0,
        ranks: World | None = None,
    ) -> None:
        self.ranks = ranks or World()
        if config.batch_size % self.ranks.size:
            raise ValueError(
                f"batch_size must be divisible by the number of processes, {self.ranks.size}, "
                f"which share each batch; got {config.batch_size}"
            )
        share = config.batch_size // self.ranks.size
        self.rows = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        first = self.ranks.rank == 0
        self.watch, self.watch_every = (watch if first else None), watch_every
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.objective = objective
        self.images, self.labels = images, labels
        self.config = config
        self.checkpoint = checkpoint
        self.save_every, self.log_every = save_every, log_every
        self.progress = progress and first
        self.bfloat16 = config.precision == "bfloat16" or (
            config.precision == "auto" and has_bfloat16(self.device)
        )
        self.identity = {**asdict(config), **(identity or {}), "bfloat16": self.bfloat16}
        self.average = AveragedModel(
            self.network, multi_avg_fn=debiased_average(config.ema), use_buffers=True
        )
        self.optimizer = build_optimizer(self.network, config)
        self.state = TrainState()
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
        self.parallel = self.network
        if self.ranks.size > 1:
            self._agree()
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.network, device_ids=devices)

    def _agree(self) -> None:
        """All processes begin the same run at the same step."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode())
        own = f"{self.state.step} {digest.hexdigest()}"
        said = self.ranks.gather(own)
        others = [str(rank) for rank, other in enumerate(said) if other != own]
        if others := self.ranks.broadcast(", ".join(others)):  # type: ignore[assignment]
            raise ValueError(
                f"process {others} has another configuration, data or checkpoint than process 0; "
                "all need the same files"
            )

    def run(self) -> nn.Module:
        """Train up to the last step, write the last checkpoint, return the averaged network."""
        writes = self.checkpoint is not None and self.ranks.rank == 0
        alone = lock(self.checkpoint) if writes and self.checkpoint else nullcontext()
        with alone, torch.random.fork_rng():
            self._run()
        averaged: nn.Module = self.average.module
        return averaged.eval()

    def _run(self) -> None:
        from tqdm import tqdm

        self.network.train()
        state, saved = self.state, time.monotonic()
        told = saved
        terminal = sys.stderr.isatty()
        if self.progress:
            print(self._start(), file=sys.stderr, flush=True)
        bar = tqdm(
            total=self.config.steps,
            initial=state.step,
            disable=not (self.progress and terminal),
            file=sys.stderr,
            unit="step",
            mininterval=1.0,
        )
        with deferred_stop() as asked_to_stop, bar:
            for step, images, labels, generator in batches(
                self.images, self.labels, self.config, state.step
            ):
                loss, stop = self._step(step, images, labels, generator, asked_to_stop)
                state.step = step + 1
                state.loss_sum += loss
                state.loss_count += 1
                bar.update()
                finished = state.step == self.config.steps
                if state.step % self.log_every == 0 or finished:
                    mean = state.loss_sum / state.loss_count
                    state.history.append((state.step, mean))
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    state.loss_sum, state.loss_count = 0.0, 0
                now = time.monotonic()
                if self._is_watched(finished):
                    self._tell(state.seconds + now - saved, bar)
                if now - saved > self.save_every or finished or stop:
                    state.seconds += now - saved
                    self.save()
                    saved = now
                if self.progress and not terminal and (now - told > _TOLD_EVERY or finished):
                    reached = f", loss {state.history[-1][1]:.4f}" if state.history else ""
                    line = f"step {state.step} of {self.config.steps}{reached}"
                    print(line, file=sys.stderr, flush=True)
                    told = now
                if stop and not finished:
                    raise KeyboardInterrupt(self._stopped())

    def _start(self) -> str:
        """What begins, in a line."""
        config, step = self.config, self.state.step
        if step == config.steps:
            return f"all {step} steps were finished before"
        return (
            f"{f'from step {step} of' if step else 'training'} {config.steps} steps of "
            f"{config.batch_size} images, learning rate {config.learning_rate:g}, "
            f"{'bfloat16' if self.bfloat16 else 'float32'}"
        )

    def _stopped(self) -> str:
        """What is left of a run that was asked to stop, in a line."""
        place = f"stopped at step {self.state.step} of {self.config.steps}"
        if self.checkpoint is None:
            return place
        return f"{place}, which {self.checkpoint} holds; the same command goes on there"

    def _is_watched(self, finished: bool) -> bool:
        if self.watch is None:
            return False
        return finished or (self.watch_every > 0 and self.state.step % self.watch_every == 0)

    def _tell(self, seconds: float, bar: Any) -> None:
        """Show the averaged network to whoever watches."""
        state = self.state
        loss = state.loss_sum / state.loss_count if state.loss_count else state.history[-1][1]
        assert self.watch is not None
        said = self.watch(state.step, seconds, loss, self.average.module.eval())
        if self.progress and said:
            bar.write(f"step {state.step}: {said}", file=sys.stderr)

    def save(self) -> None:
        """Write the checkpoint, replacing the old one only when the new one is on the disk."""
        if self.checkpoint is None or self.ranks.rank != 0:
            return
        content = {
            "identity": self.identity,
            "state": asdict(self.state),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_checkpoint(self.checkpoint, content)

    def _step(
        self,
        step: int,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        asked_to_stop: Callable[[], bool],
    ) -> tuple[float, bool]:
        """The loss of one step, and whether a process was asked to stop."""
        set_learning_rate(self.optimizer, self.config.learning_rate_at(step))
        # Dropout draws from the global generator.
        torch.manual_seed(generator.initial_seed() + self.ranks.rank)
        own = () if self.ranks.size == 1 else (self.rows,)
        images, labels = images.to(self.device), labels.to(self.device)
        with self._autocast():
            loss = self.objective(self.parallel, images, labels, generator, *own)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        mean = loss.detach() / self.ranks.size
        found = torch.stack([mean, torch.full_like(mean, float(asked_to_stop()))])
        if self.ranks.size > 1:
            dist.all_reduce(found)
        value, asked = found.tolist()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; lower the learning rate."
            )
        return value, asked > 0

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def _load(self, path: Path) -> None:
        content = read_checkpoint(path, self.device)
        old = {f.name: f.default for f in fields(TrainConfig) if f.name != "steps"}
        theirs = {**old, **content["identity"]}  # a field that is younger than the file
        names = [*self.identity, *(k for k in theirs if k not in self.identity)]
        differing = [k for k in names if theirs.get(k) != self.identity.get(k)]
        then = replace(self.config, **{k: theirs[k] for k in _SCHEDULE if k in theirs})
        taken = range(content["state"]["step"])
        if all(then.learning_rate_at(s) == self.config.learning_rate_at(s) for s in taken):
            differing = [k for k in differing if k not in _SCHEDULE]
        if differing:
            what = ", ".join(
                f"{k} ({theirs.get(k)!r}, now {self.identity.get(k)!r})"
                for k in sorted(differing, key=lambda name: name != "init")  # it explains the rest
            )
            raise ValueError(
                f"{path} belongs to another run: {what}; delete it or choose another --out."
            )
        self.network.load_state_dict(content["network"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        state = content["state"]
        self.state = TrainState(**{**state, "history": [tuple(h) for h in state["history"]]})
