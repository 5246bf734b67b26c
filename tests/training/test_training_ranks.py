"""Training on two processes: the same network on both, as on one, and on from where a kill was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.scripts import environment
from PIL import Image
from torch import Tensor

from coup_fast.evaluation.distributed import World
from coup_fast.models import UNet
from coup_fast.models.unet import EnergyUNet
from coup_fast.score_model import EnergyModel
from coup_fast.training import runs
from coup_fast.training.checkpoint import read_checkpoint
from coup_fast.training.recipes import RECIPES
from coup_fast.training.trainer import TrainConfig, Trainer

HERE = Path(__file__).resolve().parent
STEPS, KILLED_AT = 6, 4


def trainer(kind: str, checkpoint: Path | None, ranks: World | None = None, **more: Any) -> Trainer:
    """A few steps of a tiny network on 24 random images."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8)
    network = UNet(1, [4, 4]) if kind == "eps" else EnergyModel(EnergyUNet(1, [4, 4]))
    config = TrainConfig(
        STEPS, batch_size=8, learning_rate=1e-2, warmup=1, ema=0.5, precision="float32"
    )
    return Trainer(
        network,
        runs._objective("score", kind, RECIPES["mnist", "score"], flip=True),
        images,
        torch.zeros(24, dtype=torch.int64),
        config,
        checkpoint=checkpoint,
        save_every=0.0,
        log_every=2,
        progress=False,
        ranks=ranks,
        **more,
    )


def state_of(one: Trainer) -> dict[str, Tensor]:
    average = {f"average {name}": x for name, x in one.average.state_dict().items()}
    return {**one.network.state_dict(), **average}


def main(folder: Path, kind: str, kill_at: int) -> None:
    """What each process of a launch runs."""
    from coup_fast.evaluation.distributed import world

    with world(120, torch.device("cpu")) as ranks:
        one = trainer(kind, folder / "run.checkpoint", ranks)
        begun = one.state.step
        objective = one.objective

        def deadly(*arguments: Any) -> Tensor:
            if one.state.step == kill_at and ranks.rank == 1:
                os.kill(os.getpid(), getattr(signal, os.environ.get("SENT", "SIGKILL")))
            return objective(*arguments)

        one.objective = deadly
        one.run()
        content = {"state": state_of(one), "history": one.state.history, "begun": begun}
        torch.save(content, folder / f"rank{ranks.rank}.pt")


def launch(*words: str, processes: int = 2, **more: str) -> subprocess.CompletedProcess[str]:
    """`torchrun` of these words on two processes that see one another by gloo."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, f"--nproc-per-node={processes}", *words],
        env=environment(HERE, OMP_NUM_THREADS="1", **more),
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_two_processes_train_one_network(tmp_path: Path, kind: str) -> None:
    done = launch(__file__, str(tmp_path), kind, "-1")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["history"] == second["history"]
    whole = trainer(kind, None)
    untrained = {name: x.clone() for name, x in state_of(whole).items()}
    whole.run()
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        torch.testing.assert_close(tensor, state_of(whole)[name], rtol=2e-3, atol=2e-4, msg=name)
    moved = [
        not torch.allclose(x, untrained[name], atol=2e-3) for name, x in state_of(whole).items()
    ]
    assert sum(moved) > len(moved) / 2
    for (step, loss), (also, other) in zip(first["history"], whole.state.history, strict=True):
        assert step == also
        assert loss == pytest.approx(other, rel=1e-4)


def test_a_killed_launch_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    done = launch(__file__, str(tmp_path / "killed"), "eps", str(KILLED_AT))
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "-9" in done.stderr
    assert not (tmp_path / "killed" / "rank0.pt").exists()
    for name in ("killed", "whole"):
        assert launch(__file__, str(tmp_path / name), "eps", "-1").returncode == 0
    resumed, whole = (torch.load(tmp_path / name / "rank1.pt") for name in ("killed", "whole"))
    assert resumed["begun"] == KILLED_AT
    assert resumed["history"] == whole["history"]
    for name, tensor in resumed["state"].items():
        assert torch.equal(tensor, whole["state"][name]), name


def test_processes_stop_at_the_same_step_when_one_is_asked_to(tmp_path: Path) -> None:
    done = launch(__file__, str(tmp_path), "eps", str(KILLED_AT), SENT="SIGTERM")
    assert done.returncode != 0
    assert done.stderr.count(f"KeyboardInterrupt: stopped at step {KILLED_AT + 1} of {STEPS}") == 2
    content = read_checkpoint(tmp_path / "run.checkpoint", torch.device("cpu"))
    assert content["state"]["step"] == KILLED_AT + 1


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    ranks = World()
    ranks.size = 3
    with pytest.raises(ValueError, match=r"batch_size must be divisible by .* 3, .* got 8"):
        trainer("eps", None, ranks)


def test_processes_that_begin_otherwise_are_named() -> None:
    class Other(World):
        size = 2

        def gather(self, message: str) -> list[str]:
            return [message, "0 another"]

    with pytest.raises(ValueError, match="process 1 has another configuration, data or checkpoint"):
        trainer("eps", None, Other())


def test_the_command_trains_a_folder_on_two_processes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    out = tmp_path / "net.safetensors"
    words = ["-m", "coup_fast", "train", "score", "--data", str(tmp_path / "photos")]
    words += ["--steps", "3", "--batch-size", "4", "--channels", "4", "--out", str(out)]
    done = launch(*words, "--watch", str(tmp_path / "log"), "--json", str(tmp_path / "facts.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images from 11, ") == 1  # one of twelve is held out; said once
    assert out.exists()
    assert (tmp_path / "facts.json").exists()
    assert len((tmp_path / "log" / "metrics.csv").read_text().splitlines()) == 4
    assert list((tmp_path / "log").glob("strip-0000003.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
