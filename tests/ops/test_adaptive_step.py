"""The adaptive step of ADP against float64 and the reference, its gradient, its messages."""

from __future__ import annotations

import pytest
import torch
from helpers.cuda_cases import adaptive_arguments, same_bits
from helpers.sampling import DTYPES, VIEWS, views_of

from coup_fast import ops, reference

SHAPES = [
    *[(1, 1), (2, 2), (1, 3), (2, 4), (33, 1, 5), (3, 7), (33, 1003)],
    *[(5, 3, 13, 17), (2, 3, 32, 32), (2, 1, 141, 141), (1, 3, 160, 160)],
]


def backward(grad, *args):
    return torch.ops.coup_fast.adaptive_step_backward(grad, *args)


def in_float64(args):
    """The same call in float64, of the values the op reads."""
    x, h, ahead, alive, coeffs = args
    return x.double(), h.double(), ahead.double(), alive, coeffs.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_step_is_the_formula(shape) -> None:
    args = adaptive_arguments(shape)
    x_next, alive_next, alpha = ops.adaptive_step(*args)
    expected, alive_expected, alpha_expected = reference.adaptive_step(*in_float64(args))
    torch.testing.assert_close(alpha.double(), alpha_expected, rtol=2e-5, atol=0)
    assert torch.equal(alive_next, alive_expected)
    torch.testing.assert_close(x_next.double(), expected, rtol=0, atol=1e-6)
    assert (x_next.dtype, alive_next.dtype, alpha.dtype) == (
        torch.float32,
        torch.bool,
        torch.float32,
    )


def test_the_cases_meet_every_branch() -> None:
    args = adaptive_arguments((33, 1003))
    _, alive_next, alpha = ops.adaptive_step(*args)
    low, high = args[-1][1], args[-1][2]
    assert ((alpha > low) & (alpha < high)).any()
    assert (alpha == low).any()  # gamma > 1
    assert (alpha == high).any()
    assert not alive_next[2]
    assert alive_next.any()


@pytest.mark.parametrize("h_dtype", DTYPES)
@pytest.mark.parametrize("ahead_dtype", DTYPES)
def test_low_precision_is_read_exactly(h_dtype, ahead_dtype) -> None:
    x, h, ahead, alive, coeffs = adaptive_arguments((5, 3, 13, 17), (h_dtype, ahead_dtype))
    wide = ops.adaptive_step(x, h.float(), ahead.float(), alive, coeffs)
    for a, b in zip(ops.adaptive_step(x, h, ahead, alive, coeffs), wide, strict=True):
        assert same_bits(a, b)
    grads = backward(x, x, h, ahead, alive, coeffs)
    wide_grads = backward(x, x, h.float(), ahead.float(), alive, coeffs)
    for grad, wide_grad, of in zip(grads, wide_grads, (x, h, ahead), strict=True):
        assert grad.dtype == of.dtype
        assert same_bits(grad, wide_grad.to(of.dtype))


@pytest.mark.parametrize("name", VIEWS)
def test_memory_formats_do_not_matter(name: str) -> None:
    *states, alive, coeffs = adaptive_arguments((5, 3, 13, 17))
    viewed = [views_of(t)[name] for t in states]
    expected = ops.adaptive_step(*states, alive, coeffs)
    for a, b in zip(ops.adaptive_step(*viewed, alive, coeffs), expected, strict=True):
        assert torch.equal(a, b)
    grad = torch.randn_like(states[0])
    plain = backward(grad, *states, alive, coeffs)
    for a, b in zip(backward(views_of(grad)[name], *viewed, alive, coeffs), plain, strict=True):
        assert torch.equal(a, b)


def test_outputs_have_the_layout_of_their_input() -> None:
    x, h, ahead, alive, coeffs = adaptive_arguments((2, 3, 4, 5))
    x, ahead = (t.contiguous(memory_format=torch.channels_last) for t in (x, ahead))
    assert ops.adaptive_step(x, h, ahead, alive, coeffs)[0].stride() == x.stride()
    for grad, of in zip(backward(h, x, h, ahead, alive, coeffs), (x, h, ahead), strict=True):
        assert grad.stride() == of.stride()


@pytest.mark.parametrize("shape", [(5, 3, 13, 17), (4, 1, 141, 141)])
def test_a_sample_does_not_depend_on_its_batch(shape) -> None:
    *states, alive, coeffs = adaptive_arguments(shape)
    expected = ops.adaptive_step(*states, alive, coeffs)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        alone = ops.adaptive_step(*(t[one] for t in states), alive[one], coeffs)
        for a, b in zip(alone, expected, strict=True):
            assert same_bits(a, b[one])


