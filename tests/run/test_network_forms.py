"""Score networks in every form that people have: the same bits as the plain network within."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.tape import TapeGraphs
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

from coup_fast import (
    DiscreteSchedule,
    EnergyModel,
    PurifiedClassifier,
    Purifier,
    ScoreModel,
    check_gradient,
    purify,
)

CHAIN = DiscreteSchedule()


class Plain(TinyNetwork):
    """f(x, t) that looks its time up, whatever dtype t has."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.times = nn.Embedding(1000, 1)
        with torch.no_grad():
            self.times.weight.copy_(torch.linspace(0, 1, 1000)[:, None])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.times(t.long().reshape(-1))[:, 0] * 999
        return super().forward(x, time)


class Wants(nn.Module):
    """The plain network behind another form of call; `form(inner, *args, **kwargs)`."""

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = Plain()
        self.form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(self.inner, *args, **kwargs)


class Output:
    """As Hugging Face's models answer."""

    def __init__(self, sample: Any = None, logits: Any = None) -> None:
        self.sample, self.logits = sample, logits


def whole(inner: Plain, x: Tensor, t: Tensor) -> Tensor:
    assert t.dtype == torch.int64
    assert t.shape == x.shape[:1]
    return TinyNetwork.forward(inner, x, inner.times(t)[:, 0] * 999)


def wide(inner: Plain, x: Tensor, t: Tensor) -> Tensor:
    assert t.dtype == torch.float64
    return inner(x, t)


def column(inner: Plain, x: Tensor, t: Tensor) -> Tensor:
    assert t.shape == (len(x), 1)
    return inner(x, t[:, 0])


def scalar(inner: Plain, x: Tensor, t: Tensor) -> Tensor:
    assert t.ndim == 0
    return inner(x, t.expand(len(x)))


def keyword(inner: Plain, sample: Tensor, *, timestep: Tensor) -> Tensor:
    return inner(sample, timestep)


def labelled(inner: Plain, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    assert y is None or (y.dtype == torch.int64 and y.shape == t.shape)
    return inner(x, t)


def last(inner: Plain, x: Tensor, t: Tensor) -> Tensor:
    assert x.shape[-1] == 3
    return inner(x.movedim(-1, 1), t).movedim(1, -1)


def by_label(network: Any, x: Tensor, t: Tensor) -> Any:
    return network(x, t, torch.full_like(t, 10, dtype=torch.int64))


class Form(NamedTuple):
    """A network, and what `ScoreModel` is told of it."""

    network: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})


FORMS = {
    "integer times": Form(lambda: Wants(whole), {"time_dtype": torch.int64}),
    "float64 times": Form(lambda: Wants(wide), {"time_dtype": torch.float64}),
    "times [B, 1]": Form(lambda: Wants(column), {"call": lambda f, x, t: f(x, t[:, None])}),
    "one time": Form(lambda: Wants(scalar), {"call": lambda f, x, t: f(x, t[0])}),
    "keywords": Form(lambda: Wants(keyword), {"call": lambda f, x, t: f(sample=x, timestep=t)}),
    "a label": Form(lambda: Wants(labelled), {"call": by_label}),
    "no label": Form(lambda: Wants(labelled), {"call": lambda f, x, t: f(x, t, None)}),
    "channels at the end": Form(
        lambda: Wants(last), {"call": lambda f, x, t: f(x.movedim(1, -1), t).movedim(-1, 1)}
    ),
    ".sample": Form(lambda: Wants(lambda f, x, t: Output(sample=f(x, t)))),
    ".logits": Form(lambda: Wants(lambda f, x, t: Output(logits=f(x, t)))),
    "a mapping": Form(lambda: Wants(lambda f, x, t: {"sample": f(x, t)})),
    "a tuple of one": Form(lambda: Wants(lambda f, x, t: (f(x, t),))),
    "a tuple with features": Form(lambda: Wants(lambda f, x, t: [x.mean((2, 3)), f(x, t), None])),
    "variance channels in a tuple": Form(
        lambda: Wants(lambda f, x, t: (torch.cat([f(x, t), x], 1), t))
    ),
    "an answer that is picked": Form(
        lambda: Wants(lambda f, x, t: (x, f(x, t))), {"call": lambda f, x, t: f(x, t)[1]}
    ),
    "a bound method": Form(
        lambda: Wants(column).forward, {"call": lambda f, x, t: f(x, t[:, None])}
    ),
    "a function": Form(
        lambda: (lambda net: lambda x, t: whole(net, x, t))(Plain()), {"time_dtype": torch.int64}
    ),
    "a size that fits": Form(Plain, {"size_multiple": 4}),
}

