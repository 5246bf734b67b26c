"""Random calls of the operators: the reference's result, or an error that names a wrong argument.

A call begins right, in any mix of shapes, dtypes, layouts and devices; then up to two of its
arguments are made wrong. Inputs are multiples of 1/8 and coefficients of 1/4, so sums are exact
and no clamp is in doubt. `pytest --hypothesis-profile=fuzz` takes other and many more examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.sampling import LOW, NORMS, Step, views_of
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coup_fast import ops, reference
from coup_fast.plan import ADAPTIVE_COLUMNS, ROW_COLUMNS, START_COLUMNS

EXAMPLES = settings.default.max_examples * 3
SIZE = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7])
SPACE = st.lists(SIZE, max_size=3) | st.sampled_from([[1003], [33, 1], [16, 16], [5000]])
FLOAT = st.sampled_from([torch.float32, *LOW])
LAYOUT = st.sampled_from(
    [
        *("contiguous", "contiguous", "channels_last", "slice", "every_other", "unaligned"),
        *("channels_apart", "slice_last", "transposed", "expanded", "negated"),
    ]
)
COLUMN = st.sampled_from([0.0, 0.0, 1.0, 0.5, -0.25, 2.0, 0.75])
# No sum of the others is equal to one of these, nor to one after the other.
BOUNDS = {"lo": -0.7, "hi": 0.7, "x0_lo": -0.7, "x0_hi": 0.7, "out_lo": -0.61, "out_hi": 0.61}


@dataclass(frozen=True)
class Call:
    """A call of an operator, and the bounds of its errors."""

    name: str
    args: dict[str, Any]
    differentiable: tuple[str, ...] = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For Hypothesis: large tensors without their values."""

        def text(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.numel() <= 20:
                return value
            return f"{value.dtype} {list(value.shape)}, strides {value.stride()}"

        printer.text(f"{self.name}({ {k: text(v) for k, v in self.args.items()} })")

    def __call__(self, module: Any = ops) -> tuple[Tensor, ...]:
        out = getattr(module, self.name)(**self.args)
        return (out,) if isinstance(out, Tensor) else out or (self.args["x"],)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        return replace(
            self,
            args={k: change(v) if isinstance(v, Tensor) else v for k, v in self.args.items()},
        )


# Right calls


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1) -> Tensor:
    """Multiples of scale / 8 in [-2, 2] scale in any memory; sometimes one is inf or NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t = (torch.randint(-16, 17, shape, generator=generator) * (scale / 8)).to(dtype)
    if t.numel() and draw(st.integers(0, 19)) == 0:
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(
            st.sampled_from([torch.inf, -torch.inf, torch.nan])
        )
    layout = draw(LAYOUT)
    if layout == "expanded":
        dim = draw(st.integers(0, t.ndim - 1))
        return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape) if t.numel() else t
    if layout == "negated":
        return torch._neg_view(-t)
    if layout == "contiguous" or t.ndim < 2:
        return t
    return views_of(t).get(layout, t)


@st.composite
def keys(draw: Any, batch: int) -> Tensor:
    words = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2)
    rows = draw(st.lists(st.tuples(words, words), min_size=batch, max_size=batch))
    return torch.tensor(rows, dtype=torch.int64).reshape(batch, 2)


@st.composite
def row(draw: Any, columns: tuple[str, ...], **special: Any) -> Tensor:
    ends = {name: st.sampled_from([at, at * torch.inf]) for name, at in BOUNDS.items()}
    values = [draw(special.get(name, ends.get(name, COLUMN))) for name in columns]
    return torch.tensor(values, dtype=torch.float32)


@st.composite
def shapes(draw: Any) -> tuple[int, ...]:
    return (draw(SIZE), draw(SIZE), *draw(SPACE))


@st.composite
def calls(draw: Any) -> Call:
    return draw(draw(st.sampled_from(list(OPERATORS.values()))))


@st.composite
def normal(draw: Any) -> Call:
    shape = draw(shapes())[draw(st.integers(0, 1)) :]
    return Call("normal", {"keys": draw(keys(shape[0])), "shape": list(shape)})


@st.composite
def perturb(draw: Any) -> Call:
    shape = draw(shapes())
    args = {
        "images": draw(tensors(shape, draw(FLOAT))),
        "coeffs": draw(row(START_COLUMNS)),
        "keys": draw(st.none() | keys(shape[0])),
        "noise": draw(st.none() | tensors(shape, draw(FLOAT))),
    }
    return Call("perturb", args, ("images",))


@st.composite
def reverse_step(draw: Any, in_place: bool = False) -> Call:
    shape = draw(shapes())
    batch, channels, *space = shape
    doubled = (batch, channels * draw(st.integers(1, 2)), *space)
    positive = st.sampled_from([0.25, 1.0])
    special = {
        "x_var": positive,
        "z_var": positive,
        "g_max": st.sampled_from([0.0, 0.9, torch.inf]),
        "log_var_lo": st.just(-2.0),
        "log_var_hi": st.just(-1.0),
    }
    x = draw(tensors(shape, torch.float32))
    args = {
        "x": torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x) if in_place else x,
        "model_out": draw(st.none() | tensors(doubled, draw(FLOAT))),
        "coeffs": draw(row(ROW_COLUMNS, **special)),
        "keys": draw(st.none() | keys(batch)),
        "guidance": draw(st.none() | tensors(shape, draw(FLOAT))),
        "reference": draw(st.none() | tensors(shape, draw(FLOAT))),
        "noise": draw(st.none() | tensors(shape, draw(FLOAT))),
        "guidance_norm": draw(st.sampled_from(NORMS)),
    }
    if args["guidance_norm"] == "stable" and args["guidance"] is not None:
        args["margin"] = draw(tensors((batch,), torch.float32, draw(st.sampled_from([1, 8]))))
        args["coeffs"][ROW_COLUMNS.index("c")].abs_()  # guidance towards confidence
    if in_place:
        return Call("reverse_step_", args)
    leaves = ("x", "model_out", "guidance", "reference", "margin")
    return Call("reverse_step", args, tuple(name for name in leaves if name in args))


@st.composite
def adaptive_step(draw: Any) -> Call:
    shape = draw(shapes())
    special = {
        "numerator": st.sampled_from([0.25, 0.01]),
        "alpha_min": st.sampled_from([0.0, 2**-9]),
        "alpha_max": st.sampled_from([0.125, 8.0]),
        "tau": st.sampled_from([0.0, 0.05]),
    }
    alive = st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])
    args = {
        "x": draw(tensors(shape, torch.float32)),
        "h": draw(tensors(shape, draw(FLOAT))),
        "h_ahead": draw(tensors(shape, draw(FLOAT))),
        "alive": torch.tensor(draw(alive), dtype=torch.bool),
        "coeffs": draw(row(ADAPTIVE_COLUMNS, **special)),
    }
    return Call("adaptive_step", args, ("x", "h", "h_ahead"))


@st.composite
def confidence_cotangent(draw: Any) -> Call:
    classes = draw(st.sampled_from([1, 2, 3, 7, 10, 33, 1000]))
    logits = tensors((draw(SIZE), classes), draw(FLOAT), draw(st.sampled_from([1, 8, 256])))
    quantities = ["log_confidence", "margin"] if classes > 1 else ["log_confidence"]
    args = {"logits": draw(logits), "quantity": draw(st.sampled_from(quantities))}
    return Call("confidence_cotangent", args, ("logits",))


OPERATORS = {
    "normal": normal(),
    "perturb": perturb(),
    "reverse_step": reverse_step(),
    "reverse_step_": reverse_step(in_place=True),
    "adaptive_step": adaptive_step(),
    "confidence_cotangent": confidence_cotangent(),
}


# What they should give


def in_double(call: Call) -> Call:
    """The same call in float64, with the noise that it would draw given."""
    args = dict(call.args)
    state = args.get("images", args.get("x"))
    if args.get("noise") is None and args.get("keys") is not None and call.name != "normal":
        args["noise"] = ops.normal(args["keys"], state.shape)
    name = call.name.rstrip("_")  # into a tensor of its own
    return replace(call, name=name, args=args).map(
        lambda t: t.double() if t.is_floating_point() else t
    )


def bounds(call: Call, expected: tuple[Tensor, ...]) -> list[Tensor]:
    """How far each result of the float64 call may be from the operator's, where it is finite."""
    a = call.map(lambda t: t.nan_to_num(0, 0, 0) if t.ndim > 1 else t).args
    if call.name == "perturb":
        scale, bias, std, sign_std, _, _, out_scale, out_bias = a["coeffs"].abs()
        noise = 0 if a["noise"] is None else a["noise"].abs()
        total = scale * a["images"].abs() + bias + std * noise + sign_std
        return [2e-6 * (out_scale * total + out_bias)]
    if call.name == "reverse_step":
        return [2e-6 * Step(**a | {"keys": None}).magnitude()]
    if call.name == "adaptive_step":
        _, alive, alpha = expected
        step = alpha.reshape(-1, *[1] * (a["x"].ndim - 1)) * a["h"]
        scale, bias = a["coeffs"][4:6].abs()
        return [1e-5 * (scale * (a["x"].abs() + step.abs()) + bias), 0 * alive, 1e-5 * alpha.abs()]
    return [2e-6 * e.double().abs() + 1e-30 for e in expected]