@pytest.mark.parametrize("shape", [(352, 3, 31, 33), (12, 3, 172, 172)])
def test_stores_past_the_caches_have_the_same_bits(shape) -> None:
    """Outputs of 4 MiB and more are written so where they are aligned; halves of these are not."""
    *states, alive, coeffs = adaptive_arguments(shape)
    assert 2 << 20 < 4 * states[0].numel() / 2 < 4 << 20 < 4 * states[0].numel()
    whole = ops.adaptive_step(*states, alive, coeffs)
    half = shape[0] // 2
    for part in (slice(0, half), slice(half, None)):
        expected = ops.adaptive_step(*(t[part] for t in states), alive[part], coeffs)
        for a, b in zip(whole, expected, strict=True):
            assert same_bits(a[part], b)


def test_threads_do_not_matter() -> None:
    args = adaptive_arguments((3, 3, 160, 160))
    expected = (*ops.adaptive_step(*args), *backward(args[0], *args))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        actual = (*ops.adaptive_step(*args), *backward(args[0], *args))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


# --- the special cases of the step size -------------------------------------------------------


def one_sample(h, ahead):
    """x, h, h_ahead, alive, coeffs for one sample of the given h, with the published constants."""
    h, ahead = torch.tensor([h]), torch.tensor([ahead])
    coeffs = torch.tensor([0.05e-3, 1e-5, 1e-1, 1e-3, 256 / 255, -1 / 510, 0.0, 1.0])
    return torch.full_like(h, 0.5), h, ahead, torch.tensor([True]), coeffs


def test_no_change_takes_the_largest_step() -> None:
    args = one_sample([0.5, -0.25], [0.5, -0.25])  # gamma = 1
    x_next, alive, alpha = ops.adaptive_step(*args)
    assert (alpha == args[-1][2]).all()
    assert alive.all()
    expected = (256 / 255) * (0.5 + 0.1 * args[1].double()) - 1 / 510
    torch.testing.assert_close(x_next.double(), expected, rtol=0, atol=1e-7)
    grads = backward(torch.ones(1, 2), *args)
    assert all(grad.isfinite().all() for grad in grads)  # alpha is clipped: no gradient through it
    torch.testing.assert_close(grads[1].double(), torch.full((1, 2), 0.1 * 256 / 255).double())
    assert not grads[2].any()


def test_growing_score_stops_the_sample() -> None:
    args = one_sample([0.5, -0.25], [0.6, -0.3])  # gamma > 1: alpha clips below tau
    x_next, alive, alpha = ops.adaptive_step(*args)
    assert (alpha == args[-1][1]).all()
    assert not alive.any()
    assert same_bits(x_next, args[0])


@pytest.mark.parametrize(("low", "high"), [(1.0, 9.0), (1e-5, 1.0)])
def test_a_step_size_at_its_bound_is_not_clipped(low: float, high: float) -> None:
    args = one_sample([0.25, 0.25], [0.125, 0.125])  # 1 - gamma is 1/2, exactly
    args[-1][:3] = torch.tensor([0.5, low, high])
    assert ops.adaptive_step(*args)[2] == 1.0
    *states, alive, coeffs = in_float64(args)
    leaves = [t.requires_grad_() for t in states]
    out, _, _ = reference.adaptive_step(*leaves, alive, coeffs)
    expected = torch.autograd.grad(out.sum(), leaves)
    assert expected[2].all()  # through alpha
    for actual, wanted in zip(backward(torch.ones(1, 2), *args), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted)


def test_a_step_size_of_tau_stops_the_sample() -> None:
    args = one_sample([0.25, 0.25], [0.125, 0.125])
    args[-1][:4] = torch.tensor([0.5, 1e-5, 9.0, 1.0])
    x_next, alive, alpha = ops.adaptive_step(*args)
    assert alpha == 1.0
    assert not alive.any()
    assert same_bits(x_next, args[0])