WAYS: dict[str, dict[str, Any]] = {
    "coup": {"method": "coup", "num_steps": 3},
    "ddim": {"method": "ddim", "num_steps": 3},
    "channels_last": {"method": "coup", "num_steps": 2, "channels_last": True},
    "bf16": {"method": "coup", "num_steps": 2, "precision": "bf16"},
    "captured": {"method": "coup", "num_steps": 3, "cuda_graph": True},
}


def model_of(form: Form) -> ScoreModel:
    return ScoreModel(form.network(), schedule=CHAIN, time_scale=1000, **form.options)


def purifier(model: ScoreModel, **options: Any) -> Purifier:
    clean = Purifier(model, TinyClassifier(), **options)
    if options.get("cuda_graph"):
        clean._kept.graphs = TapeGraphs()
    return clean


def result_and_gradient(clean: Purifier, u: Tensor) -> tuple[Tensor, Tensor]:
    leaf = u.clone().requires_grad_()
    out = clean(leaf)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMS)
def test_each_form_has_the_bits_of_the_plain_network(name: str, way: str) -> None:
    plain = purifier(ScoreModel(Plain(), schedule=CHAIN, time_scale=1000), **WAYS[way])
    clean = purifier(model_of(FORMS[name]), **WAYS[way])
    assert torch.equal(clean(images()), plain(images()))
    if way == "captured":
        assert clean.graph_reason is None
    for a, b in zip(*(result_and_gradient(c, images()) for c in (clean, plain)), strict=True):
        assert torch.equal(a, b)
    if way == "coup":
        parts = (each.with_options(max_batch=2)(images()) for each in (clean, plain))
        assert torch.equal(*parts)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_compiled_with_its_network_in_one_graph(name: str) -> None:
    torch.compiler.reset()  # one code, compiled for each form, has a limit
    network = model_of(FORMS[name]).network
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    time = torch.tensor([7.0]).expand(3)
    seen, found = network(images(), time), compiled(images(), time)
    if isinstance(seen, Tensor):
        assert torch.equal(found, seen)
    else:
        assert type(found) is type(seen)


def test_parameters_of_a_form_are_frozen_moved_and_asked_for_their_dtype() -> None:
    for name in ("integer times", "a bound method"):
        model = model_of(FORMS[name]).double()
        assert model.network.in_channels is None
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert purifier(model, num_steps=2)(images()).dtype == torch.float32
        leaf = images().requires_grad_()
        purifier(model, num_steps=2, gradient="autograd")(leaf).sum().backward()
        assert all(p.grad is None for p in model.parameters())
    again = pickle.loads(pickle.dumps(ScoreModel(TinyNetwork(), call=by_label)))
    assert again.network.call is by_label
    assert "time_dtype=torch.int64" in repr(model_of(FORMS["integer times"]))


# --- whole times


