"""Expectation over transformation: the gradient over many draws, in batches that fit in memory.

Athalye et al., "Synthesizing robust adversarial examples" (ICML 2018). Every draw of every image
is a run of its own; they are cut into micro-batches by bytes, and since each run's noise belongs to
its image and draw, and sums are taken per image in the order of the draws, the result does not
depend on how they are cut, as far as the networks' own results do not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from coup_fast import checks
from coup_fast._torch.differentiated import differentiated
from coup_fast._torch.modules import recordable
from coup_fast.attacks.deviation import DeviatedPurifier
from coup_fast.attacks.draw_weights import DrawWeights, MeanGradient
from coup_fast.attacks.foreign import Foreign, image_gradient
from coup_fast.attacks.peak_memory import peak_bytes
from coup_fast.purified_classifier import PurifiedClassifier, combine_votes
from coup_fast.run import validation
from coup_fast.run.aside import aside

Loss = Callable[[Tensor, Tensor], Tensor]

# Runs at a time above which a device gains little from more of them. Memory beyond them goes to the
# graphs of steps before it goes to larger micro-batches.
_ENOUGH = {"cpu": 32, "cuda": 256}

# What was measured, per defence: an attack asks for a gradient at every iterate.
_measured: WeakKeyDictionary[PurifiedClassifier, dict[Any, MemoryModel]] = WeakKeyDictionary()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, [B]. ValueError for labels that are no class of the scores."""
    validation.check_classes(labels, scores)  # PyTorch leaves rows of label -100 out
    return functional.cross_entropy(scores, labels, reduction="none")


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a micro-batch of `runs` runs takes: fixed + runs * (one_step + states).

    A run is one image under one draw of the attack (with all `num_draws` of the vote). one_step is
    measured: forward and backward of a run of two steps and of the classifier, on one and on two
    runs. states is counted: those that the backward pass keeps beyond these two.
    """

    fixed: int
    one_step: int
    states: int

    @property
    def per_run(self) -> int:
        """Bytes that each further run adds."""
        return self.one_step + self.states

    def bytes(self, runs: int) -> int:
        """The peak of a micro-batch of this many runs."""
        return self.fixed + runs * self.per_run

    def runs_within(self, budget: int) -> int:
        """The largest micro-batch within a budget. Raises ValueError if one run exceeds it."""
        if self.bytes(1) > budget:
            raise ValueError(
                f"one run needs about {self.bytes(1)} bytes ({self.states} of them for states) and "
                f"memory_budget is {budget}; raise it, or build the purifier with "
                'gradient="exact" and states="sqrt" (or "host", on a GPU), or use fewer num_draws'
            )
        return (budget - self.fixed) // max(self.per_run, 1)

    def shared(self, budget: int, runs: int, steps: int, enough: int) -> tuple[int, int]:
        """(runs at a time, bytes left for the graphs of steps), of `runs` runs in all.

        A step's graph takes at most `one_step`. Where a budget is too small for the graphs of all
        runs, the micro-batch is the largest with room for all of its graphs, but not below
        `enough` runs, as far as those fit.
        """
        most = min(runs, self.runs_within(budget))
        with_graphs = (budget - self.fixed) // max(self.per_run + steps * self.one_step, 1)
        micro_batch = min(most, max(with_graphs, enough))
        return micro_batch, budget - self.bytes(micro_batch)


@dataclass(frozen=True)
class EotGradient:
    """What `eot_gradient` returns.

    Attributes:
        gradient: [B, C, H, W], of the mean loss over draws.
        losses: [draws, B].
        scores: [draws, B, K].
        micro_batch: how many runs went at a time.
        memory: the model that chose it, or None.
        weights: float64 [draws, B], what `draw_weights` gave; None for equal weights.
    """

    gradient: Tensor
    losses: Tensor
    scores: Tensor
    micro_batch: int
    memory: MemoryModel | None
    weights: Tensor | None = None


def eot_gradient(
    defended: PurifiedClassifier | Foreign | Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    loss: Loss = cross_entropy,
    draws: int = 1,
    *,
    sample_ids: Any = None,
    draw: int = 0,
    memory_budget: int | None = None,
    micro_batch: int | None = None,
    normalise_draws: bool = False,
    draw_weights: DrawWeights | None = None,
    loss_vote: str | None = None,
) -> EotGradient:
    """The gradient of mean over draws of loss(scores, labels) with respect to each image.

    Args:
        defended: a `PurifiedClassifier`. Its `vote` over `num_draws` is inside the loss, so the
            attack knows of it, and `draws` repeats the whole. With `fresh_draws` it takes
            draws * num_draws draws, as that many calls would. Or any module or callable from pixels
            to scores [B, K], which is called once for each draw with the whole batch. Its noise is
            driven as `coup_fast.attacks.foreign` says, and the memory options do nothing.
        images: [B, C, H, W] in [0, 1].
        labels: int64 [B], handed to the loss.
        loss: (scores [b, K], labels [b]) -> [b], where each entry depends only on its row. The
            caller maximises or minimises it.
        draws: >= 1, counted from `draw` (and from `next_draw` with `fresh_draws`).
        sample_ids: as for `Purifier`.
        draw: the first draw.
        memory_budget: bytes for the runs of one micro-batch, without the result and states kept in
            host memory. The default is 80 % of the free memory of a GPU, or 25 % of the machine's
            free memory on a CPU. What a run takes is measured once for each defence and kind of
            image (`MemoryModel`). With `gradient="exact"`, graphs of steps fill what a micro-batch
            leaves, and the backward pass does not compute those steps again.
        micro_batch: how many runs go at a time, in place of measuring. A run is one image under one
            draw.
        normalise_draws: divide each draw's gradient by its ℓ2 norm before the mean, so that draws
            of which the defence is sure, whose gradients are tiny, count as much as the others.
        draw_weights: what each draw's gradient counts in the mean, from the losses and gradients
            of all draws: a function (losses [draws, B], gradients [draws, B, C, H, W]) ->
            [draws, B] whose result has the sum 1 over draws. It keeps the gradients of all draws,
            beside memory_budget. The default is equal weights.
        loss_vote: the vote over a `PurifiedClassifier`'s draws that the loss is taken of, in place
            of its own. `scores` are always those of its own vote. Attacks take "softmax" for
            "majority", since counts are flat almost everywhere.

    The gradient has the dtype of images. Each image's losses and gradient are summed in the order
    of the draws in float32 (float64 for float64 images), whatever the micro-batch is.

    Raises:
        ValueError: the loss is not one number per image, the budget is too small for one run, or
            the purifier has gradient="none". Other errors are those of `Purifier`.
    """
    checks.integer("draws", draws, 1)
    if micro_batch is not None:
        checks.integer("micro_batch", micro_batch, 1)
    validation.check_images(images)
    ids = validation.sample_ids_of(images, sample_ids)
    validation.check_labels(labels, images)
    with torch.inference_mode(False):
        images, labels, ids = map(recordable, (images, labels, ids))
        mean = MeanGradient(images, draws, draw_weights, normalise_draws)
        if isinstance(defended, PurifiedClassifier):
            return _gradient(
                *(defended, images, ids, labels, loss, draws, draw),
                *(memory_budget, micro_batch, mean, loss_vote),
            )
        foreign = defended if isinstance(defended, Foreign) else Foreign(defended, ids)
        return _foreign_gradient(foreign, images, labels, loss, draws, draw, mean)


def _gradient(
    model: PurifiedClassifier,
    images: Tensor,
    ids: Tensor,
    labels: Tensor,
    loss: Loss,
    draws: int,
    draw: int,
    memory_budget: int | None,
    micro_batch: int | None,
    mean: MeanGradient,
    loss_vote: str | None,
) -> EotGradient:
    """The same of a defence of ours, in micro-batches."""
    if model.purifier.gradient == "none":
        raise ValueError('the purifier has gradient="none": there is no gradient to average')
    runs = draws * len(images)
    memory, worker = None, model
    if micro_batch is None and runs > 0:
        memory = _memory_of(model, images[:1], labels[:1], loss)
        budget = default_budget(images.device) if memory_budget is None else memory_budget
        steps = model.purifier.plan.num_steps if model.purifier.gradient == "exact" else 0
        enough = _ENOUGH.get(images.device.type, runs) if steps else runs
        micro_batch, left = memory.shared(budget, runs, steps, enough)
        if steps:
            worker = model.with_purifier(model.purifier.with_options(graph_memory=left))
    micro_batch = micro_batch or 1

    losses, scores = [], []
    first = model.take_draws(draw, draws * model.num_draws)
    for start in range(0, runs, micro_batch):
        run = torch.arange(start, min(start + micro_batch, runs), device=images.device)
        which = run % len(images)
        first_draw = first + run // len(images) * model.num_draws
        gradient, values, rows = _micro_batch(
            worker, images[which], ids[which], labels[which], first_draw, loss, loss_vote
        )
        mean.add(start, gradient)
        losses.append(values)
        scores.append(rows)
        del gradient, values, rows  # so that the next micro-batch has their memory
    if not losses:
        empty = mean.total.new_zeros(draws, 0)
        return EotGradient(images.clone(), empty, empty[..., None], micro_batch, memory)
    all_losses = torch.cat(losses).reshape(draws, len(images))
    all_scores = torch.cat(scores).reshape(draws, len(images), -1)
    gradient, weights = mean.result(all_losses)
    return EotGradient(gradient, all_losses, all_scores, micro_batch, memory, weights)


def _foreign_gradient(
    model: Foreign,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    draws: int,
    draw: int,
    mean: MeanGradient,
) -> EotGradient:
    """The same of a model that is not ours, one draw after the other."""
    checks.integer("draw", draw, 0)
    losses, scores = [], []
    for repetition in range(draws):
        first = draw + repetition * model.stride
        gradient, values, rows = model.gradient(images, labels, loss, first)
        mean.add(repetition * len(images), gradient)
        losses.append(values)
        scores.append(rows)
    all_losses = torch.stack(losses)
    gradient, weights = mean.result(all_losses)
    return EotGradient(gradient, all_losses, torch.stack(scores), len(images), None, weights)


def _micro_batch(
    model: PurifiedClassifier,
    images: Tensor,
    ids: Tensor,
    labels: Tensor,
    first_draw: Tensor,
    loss: Loss,
    loss_vote: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, loss and scores of each run; images: one row per run."""
    with torch.enable_grad(), differentiated("a model of the defence"):
        leaf = images.detach().requires_grad_()
        logits = model.logits_at(leaf, ids, first_draw)
        values = loss(combine_votes(logits, loss_vote or model.vote), labels)
        if values.shape != labels.shape:
            raise ValueError(
                f"loss must return one number per image, [{len(labels)}], got "
                f'{list(values.shape)} (reduction="none")'
            )
        maximised = values
        if isinstance(model.purifier, DeviatedPurifier):
            maximised = values + model.purifier.taken(model.num_draws)
        gradient = image_gradient(maximised, leaf, f"the {type(model).__name__}")
    return gradient, values.detach(), combine_votes(logits.detach(), model.vote)


