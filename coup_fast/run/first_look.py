"""A look at the models after the first run of a kind, for what only numbers can tell.

`coup_fast.run.assumptions` says what is assumed. Models are called a few more times here, as they
are (not compiled), on the first two images and the first step of the run that has just ended; later
runs of the same kind cost nothing. What is wrong is an error, what is doubtful a warning, once for
a purifier and its variants, and once for the models of `coup_fast.purify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from coup_fast._torch.differentiated import explain
from coup_fast.plan import AnyPlan, Plan
from coup_fast.run.aside import aside
from coup_fast.run.assumptions import named_modules
from coup_fast.run.guidance import confidence_gradient, guidance_of
from coup_fast.run.replay_guards import Fingerprint
from coup_fast.run.steps import Run
from coup_fast.run.stiffness import coefficients, is_stiff, norms
from coup_fast.run.warn import warn

Function = Callable[[Tensor], Tensor]

_SEED = 20140820  # of the direction along which derivatives are compared
_IMAGES = 2  # at most; enough to see that one depends on another
_CUT = (
    "the {}'s answer carries no gradient, though it depends on the input; compute it with torch "
    "operations and without torch.no_grad(), detach() or quantised layers"
)


class Looks:
    """Which kinds of run were looked at, and what was said, for one purifier and its variants."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self._said: set[str] = set()

    def say(self, about: str, message: str) -> None:
        """Warn, once for each subject."""
        if about not in self._said:
            self._said.add(about)
            warn(message)


_of_models: WeakKeyDictionary[nn.Module, dict[int, Looks]] = WeakKeyDictionary()


def looks_of(score_model: nn.Module, classifier: object) -> Looks:
    """The looks that all purifiers share which ask for those of these models."""
    return _of_models.setdefault(score_model, {}).setdefault(id(classifier), Looks())


def look_at_run(run: Run, images: Tensor, looks: Looks, *, differentiated: bool) -> None:
    """Look at a run's models, if this is the first run of its kind; it has ended well.

    differentiated: through the network, and not through the guidance alone.
    """
    kind = (
        *(id(model) for model in run.models),
        *(images.dtype, images.device, len(images) > 1, differentiated, run.calls.autocast),
    )
    if len(images) == 0:
        return
    run, images = run.of(slice(0, _IMAGES)), images[:_IMAGES]
    if kind not in looks.seen:
        _look_at_models(run, images, looks, differentiated)
        looks.seen.add(kind)
    steps = (*kind[:3], images.dtype, images.device, run.plan.digest)
    if _is_explicit(run.plan) and steps not in looks.seen:
        with _aside():
            _look_at_stiffness(run, images, looks)
        looks.seen.add(steps)


def _look_at_models(run: Run, images: Tensor, looks: Looks, differentiated: bool) -> None:
    """Call the models of a run a few times, for what only numbers can tell."""
    calls = run.calls
    with _aside():
        _look_at_weights(run.models, looks)
        unchanged = Fingerprint(run.models)
        x = run.start(images)[0].clone()
        timed = [k for k, called in enumerate(run.timed) if called]
        if timed:
            time = run.tables.times[timed[0]].expand(len(x))
            answer = _look_at_function(
                "score network",
                lambda state: calls.network_alone(state, time),
                x,
                looks,
                differentiated=differentiated,
            )
            _refuse_infinities(run, timed[0], answer, x.shape[1])
        if calls.classifier is not None:
            look_at_classifier(calls.classify_alone, 0.5 * x + 0.5, looks, differentiated=True)
            _look_at_guidance(confidence_gradient(calls.classify_alone, x, run.ops), looks)
        unchanged.check(
            "by their own calls",
            "a model that changes itself gives an image other results at other times; call "
            ".eval() on it",
        )


def look_at_classifier(
    classify: Function, pixels: Tensor, looks: Looks, *, differentiated: bool
) -> None:
    """Look at a classifier's answers for these pixels."""
    with _aside():
        pixels = pixels[:_IMAGES].clone()
        logits = _look_at_function(
            "classifier", classify, pixels, looks, differentiated=differentiated
        )
        _look_at_logits(logits, looks)


