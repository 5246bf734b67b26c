"""`torch.ops.coup_fast.*` called directly refuses and records what `coup_fast.ops` does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers.sampling import perturb_row, step

from coup_fast import ops  # and loads and registers the operators

kernels = torch.ops.coup_fast
ADAPTIVE_ROW = torch.tensor([5e-5, 1e-5, 0.1, 1e-3, 1, 0, 0, 1])


def adaptive(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    h = torch.ones(2, 3, 4, 5)
    return kernels.adaptive_step(x, h, 0.9 * h, torch.tensor([True, True]), row)[0]


# Operator -> a function of images and coefficients, and the coefficients.
OPERATORS: dict[str, tuple[Callable, torch.Tensor]] = {
    "perturb": (kernels.perturb, perturb_row(std=0.3)),
    "reverse_step": (lambda x, row: kernels.reverse_step(x, None, row), step((2, 3, 4, 5)).coeffs),
    "adaptive_step": (adaptive, ADAPTIVE_ROW),
}


def images() -> torch.Tensor:
    return torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_tangents_are_refused(name: str, grad: bool) -> None:
    function, row = OPERATORS[name]
    said = rf"ops\.{name} has no forward-mode"
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
            function(forward_ad.make_dual(images(), images()), row)
        with pytest.raises(RuntimeError, match=said):
            torch.func.jvp(lambda x: function(x, row), (images(),), (images(),))


@pytest.mark.parametrize("name", OPERATORS)
def test_coefficients_that_require_grad_are_refused(name: str) -> None:
    function, row = OPERATORS[name]
    row = row.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"ops\.{name} does not differentiate its coeff"):
        function(images(), row)
    with torch.no_grad():
        function(images(), row)
    with pytest.raises(RuntimeError, match="does not differentiate its coeff"):
        torch.compile(lambda x, row: function(x, row), backend="aot_eager")(images(), row)


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_are_refused(name: str) -> None:
    function, row = OPERATORS[name]
    with pytest.raises(RuntimeError, match="differentiated inside a transform"):
        torch.func.grad(lambda x: function(x, row).sum())(images())


def test_the_step_in_place_has_no_gradient() -> None:
    call = step((2, 3, 4, 5))
    for name in ("x", "model_out", "coeffs", "guidance", "reference"):
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(call).items()}
        if given[name] is None:
            continue
        given[name].requires_grad_()
        with pytest.raises(RuntimeError, match="reverse_step_ is not differentiable"):
            kernels.reverse_step_(*given.values())
        with torch.no_grad():
            kernels.reverse_step_(*given.values())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode"):
        kernels.reverse_step_(forward_ad.make_dual(images(), images()), *call.args[1:])


def test_the_step_in_place_counts_as_a_change() -> None:
    x, row = images(), OPERATORS["reverse_step"][1]
    factor = torch.ones(()).requires_grad_()
    product = factor * x
    kernels.reverse_step_(x, None, row)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    y = images()
    with torch.inference_mode():
        kernels.reverse_step_(y, None, row)
        kernels.reverse_step_(images(), None, row)
    assert y._version == 1


@pytest.mark.parametrize("wrong", [None, images().numpy(), "images"], ids=["None", "array", "text"])
def test_what_is_no_tensor_is_refused_by_its_name(wrong: object) -> None:
    row = OPERATORS["perturb"][1]
    for module in (ops, kernels):
        for args, name in (((wrong, row), "images"), ((images(), wrong), "coeffs")):
            with pytest.raises((RuntimeError, TypeError), match=rf"\b{name}\b"):
                module.perturb(*args)


def test_all_is_registered_by_the_import_of_the_package() -> None:
    code = (
        "import sys, torch, coup_fast\n"
        "assert 'coup_fast.ops' not in sys.modules\n"
        "logits = torch.randn(2, 3, requires_grad=True)\n"
        "torch.ops.coup_fast.confidence_cotangent(logits)[0].sum().backward()\n"
        "assert logits.grad.abs().sum() > 0\n"
        "assert torch.ops.coup_fast.confidence_cotangent(logits.to('meta'))[0].is_meta\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
