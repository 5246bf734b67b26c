"""A self-test of gradients on the user's models: which ways to differentiate are right.

On a short chain the whole graph fits, so plain autograd gives the gradient. The other ways are
compared with it: the exact gradient, stopped guidance (the released COUP attack), BPDA, and the
stochastic adjoint (DiffPure).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coup_fast import checks, methods
from coup_fast._torch.calls import logits_of
from coup_fast._torch.differentiated import differentiated
from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.modules import in_dtype_of, recordable
from coup_fast.attacks.eot import Loss, cross_entropy
from coup_fast.attacks.foreign import image_gradient
from coup_fast.gradient_check.adjoint import AdjointRun, why_not
from coup_fast.gradient_check.foreign import ForeignGradientCheck, check_foreign
from coup_fast.gradient_check.row import GradientRow, Timed, compared
from coup_fast.options import PurifierOptions
from coup_fast.purified_classifier import PurifiedClassifier, combine_votes
from coup_fast.purifier import Purifier
from coup_fast.run import validation

if TYPE_CHECKING:
    from typing_extensions import Unpack

CHAINS = ("longer steps", "first steps")


@dataclass(frozen=True)
class GradientCheck:
    """The table of `check_gradient`; `str()` prints it.

    Attributes:
        method: of the purifier.
        steps: of the short chain.
        full_steps: of the purifier.
        chain: how it was shortened.
        batch: number of images.
        draws: of the vote.
        tolerance: the largest relative error that the exact gradient may have.
        rows: one for each way to differentiate, plain autograd first.
    """

    method: str
    steps: int
    full_steps: int
    chain: str
    batch: int
    draws: int
    tolerance: float
    rows: tuple[GradientRow, ...]

    def __getitem__(self, name: str) -> GradientRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def passed(self) -> bool:
        """Whether the exact gradient is plain autograd's, within the tolerance."""
        error = self["exact"].relative_error
        return error is not None and error <= self.tolerance

    def __str__(self) -> str:
        head = (
            f"gradients of {self.method} on {self.steps} of {self.full_steps} steps "
            f"({self.chain}), {self.batch} images, {self.draws} draws"
        )
        lines = [head, f"{'':18}{'error':>9}{'cosine':>9}{'signs':>8}{'seconds':>9}"]
        for row in self.rows:
            if row.relative_error is None:
                lines.append(f"{row.name:18}{row.note}")
                continue
            numbers = (
                f"{row.relative_error:9.1e}{row.cosine:9.4f}{row.sign_agreement:8.1%}"
                f"{row.seconds:9.2f}"
            )
            lines.append(f"{row.name:18}{numbers}  {row.note}".rstrip())
        verdict = "is" if self.passed else "IS NOT"
        lines.append(
            f"the exact gradient {verdict} plain autograd's, to a relative error of "
            f"{self.tolerance:.0e}"
        )
        return "\n".join(lines)


def check_gradient(
    defended: PurifiedClassifier | Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 4,
    chain: str = "longer steps",
    loss: Loss = cross_entropy,
    sample_ids: Any = None,
    draw: int = 0,
    directions: int = 8,
    reference: Callable[[Tensor], Tensor] | None = None,
) -> GradientCheck | ForeignGradientCheck:
    """Compare ways to differentiate this defence, on a short chain of its own method and models.

    Args:
        defended: a `PurifiedClassifier`, whose vote over draws is inside the loss. It is not
            modified, and its `next_draw` stays. Or any module or callable from pixels to scores
            [B, K]: its gradient is then compared with finite differences under one draw, and
            `steps` and `chain` do nothing (`coup_fast.attacks.foreign` says what drives its noise).
        images: [B, C, H, W] in [0, 1]. A few are enough. The whole graph of `steps` steps of all of
            them has to fit in memory.
        labels: int64 [B]; by default what the short chain predicts.
        steps: steps of the short chain, at least 1.
        chain: "longer steps" covers the same times in fewer steps (methods without `num_steps` run
            their first steps); "first steps" runs the first steps as they are.
        loss: (scores [B, K], labels [B]) -> [B].
        sample_ids: as for `PurifiedClassifier`.
        draw: as for `PurifiedClassifier`.
        directions: how many random directions the finite differences of a foreign model take; each
            costs ten forwards.
        reference: for a foreign model: the same model differentiated in another way, such as by
            plain autograd, to compare with.

    The exact row runs with `verify_states`. The adjoint is compared on a Brownian path of torchsde,
    with plain autograd on the same path. It needs torchsde, and a method that is Euler-Maruyama on
    the reverse VP-SDE. The adjoint's error falls with the step length, so with few steps it is
    larger than on the full chain.

    Raises:
        ValueError: an argument is out of range, or a model is in training mode.
        RuntimeError: a model does not repeat itself, and whatever else `Purifier` raises.
    """
    with torch.inference_mode(False):
        images, labels, sample_ids = map(recordable, (images, labels, sample_ids))
        if isinstance(defended, PurifiedClassifier):
            return _check(defended, images, labels, steps, chain, loss, sample_ids, draw)
        return check_foreign(
            defended, images, labels, loss, sample_ids, draw, directions, reference
        )