@contextmanager
def _aside() -> Iterator[None]:
    """Within a caller's modes, but not in them, and not seen by hooks on what autograd saves."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.no_grad(), hooks, aside():
        yield


def _refuse_infinities(run: Run, k: int, answer: Tensor, channels: int) -> None:
    """FloatingPointError if a network's answer at step k is not finite.

    A NaN reaches the result, which is looked at after each run. An infinity becomes a pixel where
    the method clamps.
    """
    used = answer if run.plan.learned_variance else answer[:, :channels]
    if not bool(used.isfinite().all()):
        raise FloatingPointError(
            f"{run.plan.method}: the score network's output is inf or NaN at step {k + 1} of "
            f"{run.num_steps}, where the method's clamp hides it from the result"
        )


def _look_at_weights(models: tuple[Any, ...], looks: Looks) -> None:
    """Warns of weights that are inf or NaN. Waits for the device once."""
    named = [
        (f"{name}.{key}", tensor)
        for name, module in named_modules(models)
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point() and tensor.device.type != "meta"
    ]
    bad = [name for name, tensor in named if not bool(tensor.isfinite().all())]
    if bad:
        looks.say(
            "weights",
            f"weights of the models are inf or NaN: {', '.join(bad[:3])}"
            + (f" and {len(bad) - 3} more" if len(bad) > 3 else ""),
        )


def _look_at_function(
    name: str, function: Function, x: Tensor, looks: Looks, *, differentiated: bool
) -> Tensor:
    """Call a model at x [B, ...] a few times and compare; returns its answer.

    RuntimeError for a model that writes to its input or, if it is to be differentiated, cuts its
    whole answer from the graph. Warnings: an answer that is another one the second time, or with
    other images beside; derivatives that are not those of the values.
    """
    given = x.clone()
    answer = function(given).clone()  # some answer in the same memory again
    steady, depends = True, bool((answer != answer[:1]).any())
    for one in {0, len(x) - 1}:  # an image that decides for all others sees no change itself
        again = function(x[one : one + 1].expand_as(x).clone())
        steady = steady and _alike(answer[one], again[one])
    if not torch.equal(given, x):  # some write to what they were given before
        raise RuntimeError(
            f"the {name} changed its input in place, which is the state of the run; let it work on "
            "a copy"
        )
    if not steady:
        depends = len(x) > 1 and _alike(answer, function(x.clone()))
        if depends:
            looks.say(
                f"{name}: batch",
                f"the {name}'s answer for an image depends on the other images in its batch, so "
                "results and gradients do too",
            )
        else:
            looks.say(
                f"{name}: random",
                f"the {name} gave two answers to one input: it draws random numbers of its own, or "
                "keeps state between calls, so results are not decided by seed, sample id and draw",
            )
    if differentiated:
        try:
            if depends:
                _require_graph(name, function, x)
            if steady:
                _look_at_derivative(name, function, x, looks)
        except RuntimeError as error:
            explain(error, f"the {name}")
            raise
    return answer


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = max(1e-3, 256 * torch.finfo(a.dtype).eps)
    return not bool((a - b).abs().max() > tolerance * a.abs().max())


def _require_graph(name: str, function: Function, x: Tensor) -> None:
    """RuntimeError for a model whose answer, which depends on x, has no graph back to it."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        answer = function(leaf)
    gradient = None
    if answer.requires_grad:
        nothing = torch.zeros_like(answer)
        (gradient,) = torch.autograd.grad(answer, leaf, nothing, allow_unused=True)
    if gradient is None:
        raise RuntimeError(_CUT.format(name))


