"""Transforms of PyTorch that a run cannot follow are refused by name, not dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers.sampling import perturb_row, step
from helpers.tiny import gradient_of, images, short_purifier

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, ops, reference

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

STEP = step((2, 3, 4, 4), guidance_norm="normalised")
H = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)
ADAPTIVE_ROW = torch.tensor([5e-5, 1e-5, 0.1, 1e-3, 256 / 255, -1 / 510, 0, 1])


def in_place(x: torch.Tensor) -> torch.Tensor:
    ops.reverse_step_(x, *STEP.args[1:])
    return x


# Each operator as a function of one tensor it is differentiable in.
OPERATORS: dict[str, tuple[Callable, torch.Tensor]] = {
    "perturb": (lambda u: ops.perturb(u, perturb_row()), H.abs()),
    "reverse_step": (lambda x: ops.reverse_step(x, *STEP.args[1:]), STEP.x),
    "reverse_step guidance": (
        lambda g: ops.reverse_step(*STEP.args[:4], g, *STEP.args[5:]),
        STEP.guidance,
    ),
    "reverse_step_": (in_place, STEP.x),
    "adaptive_step": (
        lambda h: ops.adaptive_step(H, h, 0.9 * H, torch.ones(2, dtype=torch.bool), ADAPTIVE_ROW)[
            0
        ],
        H,
    ),
    "confidence_cotangent": (lambda logits: ops.confidence_cotangent(logits)[1], H.flatten(1)),
}


def with_tangent(function: Callable, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x.clone(), torch.ones_like(x)))


def by_jvp(function: Callable, x: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(function, (x.clone(),), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("forward", [with_tangent, by_jvp])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_tangents(name: str, forward: Callable) -> None:
    function, x = OPERATORS[name]
    with pytest.raises(RuntimeError, match=rf"ops\.{name.split()[0]} has no forward-mode"):
        forward(function, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no forward-mode"):
        forward(function, x)


def test_operators_work_beside_tangents() -> None:
    """A level of forward mode, or of torch.func, that follows none of the inputs."""
    function, x = OPERATORS["reverse_step"]
    want = function(x)
    with forward_ad.dual_level():
        assert torch.equal(function(x), want)
        dual = forward_ad.make_dual(x, x)
        assert torch.equal(function(dual.detach()), want)
        with torch.inference_mode():  # which switches forward mode off
            assert torch.equal(function(dual), want)
    _, tangent = torch.func.jvp(lambda y: [function(x), y][1], (x,), (x,))
    assert torch.equal(tangent, x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_operators_refuse_gradients_inside_torch_func(transform: Callable) -> None:
    function, x = OPERATORS["perturb"]
    with pytest.raises(RuntimeError, match=r"coup_fast\.ops\.perturb .*coup_fast\.reference"):
        transform(lambda u: function(u).sum())(x)


def test_operators_refuse_coefficients_that_require_grad() -> None:
    """The reference differentiates them; here their gradient would be missing without a word."""
    row = STEP.coeffs.clone().requires_grad_()
    for function in (ops.reverse_step, ops.reverse_step_):
        with pytest.raises(RuntimeError, match=r"differentia"):
            function(STEP.x.clone(), STEP.model_out, row)
    with pytest.raises(RuntimeError, match="does not differentiate its coefficients"):
        ops.perturb(H.abs(), perturb_row().requires_grad_())
    with pytest.raises(RuntimeError, match="does not differentiate its coefficients"):
        ops.adaptive_step(
            H, H, 0.9 * H, torch.ones(2, dtype=torch.bool), ADAPTIVE_ROW.clone().requires_grad_()
        )
    with torch.no_grad():
        ops.reverse_step(STEP.x, STEP.model_out, row)
    assert reference.reverse_step(STEP.x, STEP.model_out, row).requires_grad


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_operators_can_be_mapped() -> None:
    rest = STEP.args[2:]
    x, m = (torch.stack([t, 0.5 * t + 0.1]) for t in STEP.args[:2])
    mapped = torch.vmap(lambda x, m: ops.reverse_step(x, m, *rest))(x, m)
    for i in range(2):
        assert torch.equal(mapped[i], ops.reverse_step(x[i], m[i], *rest))


@pytest.mark.parametrize("gradient", ["exact", "autograd", "bpda", "none"])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_purifiers_refuse_tangents(gradient: str, backend: str) -> None:
    """With the reference the tangent would come out, without the guidance's part of it."""
    clean = short_purifier("coup", gradient=gradient, backend=backend)
    defended = PurifiedClassifier(clean, clean.classifier)
    for model in (clean, defended):
        for forward in (with_tangent, by_jvp):
            with pytest.raises(RuntimeError, match="a purifier has no forward-mode"):
                forward(model, images())


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.vmap]
)
def test_purifiers_refuse_torch_func(transform: Callable) -> None:
    clean = short_purifier("diffpure")
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(lambda u: clean(u if u.ndim == 4 else u[None]).sum())(images(1))


