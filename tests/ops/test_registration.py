"""What torch asks of operators: schemas, fakes and gradients registered, and no recompilation."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from helpers.sampling import NORMS, STEP_ROWS, keys_of, perturb_row, step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from coup_fast import ops, reference

kernels = torch.ops.coup_fast


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def step_calls() -> dict[str, tuple]:
    shape = (3, 2, 4, 5)
    learned = step(shape, dtype=torch.float16, learned=True, guidance_norm="clipped")
    bare, stable = step(shape), step(shape, guidance_norm="stable")
    return {
        "full": learned.args,
        "stable": stable.args,
        "channels_last": learned.map(channels_last).args,
        "views": learned.map(lambda t: t.repeat(1, 2, 1, 1)[:, : t.shape[1]]).args,
        "plain": (bare.x, bare.model_out, bare.coeffs, None, None, None, None, "none"),
        "alone": (bare.x, None, bare.coeffs, bare.keys, None, None, None, "none"),
    }


def sample_calls() -> dict[str, tuple[Callable, tuple]]:
    """Every operator, as (operator, arguments)."""
    torch.manual_seed(0)
    calls: dict[str, tuple[Callable, tuple]] = {}
    for name, args in step_calls().items():
        calls[f"reverse_step {name}"] = (kernels.reverse_step, args)
        calls[f"reverse_step_backward {name}"] = (
            kernels.reverse_step_backward,
            (torch.randn(args[0].shape), *args),
        )
        if name != "views":
            calls[f"reverse_step_ {name}"] = (kernels.reverse_step_, args)
    row, keys = perturb_row(std=0.3, lo=-1, hi=1), keys_of(3, (2, 4, 5))
    for name, images in {
        "float32": torch.rand(3, 2, 4, 5),
        "channels_last": channels_last(torch.rand(3, 2, 4, 5).bfloat16()),
    }.items():
        calls[f"perturb {name}"] = (kernels.perturb, (images, row, keys, None))
        calls[f"perturb_backward {name}"] = (
            kernels.perturb_backward,
            (torch.randn(3, 2, 4, 5), images, row, keys, None),
        )
    calls["normal"] = (kernels.normal, (keys, [3, 2, 4, 5]))
    h = torch.randn(3, 2, 4, 5)
    adaptive = (
        torch.rand(3, 2, 4, 5),
        h,
        0.999 * h + 1e-4,
        torch.tensor([True, False, True]),
        torch.tensor([5e-5, 1e-5, 0.1, 1e-3, 256 / 255, -1 / 510, 0, 1]),
    )
    calls["adaptive_step"] = (kernels.adaptive_step, adaptive)
    calls["adaptive_step_backward"] = (kernels.adaptive_step_backward, (h.flip(0), *adaptive))
    logits = torch.randn(4, 10)
    for quantity in ("log_confidence", "margin"):
        grads = torch.randn(4), torch.randn(4, 10)
        calls[f"confidence_cotangent {quantity}"] = (
            kernels.confidence_cotangent,
            (logits, quantity),
        )
        calls[f"confidence_cotangent_backward {quantity}"] = (
            kernels.confidence_cotangent_backward,
            (*grads, logits, quantity),
        )
    return calls


CALLS = sample_calls()
# By input: the gradients that opcheck should find registered.
DIFFERENTIABLE = {
    "reverse_step": (0, 1, 4, 5, 8),
    "perturb": (0,),
    "adaptive_step": (0, 1, 2),
    "confidence_cotangent": (0,),
}


def test_every_operator_has_a_call() -> None:
    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("coup_fast::")}
    untested = {"coup_fast::cpu_capability", "coup_fast::build_config"}
    assert {op._qualified_op_name for op, _ in CALLS.values()} == schemas - untested


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, args = CALLS[name]
    wanted = DIFFERENTIABLE.get(name.split()[0], ())
    args = [
        a.clone().requires_grad_() if i in wanted and a is not None else a
        for i, a in enumerate(args)
    ]
    opcheck(op.default, tuple(args))


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_have_shape_type_and_strides_of_the_real_ones(name: str) -> None:
    op, args = CALLS[name]
    args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    real = op(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = op(*fakes)
    real, fake = ((t,) if isinstance(t, torch.Tensor) else t or () for t in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_signatures_are_those_of_the_reference() -> None:
    for name in (
        "normal",
        "perturb",
        "reverse_step",
        "reverse_step_",
        "adaptive_step",
        "confidence_cotangent",
    ):
        compiled, plain = (inspect.signature(getattr(m, name)) for m in (ops, reference))
        assert compiled == plain, name


def test_new_rows_and_keys_do_not_recompile() -> None:
    shape = (2, 3, 8, 8)
    compiled = 0

    def count(graph: torch.fx.GraphModule, _: list) -> Callable:
        nonlocal compiled
        compiled += 1
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def steps(x, m, row, keys, guidance, start):
        x = ops.perturb(x, start, keys)
        x = ops.reverse_step(x, m, row, keys, guidance, None, None, "normalised")
        ops.reverse_step_(x, m, row, keys)
        _, cotangent = ops.confidence_cotangent(x.flatten(1))
        return x + ops.normal(keys, x.shape), cotangent

    x, m, guidance = (torch.randn(shape) for _ in range(3))
    for number, row in enumerate(STEP_ROWS.values()):
        keys = keys_of(2, shape[1:], number, seed=number)
        with torch.no_grad():
            args = (x, m, row, keys, guidance, perturb_row(std=0.1 * number))
            out = steps(*args)
            expected = steps._torchdynamo_orig_callable(*args)
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)
    assert compiled == 1


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_through_a_compiled_function(norm: str) -> None:
    call = step((2, 3, 4, 4), guidance_norm=norm)
    x, args = call.x.requires_grad_(), call.args[1:]

    def loss(x):
        return ops.reverse_step(x, *args).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.equal(actual, expected)


def test_gradients_are_recorded_wherever_an_input_requires_them() -> None:
    """The wrappers go past the autograd layer elsewhere, and the kernel's bits are the same."""
    call = step((2, 3, 4, 5))
    plain = ops.reverse_step(*call.args)
    assert not plain.requires_grad
    for name in ("x", "model_out", "guidance", "reference"):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        tensor.requires_grad_()
        recorded = ops.reverse_step(*call.args)
        assert recorded.requires_grad
        assert torch.equal(recorded, plain)
        with torch.no_grad():
            assert not ops.reverse_step(*call.args).requires_grad
        tensor.requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(ops.reverse_step(*call.args)).__name__ == "FakeTensor"