def _look_at_derivative(name: str, function: Function, x: Tensor, looks: Looks) -> None:
    """Hold the derivative along a random direction against two finite differences.

    Where these two differ (kinks, roundings of half precision), less can be said, and nothing where
    they differ by a tenth.
    """
    generator = torch.Generator("cpu").manual_seed(_SEED)
    direction = (torch.rand(x.shape, generator=generator, device="cpu") - 0.5).sign().to(x)

    def difference(step: float) -> Tensor:
        ahead = function(x + step * direction).to(torch.float64, copy=True)
        return (ahead - function(x - step * direction).to(torch.float64)) / (2 * step)

    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        answer = function(leaf)
    step = 0.5 * torch.finfo(answer.dtype).eps ** (1 / 3)
    wide, narrow = difference(step), difference(0.5 * step)
    size = float(wide.norm())
    doubt = float((wide - narrow).norm()) / size if size > 0 else 1.0
    if not doubt < 0.1:
        return
    gradient = None
    if answer.requires_grad:
        weight = (wide / size).to(answer.dtype)
        (gradient,) = torch.autograd.grad(answer, leaf, weight, allow_unused=True)
    if gradient is None:
        raise RuntimeError(_CUT.format(name))
    along = float((gradient.to(torch.float64) * direction).sum())
    share = along / float((wide * narrow).sum() / size)
    if not abs(share - 1) <= max(0.03, 4 * doubt):
        looks.say(
            f"{name}: derivative",
            f"the {name}'s derivative is not that of its values: along a random direction it gives "
            f"{share:.0%} of the change that is measured. A part is cut from the graph "
            "(torch.no_grad, detach, .data) or has a backward of another kind, and gradients "
            "through the purifier follow it",
        )


def _look_at_logits(logits: Tensor, looks: Looks) -> None:
    """Warns of probabilities in the place of logits, and of logits that are infinite."""
    if logits.numel() == 0:
        return
    values = logits.detach().to(torch.float64)
    total = values.sum(1)
    if bool((values >= 0).all() & (values <= 1).all() & ((total - 1).abs() < 1e-3).all()):
        looks.say(
            "probabilities",
            "the classifier's answers are in [0, 1] and add up to 1 for every image: probabilities "
            "are taken for logits here, which makes guidance, losses and votes a fraction of what "
            "they should be. Leave its softmax out, or return torch.log of it",
        )
    if bool(values.isinf().any()):
        looks.say(
            "infinite logits",
            "the classifier returns logits that are infinite: their gradients are NaN or 0, and "
            "losses of these classes infinite; return log-probabilities above -1e4 or so",
        )


def _look_at_guidance(guidance: Tensor, looks: Looks) -> None:
    """Warns of images whose guidance is exactly zero."""
    flat = int((guidance.detach() == 0).flatten(1).all(1).sum())
    if flat:
        looks.say(
            "no guidance",
            f"the gradient of the classifier's log-confidence is exactly 0 for {flat} of "
            f"{len(guidance)} images that were looked at, at the first step, so guidance does "
            "nothing there: its logits are saturated (their largest softmax is 1 to the last bit), "
            "clamped or constant",
        )


def _is_explicit(plan: AnyPlan) -> bool:
    """Whether steps of guidance are the published ones, whose length nothing bounds."""
    return isinstance(plan, Plan) and plan.needs_classifier and plan.guidance_norm == "none"


def _look_at_stiffness(run: Run, images: Tensor, looks: Looks) -> None:
    """Warns of explicit steps of guidance that overshoot at the states before the first step."""
    plan = run.plan
    assert isinstance(plan, Plan)
    x = run.start(images)[0].clone()
    gradient, margin = guidance_of(run.calls.classify_alone, x, run.ops, "margin")
    assert margin is not None
    steepness = norms(gradient)
    moved = torch.exp(-margin) > torch.finfo(torch.float32).tiny  # else the explicit step is 0
    stiff = is_stiff(coefficients(plan)[:, None], steepness) & moved
    if bool(stiff.any()):
        share = float(stiff.double().mean())
        slope = float(steepness.max())
        looks.say(
            "stiff guidance",
            f"explicit steps of guidance overshoot at {share:.0%} of the states that were looked "
            f"at ({len(x)} images before their first step, with the coefficients of all "
            f"{len(stiff)} guided steps): c a²/4 is above 2 there, with a = {slope:.3g} the norm "
            "of the margin's gradient and c the step's coefficient. Take more steps, a smaller "
            "guidance_scale, or guidance_solver='stable' (coup_fast.stiffness says more)",
        )
