"""One unit of an evaluation: a batch of images, clean or attacked, classified under every draw.

A unit's result is a function of the configuration, the images and the models: not of other units,
their order, or the process that computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import coup_fast
from coup_fast._torch.calls import logits_of
from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.modules import in_dtype_of
from coup_fast._torch.reachable import modules_behind
from coup_fast.attacks import Attack, AttackResult, AutoAttack, Progress
from coup_fast.attacks.autoattack import require_package
from coup_fast.attacks.deviation import forward_levels
from coup_fast.attacks.foreign import Foreign
from coup_fast.evaluation.config import EvalConfig, Row
from coup_fast.evaluation.defences import UNDEFENDED, Defence
from coup_fast.evaluation.fidelity import fidelity, rounded
from coup_fast.evaluation.fingerprints import fingerprint
from coup_fast.evaluation.networks import Networks
from coup_fast.evaluation.sources import ModelLoader, foreign_defence, tensor_digest
from coup_fast.evaluation.state import EvaluationError, Unit
from coup_fast.gradient_check import ForeignGradientCheck, check_gradient
from coup_fast.models.bundled import score_for
from coup_fast.purified_classifier import PurifiedClassifier, combine_votes
from coup_fast.purifier import Purifier
from coup_fast.run.aside import aside
from coup_fast.score_model import ClassifierFunction
from coup_fast.stiffness import stiffness

GUIDED_IMAGES = 8  # whose states tell how stiff a defence's guidance is
VERIFIED_IMAGES = 4  # on which the gradient of a defence that is not ours is checked


class _NotFinite(Exception):
    """Raised by the hooks that look for the first NaN; says whose output it was."""


class _Shared:
    """What rows of one batch have in common, so that it is computed once.

    bare: what attacks that ignore the purifier found, the same for every defence of a classifier.
    results: of rows, for defences that differ in nothing but their names. A defence's clean images
    are a row, and its attacked rows do not classify them again. purified: the clean images as each
    defence purifies them under draw 0, by its name.
    """

    def __init__(self) -> None:
        self.batch = -1
        self.bare: dict[tuple[int, Attack], AttackResult] = {}
        self.results: list[tuple[Row, dict[str, Any]]] = []
        self.purified: dict[str, Tensor] = {}

    def of(self, batch: int) -> _Shared:
        """That of this batch; what is known of another one is forgotten."""
        if self.batch != batch:
            self.batch, self.bare, self.results, self.purified = batch, {}, [], {}
        return self

    def result(self, row: Row) -> dict[str, Any] | None:
        """The result of a row that computes the same as this one, if there was one."""
        for known, result in self.results:
            if known.attack == row.attack and known.defence.computes_as(row.defence):
                return result
        return None


class Worker:
    """Models, images and defences of an evaluation, on one device.

    images: [N, C, H, W] float32 in [0, 1]; labels: int64 [N]. The defences are built here, so that
    a wrong option, and networks of other channels than the images', are reported before anything
    is computed (ValueError or TypeError). step: receives a few words after each iterate of an
    attack and each draw.
    """

    def __init__(
        self,
        config: EvalConfig,
        images: Tensor,
        labels: Tensor,
        load: ModelLoader,
        device: torch.device,
        step: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.images, self.labels, self.device = config, images, labels, device
        self._step = step or (lambda _: None)
        self.batches = config.batches()
        self._networks = Networks(load, config.models, images, device)
        self._shared = _Shared()
        self.defences: dict[str, PurifiedClassifier | ClassifierFunction] = {}
        for row in config.rows:
            if isinstance(row.attack, AutoAttack):
                require_package()
            if row.defence.name not in self.defences:
                self.defences[row.defence.name] = self._build(row.defence)
            model = self.defences[row.defence.name]
            deviating = row.attack is not None and row.attack.deviation > 0
            if deviating and isinstance(model, PurifiedClassifier):
                forward_levels(model.purifier)

    def _build(self, defence: Defence) -> PurifiedClassifier | ClassifierFunction:
        if defence.foreign:
            return foreign_defence(defence.method, defence.options, self.device)
        score_model, classifier = self._networks.of(defence.models, score_for(defence.method))
        if defence.method == UNDEFENDED:
            return classifier
        purifier = Purifier(
            score_model,
            classifier,
            method=defence.method,
            seed=self.config.seed,
            **defence.options,
        )
        return PurifiedClassifier(purifier, classifier, defence.num_draws, defence.vote)

    def identity(self) -> dict[str, Any]:
        """Everything that can change a number, as JSON data."""
        networks = self._networks.identity()
        plans = {
            name: _plan_facts(model)
            for name, model in self.defences.items()
            if isinstance(model, PurifiedClassifier)
        }
        foreign = {
            row.defence.name: fingerprint(self.defences[row.defence.name])
            for row in self.config.rows
            if row.defence.foreign
        }
        networks |= {"foreign": foreign} if foreign else {}
        return {
            "config": self.config.as_dict(),
            "images": tensor_digest(self.images, self.labels),
            "loader": self._networks.loader_code(),
            "networks": networks,
            "plans": plans,
            "versions": {"coup_fast": coup_fast.__version__, "torch": torch.__version__},
            "device": self.device.type,
            "compiled": coup_fast.build_info()["extension"]["loaded"],
        }

    def run(self, unit: Unit) -> dict[str, Any]:
        """The result of a unit, as JSON data.

        Raises EvaluationError for NaN, naming a network, and for what a network itself raised
        (RuntimeError; images of a size it cannot take), ValueError for labels it has no class for.
        """
        row = self.config.rows[unit[1]]
        shared = self._shared.of(unit[0])
        if (known := shared.result(row)) is not None:
            return known
        try:
            result = self._run(unit, row)
        except FloatingPointError as error:
            raise EvaluationError(self._whose_fault(unit, row, error)) from error
        except RuntimeError as error:
            raise EvaluationError(
                f"{type(error).__name__}: {' '.join(str(error).split())}: "
                f"{self._where(unit, row)}. The finished batches are kept."
            ) from error
        shared.results.append((row, result))
        return result

    def _run(self, unit: Unit, row: Row) -> dict[str, Any]:
        ids = self.batches[unit[0]]
        rows = slice(ids.start, ids.stop)
        images, labels = self.images[rows].to(self.device), self.labels[rows].to(self.device)
        sample_ids = torch.arange(ids.start, ids.stop, device=self.device)
        model: Any = self.defences[row.defence.name]
        judged = Foreign(model, sample_ids, self.config.seed) if row.defence.foreign else model
        result: dict[str, Any] = {"sample_ids": list(ids), "labels": labels.tolist()}
        if row.attack is not None:
            attacked = model if isinstance(model, PurifiedClassifier) else judged
            found = self._attack(row.attack, unit[0], attacked, images, labels, sample_ids)
            images = found.images
            result["attack"] = {
                "loss": found.loss.tolist(),
                "fooled": found.fooled.tolist(),
                "zero_gradients": found.zero_gradients,
                "gradient_runs": found.gradient_runs,
                "stopped": found.stopped,
                "score_evaluations": found.score_evaluations,
                "classifier_evaluations": found.classifier_evaluations,
            }
            if row.defence.foreign:
                result["attack"]["draws"] = found.draws
        elif row.defence.foreign and unit[0] == 0:
            result["foreign"] = self._verified(model, images, labels, sample_ids)
        elif row.defence.guided and unit[0] == 0:
            result["guidance"] = self._stiffness(model.purifier, images, sample_ids)
        scores, purified = self._scores(judged, images, sample_ids)
        low, high = int(self.labels.min()), int(self.labels.max())  # all: the first unit tells
        if high >= scores.shape[2] or low < 0:
            raise ValueError(
                f"labels must be classes of the classifier, 0 to {scores.shape[2] - 1}, got "
                f"{low} to {high}"
            )
        result["predictions"] = scores.argmax(2).T.cpu().tolist()
        if row.attack is not None:
            in_bytes, _ = self._scores(judged, rounded(images), sample_ids, "8 bits, ")
            result["rounded"] = in_bytes.argmax(2).T.cpu().tolist()
        if purified is not None:
            clean = self.images[rows].to(self.device)
            known, name = self._shared.of(unit[0]).purified, row.defence.name
            if row.attack is None:
                known[name] = purified
            elif name not in known:  # the clean row was finished before a stop
                with torch.no_grad():
                    known[name] = model.purified_at(clean, sample_ids, 0)[0][0]
            result["fidelity"] = fidelity(clean, images, purified, known[name])
        return result

    def _attack(
        self,
        attack: Attack,
        batch: int,
        model: PurifiedClassifier | Foreign | ClassifierFunction,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
    ) -> AttackResult:
        def compute() -> AttackResult:
            budget = self.config.memory_budget
            return attack.run(
                model,
                images,
                labels,
                sample_ids=sample_ids,
                progress=self._iterate,
                memory_budget=budget,
            )

        if attack.gradient != "classifier" or not isinstance(model, PurifiedClassifier):
            return compute()
        found, key = self._shared.of(batch).bare, (id(model.classifier), attack)
        if key not in found:
            found[key] = compute()
        return found[key]

    def _iterate(self, progress: Progress) -> None:
        self._step(f"iterate {progress.done} of {progress.total}")

    def _verified(
        self, model: Any, images: Tensor, labels: Tensor, sample_ids: Tensor
    ) -> dict[str, Any]:
        """What could be seen of a defence that is not ours, on the first images of all.

        gradient: in words. gradient_passed: whether it agrees with finite differences. repeats:
        whether the same draw gives the same scores. seeding: what its noise was driven by.
        """
        few = slice(0, VERIFIED_IMAGES)
        seeding = Foreign(model, sample_ids, self.config.seed).seeding
        try:
            check = check_gradient(
                model, images[few], labels[few], sample_ids=sample_ids[few], directions=4
            )
        except ValueError as error:
            found = {"gradient": str(error), "gradient_passed": False, "repeats": None}
            return {**found, "seeding": seeding, "images": len(images[few])}
        assert isinstance(check, ForeignGradientCheck)
        found = {"gradient": check.verdict, "gradient_passed": check.passed}
        return {**found, "repeats": check.repeats, "seeding": seeding, "images": check.batch}

    def _stiffness(
        self, purifier: Purifier, images: Tensor, sample_ids: Tensor
    ) -> dict[str, Any] | None:
        """How stiff the guidance is on the first images of all; None where its norm is scaled."""
        if purifier.plan.guidance_norm not in ("none", "stable"):
            return None
        few = slice(0, GUIDED_IMAGES)
        with aside():
            return stiffness(purifier, images[few], sample_ids[few]).as_dict()

    @torch.no_grad()
    def _scores(
        self,
        model: PurifiedClassifier | Foreign | ClassifierFunction,
        images: Tensor,
        ids: Tensor,
        what: str = "",
    ) -> tuple[Tensor, Tensor | None]:
        """Scores under every draw, and the images as a purifier of ours leaves them under draw 0.

        The scores are [draws, B, K], or [1, B, K] without a defence. what: to say.
        """
        scores, first = [], None
        if isinstance(model, PurifiedClassifier | Foreign):
            for k in range(self.config.draws):
                if isinstance(model, PurifiedClassifier):
                    purified, logits = model.purified_at(images, ids, k * model.num_draws)
                    first = purified[0] if first is None else first
                    scores.append(combine_votes(logits, model.vote))
                else:
                    with model.frozen():
                        scores.append(model.scores(images, k * model.stride))
                self._step(f"{what}draw {k + 1} of {self.config.draws}")
        else:
            with frozen_parameters(model):
                scores.append(logits_of(model(in_dtype_of(model, images))))
        stacked = torch.stack(scores)
        if not bool(stacked.isfinite().all()):
            raise FloatingPointError("the classifier's scores are not finite")
        return stacked, first

    def _where(self, unit: Unit, row: Row) -> str:
        ids = self.batches[unit[0]]
        return f"{row.name}, sample ids {ids.start} to {ids.stop - 1}"

    def _whose_fault(self, unit: Unit, row: Row, error: FloatingPointError) -> str:
        """Compute the unit again and stop at the first network that returns inf or NaN."""
        where = self._where(unit, row)
        try:
            with self._watched(self.defences[row.defence.name]):
                self._run(unit, row)
        except _NotFinite as found:
            return f"{found}: {where}. The finished batches are kept. ({error})"
        except FloatingPointError:
            pass
        return f"{error}: {where}. The finished batches are kept."

    @contextmanager
    def _watched(self, model: PurifiedClassifier | ClassifierFunction) -> Iterator[None]:
        networks: dict[str, Any] = {"classifier": model}
        if isinstance(model, PurifiedClassifier):
            networks = {
                "score model": model.purifier.score_model.network,
                "classifier": model.classifier,
            }
        hooks = []
        for name, network in networks.items():
            for module in modules_behind(network):
                hooks.append(module.register_forward_hook(_watch(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _watch(name: str) -> Any:
    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            kind = f"{name} ({type(module).__name__})"
            given = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
            if not all(bool(x.isfinite().all()) for x in given):
                raise _NotFinite(f"the {kind} was called with an image that is not finite")
            raise _NotFinite(f"the {kind} returned NaN or inf")

    return look


def _plan_facts(model: PurifiedClassifier) -> dict[str, Any]:
    """What a method's options came to, and a digest of every coefficient."""
    plan = model.purifier.plan
    return {
        "steps": plan.num_steps,
        "network_calls": plan.num_network_calls,
        "coefficients": plan.digest,
    }