@pytest.mark.parametrize("h", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_step_size_nan_stops_the_sample(h) -> None:
    args = one_sample(h, [0.0, 0.5])
    x_next, alive, alpha = ops.adaptive_step(*args)
    assert alpha.isnan().all()
    assert not alive.any()
    assert same_bits(x_next, args[0])
    grads = backward(torch.full((1, 2), 3.0), *args)
    assert (grads[0] == 3).all()
    assert not grads[1].any()
    assert not grads[2].any()


def test_stopped_samples_stay_stopped_and_untouched() -> None:
    x, h, ahead, _, coeffs = adaptive_arguments((4, 2, 3, 5))
    x = 9 * x - 4  # outside the clamp, which a stopped sample does not meet
    alive = torch.zeros(4, dtype=torch.bool)
    x_next, alive_next, alpha = ops.adaptive_step(x, h, ahead, alive, coeffs)
    assert same_bits(x_next, x)
    assert not alive_next.any()
    assert (alpha > coeffs[3]).any()


# --- gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_formula(shape) -> None:
    args = adaptive_arguments(shape)
    grad = torch.randn(shape)
    x, h, ahead, alive, coeffs = in_float64(args)
    leaves = [t.requires_grad_() for t in (x, h, ahead)]
    out, _, _ = reference.adaptive_step(*leaves, alive, coeffs)
    expected = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True)
    for actual, wanted, leaf in zip(backward(grad, *args), expected, leaves, strict=True):
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        error = (actual.double() - wanted).abs().flatten(1).amax(1)
        scale = wanted.abs().flatten(1).amax(1) + 1e-6
        assert bool((error <= 2e-4 * scale).all())


def test_gradient_against_finite_differences() -> None:
    """Through alpha too, independent of any autograd."""
    x, h, ahead, alive, coeffs = in_float64(adaptive_arguments((5, 6)))
    wide = coeffs.clone()
    wide[1], wide[2], wide[6], wide[7] = -100, 100, -100, 100  # no clip, no clamp: smooth
    wide[3] = -200
    inputs = tuple(t.requires_grad_() for t in (x, h, ahead))
    function = lambda *states: reference.adaptive_step(*states, alive, wide)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-4, rtol=1e-3)


def test_autograd_through_the_op() -> None:
    x, h, ahead, alive, coeffs = adaptive_arguments((5, 3, 4, 4))
    leaves = [t.clone().requires_grad_() for t in (x, h, ahead)]
    x_next, alive_next, alpha = ops.adaptive_step(*leaves, alive, coeffs)
    assert (x_next.requires_grad, alive_next.requires_grad, alpha.requires_grad) == (
        True,
        False,
        False,
    )
    grads = torch.autograd.grad(x_next.sum(), leaves)  # an expanded gradient
    for a, b in zip(grads, backward(torch.ones_like(x), x, h, ahead, alive, coeffs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(dtype, layout) -> None:
    *states, alive, coeffs = adaptive_arguments((4, 3, 4, 5), (dtype, dtype))
    states = [t.contiguous(memory_format=layout).requires_grad_() for t in states]
    torch.library.opcheck(torch.ops.coup_fast.adaptive_step.default, (*states, alive, coeffs))
    states = [t.detach() for t in states]
    args = (torch.randn_like(states[0]), *states, alive, coeffs)
    torch.library.opcheck(torch.ops.coup_fast.adaptive_step_backward.default, args)


# --- edges and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_tensors(shape) -> None:
    args = adaptive_arguments(shape)
    x_next, alive_next, alpha = ops.adaptive_step(*args)
    assert x_next.shape == shape
    assert not alive_next.any()
    assert alpha.isnan().all()
    assert [g.shape for g in backward(args[0], *args)] == [args[0].shape] * 3


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (0, torch.zeros(2), r": x .*\[B, C, ...\].* got float32 \[2\]"),
        (0, torch.zeros(2, 3, 4).double(), ": x .*float32 .* got float64"),
        (
            1,
            torch.zeros(2, 3, 5),
            r": h .*\[2, 3, 4\], got float32 \[2, 3, 5\]",
        ),
        (1, torch.zeros(2, 3, 4).long(), ": h .*float32, float16 or bfloat16, got int64"),
        (2, torch.zeros(2, 4), r": h_ahead .*\[2, 3, 4\], got float32 \[2, 4\]"),
        (3, torch.zeros(2), r": alive .*bool \[2\] .* got float32 \[2\]"),
        (3, torch.ones(3, dtype=torch.bool), r": alive .*bool \[2\] .* got bool \[3\]"),
        (4, torch.zeros(7), r": coeffs .*float32 \[8\], got float32 \[7\]"),
    ],
)
def test_errors_name_argument_given_and_expected(index: int, value, said: str) -> None:
    args = list(adaptive_arguments((2, 3, 4)))
    args[index] = value
    with pytest.raises(RuntimeError, match=said):
        ops.adaptive_step(*args)