@pytest.mark.parametrize("which", ["ids", "draws", "noise", "nothing"])
def test_purifiers_refuse_torch_func_whatever_it_follows(which: str) -> None:
    clean, u = short_purifier("coup"), images()
    calls = {
        "ids": (lambda i: clean(u, sample_ids=i.expand(3)), torch.arange(2)),
        "draws": (lambda i: clean(u, draw=i.expand(3)), torch.arange(2)),
        "noise": (lambda z: clean(u, noise=z), torch.zeros(2, clean.num_noise, *u.shape)),
        "nothing": (lambda w: w * clean(u), torch.ones(2)),
    }
    function, argument = calls[which]
    with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func"):
        torch.vmap(function)(argument)


def test_other_weights_by_functional_call_are_used() -> None:
    clean, other = short_purifier("coup"), short_purifier("coup")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    weights = {name: parameter.detach() for name, parameter in other.named_parameters()}
    found = torch.func.functional_call(clean, weights, (images(),))
    assert torch.equal(found, other(images()))
    assert not torch.equal(found, clean(images()))


def test_scripting_is_refused_by_name() -> None:
    class Around(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return self.inner(u)

    clean = short_purifier("coup")
    for model in (clean, PurifiedClassifier(clean, clean.classifier), clean.score_model):
        for given in (model, Around(model)):
            name = type(model).__name__
            with pytest.raises(RuntimeError, match=rf"cannot compile a {name}: .*script the net"):
                torch.jit.script(given)
    assert clean(images()).shape == images().shape


def test_scripted_networks_work() -> None:
    clean = short_purifier("coup")
    network = torch.jit.script(clean.score_model.network)
    scripted = Purifier(ScoreModel(network), torch.jit.script(clean.classifier), num_steps=3)
    u = images()
    assert torch.equal(scripted(u), clean(u))
    weight = torch.ones_like(u)
    torch.testing.assert_close(gradient_of(scripted, u, weight), gradient_of(clean, u, weight))


def test_the_way_to_a_jvp_that_the_message_names() -> None:
    clean = short_purifier("coup", double=True, backend="reference", gradient="autograd")
    u, direction = images(1, dtype=torch.float64), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    _, tangent = torch.autograd.functional.jvp(clean, u, direction)
    step = 1e-6 * direction
    numeric = (clean(u + step) - clean(u - step)) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-7)


def test_jacobians_by_torch_autograd_are_right_batched_or_not() -> None:
    clean = short_purifier("coup")
    rows = [
        torch.autograd.functional.jacobian(
            lambda u: clean(u).flatten()[:3], images(1), vectorize=vectorize
        )
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(rows[1], rows[0])


def test_recordings_are_refused() -> None:
    clean = short_purifier("diffpure", check_values=False)
    defended = PurifiedClassifier(clean, clean.classifier)
    for model in (clean, defended):
        with pytest.raises(RuntimeError, match="cannot be recorded by"):
            torch.jit.trace(model, (images(),), check_trace=False)
    with pytest.raises(RuntimeError, match="cannot be recorded by"):
        torch.export.export(clean, (images(),), strict=False)
