"""A run that is asked to stop does so at the end of a step, keeps it, and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coup_fast.training.checkpoint import read_checkpoint
from coup_fast.training.stopping import SIGNALS, deferred_stop
from coup_fast.training.trainer import TrainConfig, Trainer

STEPS = 12


def loss(network: nn.Module, images: Tensor, labels: Tensor, _: torch.Generator) -> Tensor:
    return nn.functional.cross_entropy(network(images), labels)


def trainer(checkpoint: Path | None = None, objective: Callable[..., Tensor] = loss) -> Trainer:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    return Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
        objective,
        torch.rand((8, 1, 2, 2), generator=rng),
        torch.randint(0, 2, (8,), generator=rng),
        TrainConfig(STEPS, batch_size=4, precision="float32"),
        checkpoint=checkpoint,
        save_every=1e9,  # at the end alone
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_run_loses_nothing(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    file = tmp_path / "run.checkpoint"
    running = trainer(file)

    def asked(*arguments: Any) -> Tensor:
        if running.state.step == 6:
            signal.raise_signal(number)
        return loss(*arguments)

    running.objective = asked
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step 7 of {STEPS}, which .*{file}"):
        running.run()
    assert signal.getsignal(number) is handler
    assert read_checkpoint(file, torch.device("cpu"))["state"]["step"] == 7
    assert capsys.readouterr().err.startswith(f"training {STEPS} steps of 4 images, learning rate")
    resumed, whole = trainer(file), trainer()
    resumed.run()
    assert f"from step 7 of {STEPS} steps of 4 images" in capsys.readouterr().err
    whole.run()
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name
    trainer(file).run()
    assert f"all {STEPS} steps were finished before" in capsys.readouterr().err


def test_the_second_interrupt_does_not_wait() -> None:
    with deferred_stop() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    found: list[Any] = []

    def run() -> None:
        with deferred_stop() as asked:
            found.extend([asked(), *(signal.getsignal(number) for number in SIGNALS)])

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, *before]
