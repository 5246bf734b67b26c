"""Models that the evaluation's tests load by name, and the faults they can be told to have.

Not a test. `COUP_FAST_TEST_FAULT` holds "WHAT:RANK:CALLS": once the score network of that rank has
been called CALLS times, it returns NaN ("nan"), kills its process ("kill"), sends it SIGINT
("interrupt") or waits for a minute ("hang").
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn

import coup_fast
from helpers import tiny


class Fault:
    """What goes wrong after how many calls; no plain value, so no part of a model's identity."""

    def __init__(self, what: str, calls: int) -> None:
        self.what, self.calls = what, calls


class Faulty(nn.Module):
    """A network with a fault."""

    def __init__(self, network: nn.Module, what: str, calls: int) -> None:
        super().__init__()
        self.network = network
        self.fault = Fault(what, calls)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.network(x, t)
        fault = self.fault
        fault.calls -= 1
        if fault.calls < 0:
            if fault.what == "nan":
                return out * torch.nan
            if fault.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.what == "interrupt" and fault.calls == -1:
                os.kill(os.getpid(), signal.SIGINT)
            if fault.what == "hang":
                time.sleep(60)
        return out


def load(score: str) -> tuple[coup_fast.ScoreModel, nn.Module]:
    """Tiny models whose results cannot depend on the batch."""
    network: nn.Module = tiny.PerSample(tiny.TinyNetwork(pull=6.0 if score == "ncsn" else 0.0))
    what, rank, calls = os.environ.get("COUP_FAST_TEST_FAULT", "none:0:0").split(":")
    faulty = Faulty(network, "", 0)
    if rank == os.environ.get("RANK", "0"):
        faulty = Faulty(network, what, int(calls))
    kind = "ncsn" if score == "ncsn" else "eps"
    return coup_fast.ScoreModel(faulty, kind=kind), tiny.PerSample(tiny.TinyClassifier())


OTHER_SCALE = 3.0


def load_other(score: str) -> tuple[coup_fast.ScoreModel, nn.Module]:
    """`load` with a classifier of other weights."""
    score_model, classifier = load(score)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_((OTHER_SCALE * parameter).roll(1, 0))
    return score_model, classifier


def images(count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 8, 8] and the labels that the classifier gives all but each fifth."""
    pixels = tiny.images(count)
    labels = tiny.TinyClassifier()(pixels).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return pixels, labels


def tables(count: int = 6, **changes: Any) -> dict[str, Any]:
    """A short evaluation of these models, as a TOML file would give it."""
    return {
        "models": "helpers.eval_models:load",
        "data": {"name": "images.npz", "images": count},
        "draws": 3,
        "batch_size": 2,
        "defence": [{"name": "COUP", "method": "coup", "options": {"num_steps": 2}}],
        "attack": [
            {"preset": "pgd40", "steps": 2, "eot": 2, "eps": 0.1},
            {"preset": "stopped", "steps": 2, "eot": 2, "eps": 0.1},
        ],
    } | changes


TOML = """
models = "helpers.eval_models:load"
draws = 3
batch_size = 2
[data]
name = "images.npz"
images = {images}
[[defence]]
name = "COUP"
method = "coup"
options = {{ num_steps = 2 }}
[[attack]]
preset = "pgd40"
steps = 2
eot = 2
eps = 0.1
"""