def assert_close(got: Tensor, expected: Tensor, bound: Tensor, name: str) -> None:
    """Equal where not finite; elsewhere within the bound and a rounding to the result's type."""
    same = expected.to(got.dtype)
    if got.dtype.is_floating_point:
        numbers = torch.finfo(got.dtype)
        bound = bound + (numbers.eps if got.dtype in LOW else 0) * expected.abs()
        bound = bound + numbers.smallest_normal  # what is smaller may become 0
        near = (got.double() - expected).abs() <= bound
        right = near | (got == same) | (got.isnan() & same.isnan())
    else:
        right = got == same
    wrong = (~right).nonzero()
    assert len(wrong) == 0, (
        f"{name}: {len(wrong)} of {got.numel()} differ, the first at {wrong[0].tolist()}: "
        f"{got[tuple(wrong[0])]} is not {expected[tuple(wrong[0])]}"
    )


def dense_like(state: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The strides of a result: channels_last where the state is that and has four dimensions."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(state.ndim)
    is_last = last is not None and state.is_contiguous(memory_format=last)
    if state.is_contiguous() or not is_last or len(shape) != state.ndim:
        return torch.empty(shape, device="meta").stride()
    return torch.empty(shape, device="meta", memory_format=last).stride()


@settings(max_examples=EXAMPLES)
@given(calls(), st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]))
def test_results_are_those_of_the_reference(call: Call, mode: Callable) -> None:
    event(call.name)
    wide = in_double(call)
    expected = wide(reference)
    with mode():
        got = call()
    state = next(v for v in call.args.values() if isinstance(v, Tensor))
    for i, (g, e, b) in enumerate(zip(got, expected, bounds(wide, expected), strict=True)):
        assert g.shape == e.shape
        assert g.stride() == dense_like(state, e.shape)
        assert_close(g, e, b, f"{call.name}, result {i}")