def test_times_between_whole_numbers_are_refused() -> None:
    model = ScoreModel(Wants(whole), time_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"coup .* at time 99\.9, .*torch\.int64.*DiscreteSched"):
        Purifier(model, TinyClassifier(), num_steps=3)
    chain = ScoreModel(Wants(whole), schedule=CHAIN, time_scale=999, time_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"at time 99\.9, .*torch\.int32.* use time_scale=1000"):
        Purifier(chain, TinyClassifier(), num_steps=100)
    exact = DiscreteSchedule(exact_index=True)
    between = ScoreModel(Wants(whole), schedule=exact, time_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"at time 84\.7143, .* without exact_index=True"):
        Purifier(between, TinyClassifier(), num_steps=7)
    flow = ScoreModel(Wants(whole), "velocity", time_scale=1000, time_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a flow .* leave time_dtype out"):
        Purifier(flow, TinyClassifier(), num_steps=7)


@pytest.mark.parametrize("num_steps", [10, 100])
def test_the_exact_index_is_that_of_the_noise_level(num_steps: int) -> None:
    """At time t of 1000 the level is that of index 1000 t - 1; DiffPure asks one later."""
    asked: dict[bool, list[float]] = {}
    for exact in (False, True):
        times = asked.setdefault(exact, [])

        def network(x: Tensor, t: Tensor, times: list[float] = times) -> Tensor:
            times.append(float(t[0]))
            return 0.1 * x

        schedule = DiscreteSchedule.linear(exact_index=exact)
        model = ScoreModel(network, schedule=schedule, time_scale=1000, time_dtype=torch.int64)
        options = {"method": "diffpure", "num_steps": num_steps, "check_values": False}
        purify(images(), model, **options)
    step = 100 // num_steps
    assert asked[False] == [100 - k * step for k in range(num_steps)]
    assert asked[True] == [99 - k * step for k in range(num_steps)]
    level = schedule.alpha_bar(np_index := asked[True][0])
    assert level == pytest.approx(schedule.continuous().alpha_bar((np_index + 1) / 1000), rel=1e-3)


def test_an_exact_index_is_a_part_of_the_schedule() -> None:
    exact = DiscreteSchedule.linear(exact_index=True)
    assert repr(exact) == "DiscreteSchedule.linear(0.0001, 0.02, 1000, exact_index=True)"
    assert exact != DiscreteSchedule.linear()
    assert exact.network_time(0.0) == 0
    assert exact.network_time(0.0995) == pytest.approx(0.0985)
    assert list(exact.index_time([0, 7])) == [0, 0.007]  # of discrete methods, as before
    with pytest.raises(TypeError, match="exact_index must be True or False, got 1"):
        DiscreteSchedule(exact_index=1)  # type: ignore[arg-type]


# --- sizes


class Halving(TinyNetwork):
    """Takes sizes that 4 divides only, as a U-Net of two levels."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = torch.tanh(self.first(x))
        low = F.interpolate(F.avg_pool2d(skip, 4), scale_factor=4)
        return self.last(skip + low) + (t / 999).reshape(-1, 1, 1, 1) * x


class Reflected(nn.Module):
    """The same by F.pad."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Halving()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (h, w), pads = x.shape[2:], []
        for size in (w, h):
            missing = -size % 4
            pads += [missing // 2, missing - missing // 2]
        y = self.inner(F.pad(x, pads, mode="reflect"), t)
        return y[:, :, pads[2] : pads[2] + h, pads[0] : pads[0] + w]


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 10), (9, 6)])
@pytest.mark.parametrize("way", WAYS)
def test_other_sizes_are_mirrored_and_cropped(size: tuple[int, int], way: str) -> None:
    u = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(8), TinyClassifier())
    found, wanted = (
        Purifier(model, classifier, **{**WAYS[way], "cuda_graph": "auto"})
        for model in (ScoreModel(Halving(), size_multiple=4), ScoreModel(Reflected()))
    )
    assert torch.equal(found(u), wanted(u))
    ours, theirs = (result_and_gradient(clean, u)[1] for clean in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_through_mirrored_edges_are_exact() -> None:
    u = torch.rand(2, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ScoreModel(Halving().double(), size_multiple=4)
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(8), TinyClassifier()).double()
    clean = Purifier(model, classifier, method="coup", num_steps=2)
    assert check_gradient(PurifiedClassifier(clean, classifier), u).passed
    assert torch.autograd.gradcheck(
        lambda x: model(x, torch.full((2,), 0.1)), u.clone().requires_grad_()
    )
    energy = EnergyModel(lambda x, t: Halving().double()(x, t).square().sum((1, 2, 3)))
    pulled = ScoreModel(energy, "ncsn", size_multiple=4)
    assert Purifier(pulled, method="adp", num_steps=2)(u).shape == u.shape


def test_an_image_too_small_to_be_mirrored_is_refused() -> None:
    clean = Purifier(ScoreModel(Halving(), size_multiple=32), method="diffpure", num_steps=1)
    with pytest.raises(ValueError, match=r"^size_multiple=32 .* 24 .*8x8.*a smaller multiple$"):
        clean(images())


# --- errors


def failing(model: ScoreModel, u: Tensor, classifier: Any = None) -> str:
    clean = Purifier(model, classifier, method="coup" if classifier else "diffpure", num_steps=1)
    with pytest.raises((TypeError, RuntimeError, ValueError, IndexError, AssertionError)) as error:
        clean(u)
    return str(error.value)


def test_a_network_that_fails_says_how_it_was_called() -> None:
    u = images()
    by_name = ScoreModel(Wants(keyword))
    said = failing(by_name, u)
    assert "x = float32 [3, 3, 8, 8] and t = float32 [3] (all 99.9)" in said
    assert "takes 2 positional arguments but 3 were given" in said
    assert "call=" in said
    look_up = ScoreModel(nn.Embedding(1000, 3), call=lambda f, x, t: f(t), schedule=CHAIN)
    assert "time_dtype=torch.int64" in failing(look_up, u)
    short = ScoreModel(
        nn.Embedding(50, 3), call=lambda f, x, t: f(t), schedule=CHAIN, time_dtype=torch.int64
    )
    said = failing(short, u)
    assert "(all 100)" in said
    assert "table of times is shorter" in said
    odd = failing(ScoreModel(nn.Sequential(), call=lambda f, x, t: x + F.avg_pool2d(x, 2)), u)
    assert "size_multiple=32" in odd


def test_images_with_channels_at_the_end_are_recognised() -> None:
    u = images(size=8).movedim(1, -1)
    network, classifier = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    said = failing(ScoreModel(lambda x, t: network(x)), u)
    assert "[3, 8, 8, 3]" in said
    assert "images.permute(0, 3, 1, 2)" in said
    said = failing(ScoreModel(lambda x, t: x), u, lambda pixels: classifier(pixels))
    assert "the classifier" in said
    assert "pixels = float32 [3, 8, 8, 3]" in said
    assert "images.permute(0, 3, 1, 2)" in said
    defended = PurifiedClassifier(
        Purifier(ScoreModel(lambda x, t: x), method="diffpure", num_steps=1),
        lambda pixels: classifier(pixels),
    )
    with pytest.raises(RuntimeError, match=r"pixels = float32 \[3, 8, 8, 3\]"):
        defended(u)


def test_errors_keep_their_type_and_those_of_others_pass() -> None:
    class Own(RuntimeError):
        pass

    for error in (Own("mine"), torch.OutOfMemoryError("full"), KeyError("k"), IndexError("far")):

        def network(x: Tensor, t: Tensor, error: Exception = error) -> Tensor:
            raise error

        clean = Purifier(ScoreModel(network), method="diffpure", num_steps=1)
        with pytest.raises(type(error)) as found:
            clean(images())
        assert (found.value is error) == (type(error) is not IndexError)


def test_answers_that_could_be_meant_in_two_ways_are_refused() -> None:
    def two(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return x, x

    said = failing(ScoreModel(two), images())
    assert "tuple of tensors [[3, 3, 8, 8], [3, 3, 8, 8]]" in said
    assert "call=" in said
    assert "returned dict" in failing(ScoreModel(lambda x, t: {"eps": x}), images())
    assert "returned str" in failing(ScoreModel(lambda x, t: "eps"), images())


def test_bad_options_are_named() -> None:
    network = TinyNetwork()
    with pytest.raises(TypeError, match=r"call must be a function .*, got 3"):
        ScoreModel(network, call=3)  # type: ignore[arg-type]
    for dtype in (torch.float16, torch.bool, "int64"):
        with pytest.raises(ValueError, match=r"time_dtype must be one of .*torch\.int64, got"):
            ScoreModel(network, time_dtype=dtype)  # type: ignore[arg-type]
    for size, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=rf"size_multiple must be an int of at least 1, got {size}"):
            ScoreModel(network, size_multiple=size)  # type: ignore[arg-type]
