"""A run at random: what it gives, and what it should give. Not a test.

Values are compared with the plan written out in float64 (`helpers.interpreter`), gradients with
plain autograd through the reference operators in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import coup_fast
from coup_fast import PurifiedClassifier, Purifier, ScoreModel, noise, reference
from coup_fast.plan import AdaptivePlan
from helpers import interpreter
from helpers.misbehaviour import FINE, Fault
from helpers.tiny import SHORT, TinyNetwork

RUN_OPTIONS = {
    "backend": ["auto", "compiled", "reference"],
    "gradient": ["exact", "autograd", "bpda", "none"],
    "states": ["device", "host", "sqrt"],
    "verify_states": [True, False],
    "guidance_gradient": ["full", "stopped"],
    "channels_last": ["auto", True, False],
    "max_batch": [None, 1, 2],
    "cuda_graph": ["auto", False],
}


class Classifier(nn.Module):
    """A smooth classifier of images of any size, 4 classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.conv, self.linear = nn.Conv2d(channels, 6, 3, padding=1), nn.Linear(6, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, u: Tensor) -> Tensor:
        return self.linear(3 * torch.tanh(self.conv(u)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A run: its models, how it is set up and called, and whether the images require grad."""

    images: Tensor
    method: str
    options: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)  # sample_ids, draw, noise
    seed: int = 0
    entry: str = "Purifier"  # or "purify", "trajectory", "PurifiedClassifier"
    defence: dict[str, Any] = field(default_factory=dict)  # options of the PurifiedClassifier
    differentiated: bool = False
    mode: Callable = torch.enable_grad
    fault: Fault = FINE["honest"]
    faulty: str = "network"  # or "classifier"
    as_module: bool = True

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For Hypothesis: without the numbers of tensors."""
        u, fault = self.images, self.fault.words
        images = f"{u.dtype} {list(u.shape)}, strides {u.stride()}, negated {u.is_neg()}"
        call = {k: "given" if isinstance(v, Tensor) else v for k, v in self.call.items()}
        printer.text(f"Case({vars(self) | {'images': images, 'fault': fault, 'call': call}})")

    @property
    def kind(self) -> str:
        return SHORT[self.method][0]

    def models(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        channels = self.images.shape[1]
        network = TinyNetwork(channels, pull=6.0 if self.kind == "ncsn" else 0.0)
        return network.to(dtype).eval(), Classifier(channels).to(dtype).eval()

    def setup(self, **changed: Any) -> dict[str, Any]:
        """The arguments of `Purifier` but for the models."""
        return {"seed": self.seed, "method": self.method, **self.options} | changed

    def purifier(self) -> Purifier:
        """The purifier, with the fault."""
        network, classifier = self.models(
            torch.float64 if self.images.dtype == torch.float64 else torch.float32
        )
        if self.faulty == "network":
            network = self.fault.of(network, self.as_module)
        else:
            classifier = self.fault.of(classifier, self.as_module)
        return Purifier(ScoreModel(network, kind=self.kind), classifier, **self.setup())

    def pure_models(self) -> tuple[Callable, Callable]:
        """Both models in float64, the faulty one as a function of its input."""
        network, classifier = self.models(torch.float64)
        if self.faulty == "network":
            return self.fault.stands_for(network), classifier
        return network, self.fault.stands_for(classifier)

    def called(self, purifier: Purifier, images: Tensor) -> Tensor:
        """The result by this case's entry."""
        if self.entry == "PurifiedClassifier":
            defended = PurifiedClassifier(purifier, purifier.classifier, **self.defence)
            return defended(images, **self.call)
        if self.entry == "trajectory":
            *_, (_, last) = purifier.trajectory(images, **self.call)
            return last.to(images.dtype)
        if self.entry == "purify":
            models = purifier.score_model, purifier.classifier
            return coup_fast.purify(images, *models, **self.setup(), **self.call)
        return purifier(images, **self.call)

    def run(self) -> tuple[Tensor, Tensor | None]:
        """The result, and the gradient of a weighted sum of it where one is asked for."""
        purifier = self.purifier()
        with self.mode():
            images = self.images
            if self.differentiated:
                images = images.detach().requires_grad_()
            out = self.called(purifier, images)
            if not self.differentiated or not out.requires_grad:
                return out, None
            return out, torch.autograd.grad((out * weights(out)).sum(), images)[0]


def weights(out: Tensor) -> Tensor:
    """Numbers that every dtype has."""
    return ((torch.arange(out.numel()) % 7 - 2) / 4).reshape(out.shape).to(out)


# What a run should give


def _noise_of(case: Case, purifier: Purifier, draw: Any) -> list[Tensor]:
    """float64, in order of need."""
    if case.call.get("noise") is not None:
        return list(case.call["noise"].double())
    images, ids = case.images, case.call.get("sample_ids")
    ids = range(len(images)) if ids is None else ids
    numel = images[0].numel() if len(images) else 0
    keys = noise.step_keys(case.seed, ids, draw, purifier.num_noise, numel)
    return [reference.normal(k, images.shape).double() for k in keys]


def _purified(case: Case, draw: Any) -> Tensor:
    """The images after the run, by the formulas of the steps in float64."""
    purifier = case.purifier()
    network, classifier = case.pure_models()
    images, z = case.images.double(), _noise_of(case, purifier, draw)
    if len(images) == 0:
        return images
    if isinstance(purifier.plan, AdaptivePlan):
        first = z[0] if z else torch.zeros_like(images)
        return interpreter.adaptive_states(purifier.plan, images, network, first)[-1]
    return interpreter.states(purifier.plan, images, network, z, classifier, 999.0)[-1]


def _expected_result(case: Case) -> Tensor:
    draw = case.call.get("draw", 0)
    if case.entry != "PurifiedClassifier":
        return _purified(case, draw).detach()
    classifier = case.pure_models()[1]
    draws = [_purified(case, draw + k) for k in range(case.defence["num_draws"])]
    logits = torch.stack([classifier(u.to(case.images.dtype).double()) for u in draws]).detach()
    if case.defence["vote"] == "logits":
        return logits.mean(0)
    if case.defence["vote"] == "softmax":
        return logits.softmax(2).mean(0).log()
    return nn.functional.one_hot(logits.argmax(2), 4).double().mean(0)


def _expected_gradient(case: Case) -> Tensor | None:
    """By autograd through the whole run of the reference, in float64; of "bpda", as it is there."""
    gradient = case.options.get("gradient", "exact")
    if not case.differentiated or gradient == "none" or case.entry == "trajectory":
        return None
    network, classifier = case.pure_models()
    plain = {"backend": "reference", "max_batch": None, "states": "device", "check_values": False}
    plain["gradient"] = "bpda" if gradient == "bpda" else "autograd"
    model = Purifier(ScoreModel(network, kind=case.kind), classifier, **case.setup(**plain))
    images = case.images.double().requires_grad_()
    if case.entry == "purify":  # which would make its own purifier
        case = replace(case, entry="Purifier")
    out = case.called(model, images)
    return torch.autograd.grad((out * weights(out)).sum(), images)[0]


PRECISION = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _far(got: Tensor, expected: Tensor, tolerance: float, least: float = 1.0) -> str | None:
    """Why two results are not the same; None if they are. least: the size that errors go by."""
    if got.shape != expected.shape:
        return f"{list(got.shape)} is not {list(expected.shape)}"
    if got.numel() == 0:
        return None
    size = max(least, float(expected.abs().max()))
    gap = float((got.detach().double() - expected).abs().max())
    return None if gap <= tolerance * size else f"differs by {gap:.2g}, the largest is {size:.2g}"


def difference(case: Case, out: Tensor, gradient: Tensor | None) -> str | None:
    """What is not as it should be in a run's result."""
    precision = PRECISION[case.images.dtype]
    if case.entry == "PurifiedClassifier":  # which sharpens
        precision *= 10
    if (why := _far(out, _expected_result(case), precision)) is not None:
        return f"the result {why}"
    if len(case.images) == 0:
        return None
    wanted = _expected_gradient(case)
    if (gradient is None) != (wanted is None):
        return f"a gradient is {'missing' if gradient is None else 'given'}"
    if gradient is not None and (why := _far(gradient, wanted, 20 * precision, 0.01)) is not None:
        return f"the gradient {why}"
    return None


def outcome(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns (None if it raises), and what is said by warnings or an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, said = call(), []
        except Exception as error:
            result, said = None, [f"{type(error).__name__}: {error}"]
    return result, [str(warning.message) for warning in caught] + said