def weight(out: Tensor) -> Tensor:
    """Numbers that every dtype has."""
    return ((torch.arange(out.numel()) % 7 - 2) / 4).reshape(out.shape).to(out)


@settings(max_examples=EXAMPLES)
@given(calls().filter(lambda call: call.differentiable), st.data())
def test_gradients_are_those_of_the_reference(call: Call, data: Any) -> None:
    names = [n for n in call.differentiable if call.args[n] is not None]
    chosen = [n for n in names if data.draw(st.booleans())] or names[:1]

    def gradients(call: Call, module: Any) -> list[Tensor]:
        leaves = {n: call.args[n].detach().clone().requires_grad_() for n in chosen}
        out = replace(call, args=call.args | leaves)(module)
        out = [o for o in out if o.requires_grad]
        weights = [weight(o) * (1 + i * 3 / 16) for i, o in enumerate(out)]  # nothing cancels
        return list(torch.autograd.grad(out, list(leaves.values()), weights))

    if not all(bool(v.isfinite().all()) for n, v in call.args.items() if n in names):
        return  # whose derivatives are nobody's promise
    expected = gradients(in_double(call), reference)
    for n, g, e in zip(chosen, gradients(call, ops), expected, strict=True):
        assert g.dtype == call.args[n].dtype
        largest = float(e.abs().amax()) if e.numel() else 0.0
        bound = torch.full_like(e, 2e-5 * largest)
        assert_close(g, e, bound, f"{call.name}, gradient of {n}")


