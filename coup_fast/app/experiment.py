"""What the page does with a picture: attack it if wanted, purify it, classify it all along."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from coup_fast.app.bench import Bench
from coup_fast.app.pictures import Chosen
from coup_fast.attacks import PGD
from coup_fast.purifier import Purifier

ATTACK_STEPS = 40
_CLASSIFIED = 64  # states at a time


@dataclass(frozen=True)
class Choices:
    """What a user has chosen. epsilon: radius of the attack ("8/255", 0.1); None: no attack."""

    method: str
    options: Mapping[str, Any]
    seed: int = 0
    epsilon: str | float | None = None


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a run is: `done` of `total` steps, and the state [C, H, W] then.

    While the picture is attacked, there is no state. attacked: [C, H, W]; None without an attack.
    """

    done: int
    total: int
    state: Tensor | None = None
    attacked: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Views:
    """The classifier's probabilities: of the input [K], the attacked picture [K] (None without an
    attack), and each state [steps + 1, K].
    """

    original: Tensor
    attacked: Tensor | None
    states: Tensor


@dataclass(frozen=True, eq=False)
class Result:
    """A run that has ended.

    chosen: the picture. attacked: [C, H, W], None without an attack. states: float32
    [steps + 1, C, H, W], from the start (after the forward noise, where the method has one) to the
    purified picture; values may leave [0, 1]. seconds: of each step. views: None without a
    classifier. purifier: what ran; its options say with which settings. epsilon: of the attack.
    """

    chosen: Chosen
    attacked: Tensor | None
    states: Tensor
    seconds: tuple[float, ...]
    views: Views | None
    purifier: Purifier
    epsilon: float | None

    @property
    def steps(self) -> int:
        """Steps that were taken; an adaptive method may stop before its last."""
        return len(self.states) - 1

    @property
    def seconds_per_step(self) -> float:
        """The median; the first step of a first run also pays for what is set up once."""
        return median(self.seconds)


def experiment(bench: Bench, chosen: Chosen, choices: Choices) -> Iterator[Progress | Result]:
    """Attack and purify one picture; the last item is the `Result`.

    The purified picture is that of `Purifier` for sample id 0 and draw 0. The attack is PGD on the
    classifier, away from the class that it sees; it knows nothing of the purifier, so it is weak.

    Raises ValueError or TypeError for options that are not possible, before any network is called,
    and FloatingPointError for a result that is not finite.
    """
    pixels = chosen.pixels
    purifier = bench.purifier(choices.method, choices.options, choices.seed, pixels.shape)
    original = pixels[None].to(bench.device)
    attacked, epsilon = None, None
    if choices.epsilon is not None:
        attack = _attack(bench, choices.epsilon)
        yield Progress(0, ATTACK_STEPS)
        assert bench.classifier is not None
        with torch.no_grad():
            seen = bench.classifier(original).argmax(1)
        attacked, epsilon = attack(bench.classifier, original, seen), attack.eps
    start = original if attacked is None else attacked
    after = None if attacked is None else attacked[0].cpu()
    states, seconds = [], list[float]()
    total = purifier.plan.num_steps
    began = time.perf_counter()
    for k, state in purifier.trajectory(start):
        _wait(bench.device)
        if k:
            seconds.append(time.perf_counter() - began)
        states.append(state[0].float().cpu())
        yield Progress(k, total, states[-1], after)
        began = time.perf_counter()
    if not bool(states[-1].isfinite().all()):
        broken = next(k for k, state in enumerate(states) if not bool(state.isfinite().all()))
        raise FloatingPointError(
            f"the picture has infinite or undefined pixels from step {broken} on: take a smaller λ "
            "or more steps"
        )
    kept = torch.stack(states)
    views = None
    if bench.classifier is not None:
        views = Views(
            _classified(bench, original)[0],
            None if attacked is None else _classified(bench, attacked)[0],
            _classified(bench, kept),
        )
    yield Result(chosen, after, kept, tuple(seconds), views, purifier, epsilon)


def _attack(bench: Bench, epsilon: str | float) -> PGD:
    """PGD in an ℓ∞ ball: a random start and 40 steps of 2.5 ε / 40, as Madry et al. have it."""
    if bench.classifier is None:
        raise ValueError("an attack needs a classifier: start the page with --classifier")
    radius = PGD(eps=epsilon, steps=1, eot=1).eps  # type: ignore[arg-type]  # text is read there
    return PGD(eps=radius, step_size=2.5 * radius / ATTACK_STEPS, steps=ATTACK_STEPS, eot=1)


def _classified(bench: Bench, images: Tensor) -> Tensor:
    """Probabilities [B, K] of pixels [B, C, H, W], on the CPU."""
    assert bench.classifier is not None
    with torch.no_grad():
        parts = [
            bench.classifier(images[i : i + _CLASSIFIED].to(bench.device)).float().softmax(1).cpu()
            for i in range(0, len(images), _CLASSIFIED)
        ]
    probabilities = torch.cat(parts)
    if not math.isfinite(float(probabilities.sum())):
        raise FloatingPointError("the classifier's scores are not finite")
    return probabilities


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