def _check(
    model: PurifiedClassifier,
    images: Tensor,
    labels: Tensor | None,
    steps: int,
    chain: str,
    loss: Loss,
    sample_ids: Any,
    draw: int,
) -> GradientCheck:
    """`check_gradient` of a defence of ours."""
    validation.check_images(images)
    checks.choice("chain", chain, CHAINS)
    checks.integer("steps", steps, 1)
    ids = validation.sample_ids_of(images, sample_ids)
    short = _shortened(model.purifier, steps, longer=chain == CHAINS[0])
    images = images.detach()
    if labels is None:
        with torch.no_grad():
            scores = combine_votes(_variant(model, short).logits_at(images, ids, draw), model.vote)
        labels = scores.argmax(1)
    objective = _Objective(model, images, ids, draw, labels, loss)

    plain = objective.of(short, gradient="autograd")
    rows = [compared("autograd", plain, plain, "the whole graph: the measure of the others")]
    exact = objective.of(short, gradient="exact", verify_states=True)
    rows.append(compared("exact", exact, plain))
    if short.plan.needs_classifier:
        stopped = objective.of(short, gradient="autograd", guidance_gradient="stopped")
        other = "" if short.guidance_gradient == "full" else "as this purifier is set"
        rows.append(compared("stopped guidance", stopped, plain, other))
    else:
        rows.append(GradientRow("stopped guidance", note="not run: the method is not guided"))
    rows.append(compared("bpda", objective.of(short, gradient="bpda"), plain))
    rows.append(_adjoint_row(objective, short))
    return GradientCheck(
        method=model.purifier.method,
        steps=short.plan.num_steps,
        full_steps=model.purifier.plan.num_steps,
        chain=chain,
        batch=len(images),
        draws=model.num_draws,
        tolerance=1e-10 if images.dtype == torch.float64 else 1e-4,
        rows=tuple(rows),
    )


def _shortened(purifier: Purifier, steps: int, *, longer: bool) -> Purifier:
    """The purifier in `steps` steps over the same times if `longer`, where its method can say so.

    Otherwise its first `steps` steps.
    """
    takes_num_steps = "num_steps" in methods.options(purifier.method)
    if longer and takes_num_steps and purifier.plan.num_steps > steps:
        shorter: PurifierOptions = {"num_steps": steps}
        if "step_size" in purifier.options:
            shorter["step_size"] = None
        return purifier.with_options(**shorter)
    return purifier.with_plan(purifier.plan.first(steps))


def _variant(model: PurifiedClassifier, purifier: Purifier) -> PurifiedClassifier:
    return PurifiedClassifier(purifier, model.classifier, model.num_draws, model.vote)


class _Objective:
    """The attack's loss as a function of the purifier, and its gradient."""

    def __init__(
        self,
        model: PurifiedClassifier,
        images: Tensor,
        ids: Tensor,
        draw: int,
        labels: Tensor,
        loss: Loss,
    ) -> None:
        self.model, self.images, self.ids, self.draw = model, images, ids, draw
        self.labels, self.loss = labels, loss

    def of(self, purifier: Purifier, **options: Unpack[PurifierOptions]) -> Timed:
        """The gradient with these options of the purifier, and its seconds."""
        variant = _variant(self.model, purifier.with_options(**options))
        return self._gradient(lambda leaf: variant.logits_at(leaf, self.ids, self.draw))

    def _gradient(self, logits: Callable[[Tensor], Tensor]) -> Timed:
        started = time.perf_counter()
        with torch.enable_grad(), differentiated("a model of the defence"):
            leaf = self.images.clone().requires_grad_()
            scores = combine_votes(logits(leaf), self.model.vote)
            losses = self.loss(scores, self.labels)
            gradient = image_gradient(losses, leaf, f"the {type(self.model).__name__}")
        if gradient.is_cuda:
            torch.cuda.synchronize(gradient.device)
        return gradient, time.perf_counter() - started

    def on_path(self, purify: Callable[[Tensor], Tensor]) -> Timed:
        """The same with another way to purify the copies [num_draws * B, C, H, W]."""
        count, classifier = self.model.num_draws, self.model.classifier

        def logits(leaf: Tensor) -> Tensor:
            purified = purify(torch.cat([leaf] * count))
            rows: Tensor = logits_of(classifier(in_dtype_of(classifier, purified)))
            return rows.reshape(count, len(leaf), -1)

        purifier = self.model.purifier
        with frozen_parameters(purifier.score_model, purifier.classifier, classifier):
            return self._gradient(logits)


def _adjoint_row(objective: _Objective, short: Purifier) -> GradientRow:
    reason = why_not(short)
    if reason is not None:
        return GradientRow("adjoint", note=f"not run: {reason}")
    copies = torch.cat([objective.images] * objective.model.num_draws)
    adjoint = AdjointRun(short, copies, seed=0)
    plain = short.with_options(gradient="autograd")
    measure = objective.on_path(lambda u: plain(u, noise=adjoint.noise))
    with torch.no_grad():
        forward = float((adjoint(copies) - plain(copies, noise=adjoint.noise)).abs().max())
    return compared(
        "adjoint", objective.on_path(adjoint), measure, f"outputs differ by {forward:.0e}"
    )