@settings(max_examples=EXAMPLES // 3)
@given(calls())
def test_answers_on_meta_are_like_those_on_the_cpu(call: Call) -> None:
    def kind(out: tuple[Tensor, ...]) -> list[Any]:
        return [(o.shape, o.stride(), o.dtype) for o in out]

    def on_meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    assert kind(call.map(on_meta)()) == kind(call())


# Wrong calls


def longer(t: Tensor, dim: int) -> Tensor:
    """From a size of s to 2 s + 1, which is neither s nor 2 s."""
    more = list(t.shape)
    more[dim] += 1
    return torch.cat([t, t.new_zeros(more)], dim)


OTHER = [torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8]
WRONG_KIND: dict[str, Callable[[Tensor], Any]] = {
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in OTHER},
    "float32": lambda t: t.float(),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "array": lambda t: t.float().resolve_neg().numpy(),
    "list": lambda t: t.tolist(),
    "text": lambda t: "text",
    "nothing": lambda t: None,
}
WRONG_SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda t: longer(t, 0),
    "wider": lambda t: longer(t, -1),
    "deeper": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
}
OPTIONAL = ("keys", "model_out", "guidance", "reference", "noise")


@st.composite
def wrong_calls(draw: Any) -> tuple[Call, dict[str, str]]:
    """A call of which one or two arguments are wrong, and how."""
    call = draw(calls())
    args, how = dict(call.args), {}
    given = [n for n, v in args.items() if isinstance(v, Tensor)]
    for name in draw(st.lists(st.sampled_from(given), min_size=1, max_size=2, unique=True)):
        shaped = {} if name == given[0] else WRONG_SHAPE  # that of the state is what is right
        kind = draw(st.sampled_from([*WRONG_KIND, *shaped]))
        before = args[name]
        after = (WRONG_KIND | shaped)[kind](before)
        if _wrong(call, name, kind, before, after, len(given)):
            args[name], how[name] = after, kind
    if "guidance_norm" in args and draw(st.integers(0, 5)) == 0:
        args["guidance_norm"] = draw(st.sampled_from(["", "NONE", "clip", 1, None]))
        how["guidance_norm"] = repr(args["guidance_norm"])
    if call.name == "normal" and draw(st.integers(0, 2)) == 0:
        args["shape"] = draw(
            st.sampled_from([[], [-1, 2], [2**62, 8], [0, 2**62, 8], [1, 2**60], [1.5], "12", 3])
        )
        how["shape"] = repr(args["shape"])
    return replace(call, args=args), how


def _wrong(call: Call, name: str, kind: str, before: Tensor, after: Any, count: int) -> bool:
    """Whether the change makes the argument wrong, as docstrings of `coup_fast.ops` have it."""
    if kind == "nothing":
        return name not in OPTIONAL
    if kind == "meta":
        return count > 1
    if not isinstance(after, Tensor) or after.layout != torch.strided:
        return True
    if after.shape != before.shape:
        return True
    if after.dtype == before.dtype:
        return False
    only_float32 = name in ("x", "coeffs")
    floats = (torch.float32, *LOW)
    return name in ("keys", "alive") or only_float32 or after.dtype not in floats


@settings(max_examples=EXAMPLES * 2)
@given(wrong_calls())
def test_a_wrong_argument_is_named(wrong: tuple[Call, dict[str, str]]) -> None:
    call, how = wrong
    if not how:
        return
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        said = str(error)
        named = [name for name in how if re.search(rf"\b{name}\b", said)]
        by_torch = re.search("Sparse|no tensor arguments", said)  # no kernel is chosen for these
        assert named or by_torch, f"{call.name} {how}: {said}"
        event(f"{call.name} refuses {sorted(how.items())[0]}")
        return
    pytest.fail(f"{call.name} took {how}")
