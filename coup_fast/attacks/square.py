"""Square: a search without gradients, made for random defences.

The candidates are those of Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a
query-efficient black-box adversarial attack via random search" (ECCV 2020). Numbers that the paper
leaves open are those of its released code, which however never places a square at the last row or
column, as the paper and this file do. For a random defence the rest is ours, since one score says
little:

- A candidate's loss is the mean over `eot` draws. It is accepted if that mean is higher than the
  mean of the present image under the same, fresh draws, so no lucky draw is ever kept as a record.
- It does not stop at the first success.
- Every random number is a counter of the image's sample id, so a result does not depend on the
  batch.

What this attack finds and a gradient attack does not is a sign that gradients are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.attacks.attack import Attack, Rule, Task
from coup_fast.attacks.ball import Ball, l2_norms, ordered_sum
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import Evaluation, Objective
from coup_fast.attacks.options import Keep, LossName
from coup_fast.attacks.result import FIRST_ATTACK_DRAW, FIRST_START_DRAW, AttackResult, Progress
from coup_fast.noise import sample_keys, uniform, words

# After these shares of the queries the area of a square is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000
_DECIDED = (
    *("gradient", "random_start", "restarts", "keep", "targeted", "normalise_draws"),
    *("draw_weights", "gradient_averaging", "low_frequency", "deviation"),
)


@dataclass(frozen=True, repr=False)
class Square(Attack):
    """Random search over squares of pixels, accepted on improvement of the mean loss.

    On a random defence each step classifies 2 · eot draws of an image, and on a deterministic one
    (noise="fixed", or a model that is found to be so) one candidate.

    Args:
        steps: the number of candidates (queries).
        eot: the draws behind each comparison.
        p_init: the share of the pixels that the first squares cover, in (0, 1].
        stop_when_fooled: whether an image rests once all `eot` draws are misclassified; with a
            deterministic defence this is the published attack's stop.
    """

    steps: int = 1000
    eot: int = 4
    loss: LossName = "margin"
    keep: Keep = "best"
    p_init: float = 0.8

    _decided = _DECIDED
    _refused = ("targets", "surrogate")

    def __post_init__(self) -> None:
        super().__post_init__()
        p_init = checks.number("p_init", self.p_init, 0, 1, above=True)
        object.__setattr__(self, "p_init", p_init)

    @property
    def _how(self) -> str:
        return "no"

    def rule(self, ball: Ball) -> Rule:
        """It has none: it takes no gradient."""
        raise TypeError("Square runs by itself; call it, or its `run`")

    def share(self, query: int) -> float:
        """The share of the pixels that the square of a query covers."""
        at = int(query / self.steps * 10_000)
        return self.p_init * 0.5 ** sum(at > border for border in _HALVINGS)

    def _search(self, task: Task) -> AttackResult:
        """`run`, of checked arguments; no graph is kept, so memory_budget does nothing."""
        loss = LOSSES[self.loss]
        options = (self.eot, self.through_vote, task.memory_budget)
        objective = Objective(task.defended, task.labels, task.ids, loss, "exact", *options)
        ball = Ball(task.images, self.norm, self.eps)
        squares = _Squares(self, ball, task.ids)
        if len(task.images):
            found, at_best = self._climb(objective, squares, task.init, task.progress)
        else:
            found, at_best = task.images.clone(), Evaluation(*[task.images.new_zeros(0)] * 3)
        ball.check(found)
        return AttackResult(
            found,
            at_best.loss,
            at_best.fooled,
            0,
            0,
            objective.score_evaluations,
            objective.classifier_evaluations,
            objective.draws,
            int((at_best.fooled == 1).sum()) if self.stop_when_fooled else 0,
        )

    def _climb(
        self,
        objective: Objective,
        squares: _Squares,
        init: Tensor | None,
        progress: Callable[[Progress], None] | None,
    ) -> tuple[Tensor, Evaluation]:
        """The best image and what it came to."""
        fixed, ball = self.noise == "fixed", squares.ball
        first = 0 if fixed else FIRST_ATTACK_DRAW * (1 + self.seed)
        objective.settle(ball.centre, first, fixed=fixed, asks=True)
        # Where each evaluation gives the same, what is known of the present image stays true.
        repeats = fixed or objective.repeats
        best = ball.project(squares.start() if init is None else init)
        at_best = objective.value(best, first)
        for query in range(self.steps):
            live = ~(at_best.fooled == 1) if self.stop_when_fooled else at_best.fooled >= 0
            rows = live.nonzero()[:, 0]
            if not len(rows):
                break
            candidates = ball.project(squares.candidates(best, query))
            draw = first if fixed else first + (query + 1) * objective.draws_used
            with objective.only(rows):
                tried = objective.value(candidates[rows], draw)
                if not repeats:
                    _put(at_best, rows, objective.value(best[rows], draw))
            better = tried.loss > at_best.loss[rows]
            if repeats:  # as published: a success is taken, whatever its loss is, and kept
                better &= at_best.fooled[rows] < 1
                better |= tried.fooled == 1
            taken = rows[better]
            best[taken] = candidates[taken]
            _put(at_best, taken, _of(tried, better))
            if progress is not None:
                loss, fooled = float(at_best.loss.mean()), float(at_best.fooled.mean())
                progress(Progress(query + 1, self.steps, loss, fooled))
        return best, at_best


def _put(whole: Evaluation, rows: Tensor, part: Evaluation) -> None:
    whole.loss[rows], whole.fooled[rows] = part.loss, part.fooled


def _of(part: Evaluation, rows: Tensor) -> Evaluation:
    return replace(part, loss=part.loss[rows], fooled=part.fooled[rows])


class _Squares:
    """The candidates of a batch: all random numbers are counters of sample ids.

    Query number q of an image takes the words at offset q · blocks of its key; the start is q = -1,
    before the first.
    """

    def __init__(self, attack: Square, ball: Ball, ids: Tensor) -> None:
        self.attack, self.ball = attack, ball
        self.keys = sample_keys(attack.seed, ids, FIRST_START_DRAW)
        _, channels, height, width = ball.centre.shape
        self.tiles = _tiles(height, width) if attack.norm == "l2" else []
        most = channels * width
        if attack.norm == "l2":
            most = max(len(self.tiles) * (channels + 1), channels + 5)
        self.blocks = (max(most, channels + 2) + 3) // 4

    def numbers(self, query: int, count: int) -> Tensor:
        """float32 [B, count] in (0, 1] for a query."""
        offsets = torch.full_like(self.keys, (query + 1) * self.blocks)
        return uniform(words(torch.stack((self.keys, offsets), 1), count))

    def start(self) -> Tensor:
        """Stripes of one pixel's width (ℓ∞), or a grid of windows (ℓ2), at full length."""
        centre, eps = self.ball.centre, self.attack.eps
        batch, channels, _, width = centre.shape
        if self.attack.norm == "linf":
            signs = _signs(self.numbers(-1, channels * width)).reshape(batch, channels, 1, width)
            return centre + eps * signs.to(centre.dtype)
        given = self.numbers(-1, len(self.tiles) * (channels + 1))
        delta = torch.zeros_like(centre)
        for number, (top, left, side) in enumerate(self.tiles):
            mine = given[:, number * (channels + 1) :]
            window = _windows(side, mine[:, 0], centre)
            signs = _signs(mine[:, 1 : channels + 1]).to(centre.dtype)[:, :, None, None]
            delta[:, :, top : top + side, left : left + side] += window[:, None] * signs
        return centre + eps * delta / (_norms(delta) + 1e-12)

    def candidates(self, images: Tensor, query: int) -> Tensor:
        """One candidate for each image, not yet projected."""
        return (self._linf if self.attack.norm == "linf" else self._l2)(images, query)

    def _linf(self, images: Tensor, query: int) -> Tensor:
        """A square where each channel moves by ±2 eps."""
        _, channels, height, width = images.shape
        area = self.attack.share(query) * height * width
        side = min(max(round(math.sqrt(area)), 1), height, width)
        given = self.numbers(query, channels + 2)
        inside = _inside(images, side, _place(given[:, 0], height - side), given[:, 1])
        signs = _signs(given[:, 2:]).to(images.dtype)[:, :, None, None]
        return images + 2 * self.attack.eps * signs * inside

    def _l2(self, images: Tensor, query: int) -> Tensor:
        """Two windows: one is emptied, and its length moves to the other and a new pattern."""
        batch, channels, height, width = images.shape
        eps = self.attack.eps
        area = self.attack.share(query) * height * width
        side = max(round(math.sqrt(area)), 3) // 2 * 2 + 1
        side = min(side, height, width)
        given = self.numbers(query, channels + 5)
        delta = images - self.ball.centre
        place = _place(given[:, 0], height - side)
        inside = _inside(images, side, place, given[:, 1])
        other = _inside(images, side, _place(given[:, 2], height - side), given[:, 3])
        rows = place[:, None] + torch.arange(side, device=images.device)
        left = _place(given[:, 1], width - side)
        columns = left[:, None] + torch.arange(side, device=images.device)
        one = torch.arange(batch, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        window = (one, channel, rows[:, None, :, None], columns[:, None, None, :])
        old = delta[window]
        signs = _signs(given[:, 5:]).to(images.dtype)[:, :, None, None]
        new = _windows(side, given[:, 4], images)[:, None] * signs
        new = new + old / (1e-12 + _window_norms(old))
        unused = (eps**2 - _norms(delta) ** 2).clamp_min(0)
        freed = _norms(delta * torch.maximum(inside, other)) ** 2
        new = new / (1e-12 + _window_norms(new)) * (unused / channels + freed).sqrt()
        delta = delta * (1 - other)
        delta[window] = new
        return self.ball.centre + eps * delta / (_norms(delta) + 1e-12)


def _signs(numbers: Tensor) -> Tensor:
    """±1, each with probability 1/2."""
    return torch.where(numbers > 0.5, 1.0, -1.0)


def _place(number: Tensor, free: int) -> Tensor:
    """int64 [B] in [0, free], each with the same probability."""
    return (number * (free + 1)).long().clamp_max(free)


def _inside(images: Tensor, side: int, top: Tensor, across: Tensor) -> Tensor:
    """1 within each image's square and 0 elsewhere: [B, 1, H, W]."""
    _, _, height, width = images.shape
    left = _place(across, width - side)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = (y >= top[:, None]) & (y < top[:, None] + side)
    columns = (x >= left[:, None]) & (x < left[:, None] + side)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(images.dtype)


def _norms(values: Tensor) -> Tensor:
    """ℓ2 norm of each sample, [B, 1, 1, 1]."""
    return l2_norms(values).to(values.dtype)[:, None, None, None]


def _window_norms(values: Tensor) -> Tensor:
    """ℓ2 norm of each channel, [B, C, 1, 1]."""
    squares = values.double().flatten(2).square()
    return ordered_sum(squares).sqrt().to(values.dtype)[:, :, None, None]


def _tiles(height: int, width: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of the windows at the start: five along the height."""
    side = max(height // 5, 1)
    begin = max((height - 5 * side) // 2, 0)
    return [
        (begin + i * side, begin + j * side, side)
        for i in range(height // side)
        for j in range(width // side)
        if begin + (i + 1) * side <= height and begin + (j + 1) * side <= width
    ]


def _windows(side: int, number: Tensor, like: Tensor) -> Tensor:
    """The paper's η for each image, [B, side, side]: two pyramids of opposite signs, norm 1.

    One stands above the other, or, where number > 0.5, beside it.
    """
    pattern = torch.zeros(side, side, dtype=like.dtype, device=like.device)
    half = side // 2
    if half:
        pattern[:half] = _pyramid(half, side, like)
    pattern[half:] = -_pyramid(side - half, side, like)
    pattern = pattern / pattern.square().sum().sqrt()
    return torch.where((number > 0.5)[:, None, None], pattern.T, pattern)


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    """Nested rectangles around the middle, the k-th adding 1 / (k + 1)², norm 1."""
    values = torch.zeros(height, width, dtype=like.dtype, device=like.device)
    top, left = height // 2, width // 2
    for k in range(max(height, width) // 2 + 1):
        rows = slice(max(top - k, 0), min(top + k + 1, height))
        columns = slice(max(left - k, 0), min(left + k + 1, width))
        values[rows, columns] += 1 / (k + 1) ** 2
    return values / values.square().sum().sqrt()
