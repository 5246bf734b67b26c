"""The defended model: purify, classify, vote over draws. What attacks and users call."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast._torch.calls import called
from coup_fast._torch.differentiated import differentiated, in_backward
from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.locks import ForkLock
from coup_fast._torch.modules import described, in_dtype_of
from coup_fast._torch.reachable import modules_behind
from coup_fast.purifier import Purifier
from coup_fast.run import validation
from coup_fast.run.assumptions import check_logits, refuse_training_mode
from coup_fast.run.driver import CalledAgainError, Drivable
from coup_fast.run.first_look import look_at_classifier
from coup_fast.run.progress import ProgressOption
from coup_fast.run.sample_ids import fresh_draw
from coup_fast.score_model import ClassifierFunction

VOTES = ("logits", "softmax", "majority")
MAX_DRAWS = 2**20  # of one call; memory ends long before

_lock = ForkLock()  # of every `next_draw`


def combine_votes(logits: Tensor, vote: str) -> Tensor:
    """One row of scores per image from the logits of its draws, [D, B, K] -> [B, K].

    "logits" takes their mean. "softmax" takes the log of the mean of their softmax, so that the
    softmax of the result is that mean, and cross-entropy keeps its meaning. "majority" takes each
    class's share of the draws' votes; argmax breaks ties towards the lower class. A share is
    constant almost everywhere, so its gradient is that of the mean softmax (straight through).
    """
    if vote == "logits":
        return logits.mean(0)
    log_probability = torch.log_softmax(logits, dim=2)
    if vote == "softmax":
        return torch.logsumexp(log_probability, dim=0) - math.log(len(logits))
    winners = logits.detach().argmax(2, keepdim=True)
    share = torch.zeros_like(logits.detach()).scatter_(2, winners, 1.0).mean(0)
    if not logits.requires_grad:
        return share
    probability = log_probability.exp().mean(0)
    return share + (probability - probability.detach())


def _walk_back(logits: Tensor, pixels: Tensor) -> None:
    """Raises RuntimeError, naming the classifier, where its graph cannot be walked.

    To be called when parameters are trainable again, as they are in the caller's backward pass.
    """
    if logits.requires_grad:
        nothing = torch.zeros_like(logits)
        with differentiated("the classifier"):
            torch.autograd.grad(logits, pixels, nothing, retain_graph=True, allow_unused=True)


class PurifiedClassifier(Drivable, nn.Module):
    """A classifier behind a purifier: pixels [B, C, H, W] -> scores [B, K], like any classifier.

    Args:
        purifier: the `Purifier`.
        classifier: module or callable, pixels -> logits [B, K].
        num_draws: independently purified copies of each image, in [1, 2^20], run as one batch, or
            in parts of the purifier's `max_batch`.
        vote: "logits", "softmax" or "majority"; see `combine_votes`.
        fresh_draws: with False a call is a function of its arguments, so the same call twice gives
            the same scores; to an attack this is a defence with fixed noise. With True every call
            uses the next `num_draws` draws, as a randomised defence does and as attacks that
            average over its randomness (EOT) must see it. Each object, process and rank begins at
            another draw, which `torch.manual_seed` makes repeatable
            (`coup_fast.run.sample_ids.fresh_draw`). `next_draw` tells the next draw, and
            `reset_draws` sets it. A copy continues where the original is.

    Without sample ids an image's noise belongs to its position in the batch. An attack that drops
    images on its way then changes the noise of those that remain, and successive calls give the
    same noise to different images. `sample_ids="content"` names images by their pixels.

    The object owns the parameters of its models, so attack libraries find its device through them.
    They are never differentiated, and train/eval mode and requires_grad flags stay as they are. It
    works under `no_grad`. It is differentiable with respect to images that require grad, and to
    nothing else: to train a classifier on purified images, call `classifier(purifier(images))`.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifier: ClassifierFunction,
        num_draws: int = 1,
        vote: str = "logits",
        *,
        fresh_draws: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            raise TypeError(f"purifier must be a coup_fast.Purifier, got {type(purifier).__name__}")
        if not callable(classifier):
            raise TypeError(
                f"classifier must be a module or a callable, got {type(classifier).__name__}"
            )
        self.purifier = purifier
        self.classifier = classifier
        self.num_draws = checks.integer("num_draws", num_draws, 1, MAX_DRAWS)
        self.vote = checks.choice("vote", vote, VOTES)
        self.fresh_draws = checks.flag("fresh_draws", fresh_draws)
        self._next_draw: int | None = None

    def with_purifier(self, purifier: Purifier) -> PurifiedClassifier:
        """The same defence around another purifier; its draws go on from where these are."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # submodules and hooks are its own from here on
                vars(other)[name] = copy.copy(value)
        other.purifier = purifier
        return other

    @property
    def next_draw(self) -> int:
        """The draw at which the next call with `fresh_draws` begins; chosen at its first use."""
        if self._next_draw is None:
            if not self.fresh_draws:
                return 0
            self._next_draw = fresh_draw()
        return self._next_draw

    @next_draw.setter
    def next_draw(self, draw: int) -> None:
        self._next_draw = checks.integer("next_draw", draw, 0, checks.MAX_INT64)

    def reset_draws(self, next_draw: int = 0) -> None:
        """Let the next call with `fresh_draws` start at this draw."""
        self.next_draw = next_draw

    def forward(
        self,
        images: Tensor,
        sample_ids: Any = None,
        draw: int = 0,
        *,
        progress: ProgressOption = None,
    ) -> Tensor:
        """Scores [B, K] of the images, combined over draws; in the dtype of the logits.

        Args:
            images: as for `Purifier`.
            sample_ids: as for `Purifier`.
            draw: the first of the `num_draws` consecutive draws that are used; with `fresh_draws`,
                counted from `next_draw`.
            progress: as for `Purifier`.

        Errors are those of `Purifier`.
        """
        if (driver := self.driver) is not None:
            noise = driver.noise_of(images, sample_ids, draw)
            scores: Tensor = driver.model(images, *noise, progress=progress)
            return scores
        logits = self.draw_logits(images, sample_ids, draw, progress=progress)
        return combine_votes(logits, self.vote)

    def draw_logits(
        self,
        images: Tensor,
        sample_ids: Any = None,
        draw: int = 0,
        *,
        progress: ProgressOption = None,
    ) -> Tensor:
        """The logits of every draw, [num_draws, B, K]; takes what `forward` takes."""
        if (driver := self.driver) is not None:
            noise = driver.noise_of(images, sample_ids, draw)
            logits: Tensor = driver.model.draw_logits(images, *noise, progress=progress)
            return logits
        validation.check_images(images)
        validation.check_model("classifier", self.classifier, images)
        ids = validation.sample_ids_of(images, sample_ids)
        first = self.take_draws(draw, self.num_draws)
        if sample_ids is None and self.purifier.check_values and self.purifier.num_noise > 0:
            self.purifier._kept.positions.notice(images, first)
        return self.logits_at(images, ids, first, progress)

    def logits_at(
        self,
        images: Tensor,
        sample_ids: Tensor,
        first: int | Tensor,
        progress: ProgressOption = None,
    ) -> Tensor:
        """The logits [num_draws, B, K] of the draws from `first` on, whatever `fresh_draws` is.

        sample_ids: int64 [B]. first: an int, or int64 [B] of each image's first draw. progress: as
        for `Purifier`.
        """
        return self.purified_at(images, sample_ids, first, progress)[1]

    def purified_at(
        self,
        images: Tensor,
        sample_ids: Tensor,
        first: int | Tensor,
        progress: ProgressOption = None,
    ) -> tuple[Tensor, Tensor]:
        """The purified copies [num_draws, B, C, H, W] and their logits, as `logits_at`."""
        refuse_training_mode(self.classifier)
        self._notice_training()
        count, batch = self.num_draws, images.shape[0]
        draws = torch.arange(count, device=images.device)[:, None] + first
        copies = torch.cat([images] * count) if count > 1 else images
        with frozen_parameters(self.classifier):
            ids, each = sample_ids.repeat(count), draws.expand(count, batch).flatten()
            purified = self.purifier(copies, ids, each, progress=progress)
            parts = purified.split(self.purifier.max_batch or max(len(purified), 1))
            with differentiated("the classifier"):  # each in memory apart from the next one's
                logits = [self._classify(part).clone() for part in parts]
            looks = self.purifier.check_values and len(images) > 0
            first_with_graph = looks and self._look_at(logits, parts[0])
        if first_with_graph:
            _walk_back(logits[0], parts[0])
        copies = purified.reshape(count, *images.shape)
        return copies, torch.cat(logits).reshape(count, batch, logits[0].shape[1])

    def _notice_training(self) -> None:
        """Warn, once, of what looks like training: no parameter gets a gradient here."""
        if torch.is_grad_enabled() and any(
            module.training and any(p.requires_grad for p in module.parameters())
            for module in modules_behind(self.classifier)
        ):
            self.purifier._kept.looks.say(
                "training",
                "the classifier is in training mode and gradients are on, but a PurifiedClassifier "
                "gives none to parameters: their .grad stays as it is. Call .eval(), or, to train "
                "the classifier on purified images, take classifier(purifier(images))",
            )

    def _classify(self, purified: Tensor) -> Tensor:
        pixels = in_dtype_of(self.classifier, purified)
        return check_logits(called("classifier", self.classifier, pixels=pixels), purified)

    def _look_at(self, logits: list[Tensor], pixels: Tensor) -> bool:
        """Refuse logits that are NaN; on the first call of its kind look at the classifier.

        Returns whether it was the first one whose logits are to be differentiated.
        """
        bad = [bool((~(part < math.inf)).any()) for part in logits]
        if any(bad):
            raise FloatingPointError(
                "the classifier's logits of purified images are NaN or inf, so no class can be told"
            )
        through = torch.is_grad_enabled() and pixels.requires_grad
        kind = (id(self.classifier), pixels.dtype, pixels.device, len(pixels) > 1, through)
        looks = self.purifier._kept.looks
        first = kind not in looks.seen
        if first:
            look_at_classifier(self._classify, pixels.detach(), looks, differentiated=through)
            looks.seen.add(kind)
        return first and through

    def take_draws(self, draw: int, count: int) -> int:
        """The first of `count` draws to use, counted from `draw`.

        With `fresh_draws` counted from `next_draw` as well, and then no other call, in any thread,
        gets these draws. A call that raises has used its draws up.
        """
        last = checks.MAX_INT64 - count
        draw = checks.integer("draw", draw, 0, last)
        if not self.fresh_draws:
            return draw
        if in_backward():
            raise CalledAgainError
        with _lock.current:
            taken = self.next_draw
            checks.integer("draw + next_draw", draw + taken, 0, last)
            self.next_draw = taken + count
        return draw + taken

    def __repr__(self) -> str:
        facts = f"num_draws={self.num_draws}, vote={self.vote!r}, fresh_draws={self.fresh_draws}"
        purifier = repr(self.purifier).replace("\n", "\n  ")
        return (
            f"{type(self).__name__}({facts})\n"
            f"  classifier: {described(self.classifier)}\n"
            f"  purifier: {purifier}"
        )
