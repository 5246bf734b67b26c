"""The fused step against float64, its gradient, its memory formats and its messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.sampling import DTYPES, LOW, NORMS, STEP_ROWS, VIEWS, step, step_row, ulps, views_of

from coup_fast import ops, reference

SHAPES = [(1, 1), (2, 5), (1, 1003), (33, 1, 7), (5, 3, 13, 17), (2, 3, 32, 32), (2, 2, 3, 4, 5)]


def known_noise(call):
    """The same call with the noise it would draw given."""
    return call.with_noise(ops.normal(call.keys, call.x.shape))


def assert_is_the_formula(call) -> None:
    error = (ops.reverse_step(*call.args).double() - known_noise(call).truth()).abs()
    assert bool((error <= 2e-6 * known_noise(call).magnitude()).all())


@pytest.mark.parametrize("row", STEP_ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step_is_the_formula(shape, row: str) -> None:
    assert_is_the_formula(step(shape, row))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (33, 1, 7), (5, 3, 13, 17), (2, 3, 80, 80)])
def test_variance_and_guidance_norms(shape, learned: bool, norm: str) -> None:
    assert_is_the_formula(step(shape, learned=learned, guidance_norm=norm))


@pytest.mark.parametrize("model", DTYPES)
@pytest.mark.parametrize("guide", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_any_mix_of_types_is_read_exactly(model, guide, other) -> None:
    call = step((3, 2, 5, 7), dtype=(model, guide, other), learned=True, guidance_norm="clipped")
    assert_is_the_formula(call)
    assert torch.equal(
        ops.reverse_step(*call.args), ops.reverse_step(*call.map(lambda t: t.float()).args)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"shape": (2, 3, 32, 32), "row": "langevin"}], ids=str)
def test_given_noise_is_used_as_generated_noise_is(options, dtype) -> None:
    call = step(**options)
    z = ops.normal(call.keys, call.x.shape)
    assert torch.equal(ops.reverse_step(*call.args), ops.reverse_step(*call.with_noise(z).args))
    low = z.to(dtype)
    given = replace(call, noise=low)  # keys are then ignored
    assert torch.equal(
        ops.reverse_step(*given.args), ops.reverse_step(*call.with_noise(low.float()).args)
    )


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_rows_without_bounds_have_the_bits_of_rows_with_some(scale: float) -> None:
    """They have a loop of their own. Sums of -0, as underflow leaves them, become +0 in both."""
    bare = step_row(v=0.9 * scale, w=-0.3 * scale, c=0.2 * scale, d=0.1 if scale == 1 else 2e-45)
    call = step((2, 3, 32, 32)).map(lambda t: scale * t)
    bounded = bare.clone()
    bounded[10], bounded[11] = -3e38, 3e38  # out_lo, out_hi
    actual, expected = (
        ops.reverse_step(*replace(call, coeffs=row).args).view(torch.int32)
        for row in (bare, bounded)
    )
    assert torch.equal(actual, expected)
    if scale != 1:
        assert (actual == 0).any()
        assert (actual != torch.iinfo(torch.int32).min).all()


def test_absent_inputs_contribute_nothing() -> None:
    call = replace(step(), coeffs=step_row(v=0.5, w=2, c=3, e=4, d=5, u=1, p=0.5, q=7))
    assert torch.equal(ops.reverse_step(call.x, None, call.coeffs), call.x)
    zeros = torch.zeros_like(call.x)
    alone = ops.reverse_step(call.x, call.model_out, call.coeffs)
    assert torch.equal(
        alone, ops.reverse_step(call.x, call.model_out, call.coeffs, None, zeros, zeros, zeros)
    )


def test_terms_of_coefficient_zero_contribute_nothing() -> None:
    call = step(learned=True)
    bad = call.map(lambda t: torch.full_like(t, torch.nan))
    row = step_row(v=0.5, log_var_lo=-1, log_var_hi=-0.5)
    out = ops.reverse_step(call.x, bad.model_out, row, None, bad.guidance, bad.reference, bad.noise)
    assert torch.equal(out, 0.5 * call.x)
    assert not ops.reverse_step(bad.x, None, step_row(), call.keys).any()


def test_nan_and_infinity_propagate_through_clamps() -> None:
    call = step((1, 1, 2, 3), "everything")
    call.x[0, 0, 0, 0], call.x[0, 0, 0, 1] = torch.nan, torch.inf
    out = ops.reverse_step(*call.args)
    expected = known_noise(call).truth()
    assert torch.equal(out.isnan(), expected.isnan())
    assert int(out.isnan().sum()) == 1
    assert out[0, 0, 0, 1] == expected[0, 0, 0, 1] == 1.25


@pytest.mark.parametrize("norm", ["normalised", "clipped"])
def test_guidance_of_norm_zero(norm: str) -> None:
    call = step(guidance_norm=norm)
    call.guidance[1] = 0
    assert_is_the_formula(call)
    grads = torch.ops.coup_fast.reverse_step_backward(torch.ones_like(call.x), *call.args)
    assert not grads[2][1].any()
    assert all(g.isfinite().all() for g in grads)


def test_a_stable_step_without_gradient_moves_nothing() -> None:
    """Its factor is then the explicit one, c σ(-m), which the gradient through it needs."""
    row = step_row(v=1.0, c=0.7)
    call = replace(step(row="langevin", guidance_norm="stable"), coeffs=row, keys=None)
    call.guidance[1] = 0
    assert torch.equal(ops.reverse_step(*call.args)[1], call.x[1])
    grads = torch.ops.coup_fast.reverse_step_backward(torch.ones_like(call.x), *call.args)
    explicit = 0.7 * torch.sigmoid(-call.margin[1])
    torch.testing.assert_close(grads[2][1], explicit.expand_as(call.x[1]), rtol=1e-6, atol=0)
    assert grads[4][1] == 0
    assert all(g.isfinite().all() for g in grads)


def test_margins_of_rows_without_guidance_get_no_gradient() -> None:
    call = replace(step(guidance_norm="stable"), coeffs=step_row(v=0.5))
    call.guidance[0, 0, 0, 0] = torch.nan
    grads = torch.ops.coup_fast.reverse_step_backward(torch.ones_like(call.x), *call.args)
    assert not grads[2].any()
    assert not grads[4].any()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 13, 17), (2, 3, 32, 32), (1, 2, 27, 40)])
def test_memory_formats_of_inputs_do_not_matter(shape, dtype, name: str) -> None:
    call = step(shape, dtype=dtype, learned=True, guidance_norm="normalised")
    expected = ops.reverse_step(*call.args)
    viewed = call.map(lambda t: views_of(t)[name])
    assert torch.equal(ops.reverse_step(*viewed.args), expected)
    assert torch.equal(ops.reverse_step(*replace(viewed, x=call.x).args), expected)
    grad = torch.randn_like(call.x)
    plain = torch.ops.coup_fast.reverse_step_backward(grad, *call.args)
    strided = torch.ops.coup_fast.reverse_step_backward(views_of(grad)[name], *viewed.args)
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_have_the_layout_of_their_input(channels: int, layout) -> None:
    call = step((2, channels, 4, 5), dtype=torch.float16).map(
        lambda t: t.contiguous(memory_format=layout)
    )
    out = ops.reverse_step(*call.args)
    assert out.stride() == call.x.stride()
    grads = torch.ops.coup_fast.reverse_step_backward(out, *call.args)
    for grad, of in zip(
        grads[:4], (call.x, call.model_out, call.guidance, call.reference), strict=True
    ):
        assert (grad.stride(), grad.dtype, grad.shape) == (of.stride(), of.dtype, of.shape)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_place_twin(layout, norm: str) -> None:
    call = step(learned=True, guidance_norm=norm)
    call = call.map(lambda t: t.contiguous(memory_format=layout))
    expected, version = ops.reverse_step(*call.args), call.x._version
    assert ops.reverse_step_(*call.args) is None
    assert torch.equal(call.x, expected)
    assert call.x._version > version


def test_in_place_twin_refuses() -> None:
    call = step((4, 3, 4, 4))
    with pytest.raises(RuntimeError, match=r": x .*channels_last .* \[48, 16, 8, 1\]"):
        ops.reverse_step_(call.x[:, :, ::2], None, call.coeffs)
    for name in ("x", "model_out", "guidance", "reference"):
        wanted = replace(call, **{name: getattr(call, name).clone().requires_grad_()})
        with pytest.raises(RuntimeError, match="reverse_step_ is not differentiable"):
            ops.reverse_step_(*wanted.args)
        with torch.no_grad():
            ops.reverse_step_(*wanted.args)


# --- gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("row", STEP_ROWS)
@pytest.mark.parametrize("shape", [(2, 5), (5, 3, 13, 17), (2, 1, 140, 140)])
def test_gradient_is_that_of_the_formula(shape, row: str, learned: bool, norm: str) -> None:
    assert_gradient_is_that_of_the_formula(step(shape, row, learned=learned, guidance_norm=norm))


def assert_gradient_is_that_of_the_formula(call) -> None:
    exact = known_noise(call).map(lambda t: t.double())
    leaves = [exact.x, exact.model_out, exact.guidance, exact.reference]
    if exact.margin is not None:
        exact = replace(exact, margin=exact.margin.double())
        leaves.append(exact.margin)
    leaves = [t.requires_grad_() for t in leaves]
    grad = torch.randn_like(call.x)
    out = reference.reverse_step(*exact.args)  # whose gradient test_reference_step.py checks
    expected = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True)
    grads = torch.ops.coup_fast.reverse_step_backward(grad, *call.args)
    assert len(grads[4]) == (0 if exact.margin is None else len(call.x))
    for actual, wanted, of in zip(grads, expected, leaves, strict=False):
        wanted = torch.zeros_like(of) if wanted is None else wanted
        error, scale = (actual.double() - wanted).abs(), wanted.abs().max() + 1e-6
        assert float(error.max()) <= 5e-6 * float(scale)


@pytest.mark.parametrize("columns", [{"x_var": 0.3}, {"v": 0.6, "z_var": 0.4}, {"e": 0.1}], ids=str)
def test_one_term_alone_depends_on_the_variance(columns: dict[str, float]) -> None:
    call = replace(step(learned=True), coeffs=step_row(**columns))
    assert_is_the_formula(call)
    assert_gradient_is_that_of_the_formula(call)


def test_gradient_where_learned_noise_vanishes() -> None:
    """d² V underflows to 0: the slope of its root is then taken as 0, not as 0 / 0."""
    call = replace(step(learned=True), coeffs=step_row(v=0.5, d=1e-30))
    grads = torch.ops.coup_fast.reverse_step_backward(torch.ones_like(call.x), *call.args)
    assert torch.equal(grads[0], torch.full_like(call.x, 0.5))
    assert not any(grad.any() for grad in grads[1:])


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_in_low_precision_are_rounded_once(dtype) -> None:
    call = step(dtype=dtype, learned=True)
    grad = torch.randn_like(call.x)
    low = torch.ops.coup_fast.reverse_step_backward(grad, *call.args)
    exact = torch.ops.coup_fast.reverse_step_backward(grad, *call.map(lambda t: t.float()).args)
    for a, b in zip(low[1:4], exact[1:4], strict=True):
        assert torch.equal(a, b.to(dtype))
    wide = known_noise(call).map(lambda t: t.double())
    wide.model_out.requires_grad_()
    (wanted,) = torch.autograd.grad(wide.truth(), [wide.model_out], grad.double())
    normal = wanted.abs() > torch.finfo(dtype).tiny
    assert float(ulps(low[1], wanted)[normal].max()) <= 1


@pytest.mark.parametrize("norm", ["clipped", "stable"])
@pytest.mark.parametrize("wanted", ["x", "model_out", "guidance", "reference", "margin"])
def test_autograd_returns_what_is_asked_for(wanted: str, norm: str) -> None:
    call = step(guidance_norm=norm)
    if getattr(call, wanted) is None:
        return
    leaf = getattr(call, wanted).clone().requires_grad_()
    call = replace(call, **{wanted: leaf})
    out = ops.reverse_step(*call.args)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    (expected,) = torch.autograd.grad(reference.reverse_step(*call.args).sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_gradient_without_optional_inputs_and_from_an_expanded_one() -> None:
    call = step()
    x = call.x.requires_grad_()
    row = step_row(v=0.5, w=2.0)
    (grad,) = torch.autograd.grad(ops.reverse_step(x, None, row).sum(), x)  # grad: expanded ones
    assert torch.equal(grad, torch.full_like(x, 0.5))
    grads = torch.ops.coup_fast.reverse_step_backward(
        x.detach(), x.detach(), None, row, None, None, None, None, "none", None
    )
    assert [g.numel() for g in grads] == [x.numel(), 0, 0, 0, 0]


def test_second_gradient_is_refused() -> None:
    call = step()
    x = call.x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.reverse_step(*call.args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


# --- edges and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["normalised", "stable"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty_tensors(shape, norm: str) -> None:
    call = step(shape, dtype=torch.float16, guidance_norm=norm)
    assert ops.reverse_step(*call.args).shape == shape
    ops.reverse_step_(*call.args)
    grads = torch.ops.coup_fast.reverse_step_backward(call.x, *call.args)
    assert [g.shape for g in grads[:4]] == [call.x.shape] * 4
    assert grads[4].shape == (len(call.x) if norm == "stable" else 0,)
    assert not grads[4].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2)}, r": x .*\[B, C, ...\].* got float32 \[2\]"),
        ({"x": torch.zeros(2, 3, 4, 4).double()}, ": x .*float32 .* got float64"),
        (
            {"model_out": torch.zeros(2, 4, 4, 4)},
            r": model_out .*\[2, 3, 4, 4\].*twice.* got float32 \[2, 4, 4, 4\]",
        ),
        ({"model_out": torch.zeros(2, 3, 4, 4).double()}, ": model_out .*bfloat16, got float64"),
        ({"guidance": torch.zeros(2, 3, 4)}, r": guidance .*, got float32 \[2, 3, 4\]"),
        ({"guidance": torch.zeros(2, 6, 4, 4)}, r": guidance .* got float32 \[2, 6, 4, 4\]"),
        (
            {"reference": torch.zeros(1, 3, 4, 4)},
            r": reference .* got float32 \[1, 3, 4, 4\]",
        ),
        ({"noise": torch.zeros(2, 3, 4, 5)}, r": noise .* got float32 \[2, 3, 4, 5\]"),
        (
            {"coeffs": torch.zeros(19).double()},
            r": coeffs .*float32 \[19\], got float64",
        ),
        ({"coeffs": torch.zeros(2, 19)}, r": coeffs .*float32 \[19\], got float32 \[2, 19\]"),
        ({"keys": torch.zeros(3, 2).long()}, r": keys .*int64 \[2, 2\] .* got int64 \[3, 2\]"),
        ({"keys": torch.zeros(2, 2)}, r": keys .*int64 .* got float32 \[2, 2\]"),
        ({"guidance_norm": "l2"}, ": guidance_norm .*none, normalised, clipped or stable, got l2"),
        ({"guidance_norm": "stable"}, ": margin must .*got guidance_norm stable, guidance and no"),
        ({"margin": torch.zeros(2)}, ": margin must .*got guidance_norm none, guidance and a mar"),
        (
            {"guidance_norm": "stable", "guidance": None, "margin": torch.zeros(2)},
            ": margin must .*got guidance_norm stable, no guidance and a margin",
        ),
        (
            {"guidance_norm": "stable", "margin": torch.zeros(3)},
            r": margin must be float32 \[2\], got float32 \[3\]",
        ),
        (
            {"guidance_norm": "stable", "margin": torch.zeros(2).double()},
            r": margin must be float32 \[2\], got float64 \[2\]",
        ),
    ],
)
def test_errors_name_argument_given_and_expected(change: dict, said: str) -> None:
    call = replace(step((2, 3, 4, 4)), **change)
    for op in (ops.reverse_step, ops.reverse_step_):
        with pytest.raises(RuntimeError, match=said):
            op(*call.args)