def _memory_of(model: PurifiedClassifier, image: Tensor, labels: Tensor, loss: Loss) -> MemoryModel:
    """`memory_model`, measured once for each defence, its settings and the kind of image."""
    clean = model.purifier
    key = (
        *(image.shape, image.dtype, image.device, id(clean.plan)),
        *(clean.run_options, model.num_draws, model.vote),
    )
    known = _measured.setdefault(model, {})
    if key not in known:
        known[key] = memory_model(model, image, labels, loss)
    return known[key]


def memory_model(
    model: PurifiedClassifier, image: Tensor, labels: Tensor, loss: Loss = cross_entropy
) -> MemoryModel:
    """Measure the memory of one run: image [1, C, H, W], labels [1]. Costs six steps of one run."""
    purifier, votes = model.purifier, model.num_draws
    steps = purifier.plan.num_steps

    def peak(runs: int, steps: int) -> int:
        few = purifier.with_plan(purifier.plan.first(steps))
        few = few.with_options(check_values=False, graph_memory=0)
        short = PurifiedClassifier(few, model.classifier, votes, vote=model.vote)
        images, answer = image.expand(runs, -1, -1, -1), labels.expand(runs)
        ids = torch.arange(runs, device=image.device)
        with aside():
            return peak_bytes(
                lambda: _micro_batch(short, images.clone(), ids, answer, ids, loss), image.device
            )

    if image.device.type == "cuda":
        peak(1, 1)  # library workspaces are allocated once and stay
    one, two = peak(1, 2), peak(2, 2)
    one_step = max(two - one, 0)
    fixed = max(one - one_step, 0)
    if purifier.gradient == "exact":
        state = image.numel() * torch.promote_types(image.dtype, torch.float32).itemsize
        on_host = purifier.states == "host" and image.device.type != "cpu"
        states = 0 if on_host else state * votes * max(_kept(steps, purifier.states) - 2, 0)
    elif purifier.gradient == "autograd":
        per_step = max(two - one - (peak(2, 1) - peak(1, 1)), 0)
        states = per_step * max(steps - 2, 0)
    else:
        states = 0
    return MemoryModel(fixed, one_step, states)


def _kept(steps: int, states: str) -> int:
    """States that the exact gradient holds at its peak: all, or every √N-th and one segment."""
    if states != "sqrt":
        return steps
    stride = math.ceil(math.sqrt(steps))
    return math.ceil(steps / stride) + stride - 1


def default_budget(device: torch.device) -> int:
    """Bytes for a micro-batch where nobody says: 80 % of a GPU's free memory, 25 % of a CPU's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.8 * (free + cached))
    return int(0.25 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
