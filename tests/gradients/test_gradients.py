"""The exact gradient: equal to plain autograd's, bit-exact values, constant memory, refusals."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images, short_purifier
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, _extension
from coup_fast.attacks.peak_memory import LiveBytes, peak_bytes
from coup_fast.score_model import EnergyModel

METHODS = sorted(SHORT)
needs_compiled = pytest.mark.skipif(not _extension.available(), reason="needs the extension")
BACKENDS = [pytest.param("compiled", marks=needs_compiled), "reference"]


def purifier(method: str = "coup", dtype=torch.float32, **options) -> Purifier:
    return short_purifier(method, double=dtype == torch.float64, **options)


def loss_of(out: Tensor) -> Tensor:
    """Smooth, and sensitive to every pixel with another weight."""
    weights = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * torch.sin(3.0 * out)).sum() + out.square().sum()


def gradient(clean: Purifier, u: Tensor, **call) -> tuple[Tensor, Tensor]:
    leaf = u.clone().requires_grad_()
    out = clean(leaf, **call)
    return out, torch.autograd.grad(loss_of(out), leaf)[0]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def assert_exact(method: str, dtype, *, backend="auto", call=None, **options) -> Tensor:
    """Exact equals autograd with every kind of storage; values are inference's. The gradient."""
    u = images(dtype=dtype)
    call = call or {}
    plain = purifier(method, dtype, backend=backend, gradient="autograd", **options)
    _, want = gradient(plain, u, **call)
    assert want.abs().max() > 0
    for states in ("device", "host", "sqrt"):
        clean = purifier(
            method, dtype, backend=backend, states=states, verify_states=True, **options
        )
        value, got = gradient(clean, u, **call)
        assert torch.equal(value, clean(u, **call)), "values are not those of inference"
        assert type(value.grad_fn).__name__ == "_ExactGradientBackward"
        assert error(got, want) <= (1e-10 if dtype == torch.float64 else 1e-4)
    return want


@pytest.mark.parametrize("method", METHODS)
def test_equals_autograd_in_float64(method: str) -> None:
    assert_exact(method, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_autograd_in_float32(method: str, backend: str) -> None:
    assert_exact(method, torch.float32, backend=backend)


VARIANTS = {
    "stopped guidance": ("coup", {"guidance_gradient": "stopped"}),
    "normalised": ("coup", {"guidance_norm": "normalised"}),
    "clipped": ("coup", {"guidance_norm": "clipped", "guidance_max_norm": 0.3}),
    "strong": ("coup", {"guidance_scale": 30.0}),
    "stable": ("coup", {"guidance_solver": "stable"}),
    "stable, strong": ("coup", {"guidance_solver": "stable", "guidance_scale": 3000.0}),
    "stable, stopped": ("coup", {"guidance_solver": "stable", "guidance_gradient": "stopped"}),
    "stable ldsde": ("ldsde", {"guidance_solver": "stable", "guidance_scale": 30.0}),
    "exponential": ("coup", {"solver": "exponential"}),
    "clipped x0": ("coup", {"clip_denoised": True, "solver": "exponential"}),
    "noised": ("coup", {"forward_noise": True}),
    "guided ldsde": ("ldsde", {"guidance_scale": 2.0}),
    "clamped ldsde": ("ldsde", {"clamp_output": True}),
    "learned variance": ("ddpm", {"variance": "learned"}),
    "gdmp, learned variance": ("gdmp", {"variance": "learned"}),
    "guided ddim": ("ddim", {"guidance_scale": 2.0}),
    "sgn noise": ("adp", {"noise_variant": "binary"}),
    "free step sizes": ("adp", {"alpha_min": 0.0, "alpha_max": 10.0, "step_lambda": 0.5}),
    "some stopped": ("adp", {"tau": 0.00768, "num_steps": 6}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_autograd_in_every_variant(name: str, dtype) -> None:
    method, options = VARIANTS[name]
    assert_exact(method, dtype, **options)


@pytest.mark.parametrize("method", ["coup", "diffpure", "gdmp", "adp"])
def test_equals_autograd_with_given_noise_ids_and_draws(method: str) -> None:
    clean = purifier(method)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(clean.num_noise, 3, 3, 8, 8, generator=generator)
    assert_exact(method, torch.float32, call={"noise": noise})
    draws = torch.tensor([4, 0, 1])
    assert_exact(method, torch.float32, call={"sample_ids": [9, 2, 5], "draw": draws})


def test_some_adp_samples_stop_and_the_gradient_knows() -> None:
    method, options = VARIANTS["some stopped"]
    clean = purifier(method, **options)
    run = clean.prepare(images())
    with torch.no_grad():
        state = run.start(images())
        alive = []
        for k in range(run.num_steps):
            state = run.step(k, state, None)
            alive.append(state[1].sum().item())
    assert 0 < alive[-1] < 3, f"the case is meant to stop some samples, alive: {alive}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_get_half_precision_gradients(dtype) -> None:
    u = images().to(dtype)
    _, got = gradient(purifier("coup"), u)
    _, want = gradient(purifier("coup", gradient="autograd"), u)
    assert got.dtype == dtype
    assert error(got.float(), want.float()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("method", ["coup", "ldsde"])
def test_gradcheck_by_finite_differences(method: str) -> None:
    clean = purifier(method, torch.float64)
    u = (0.2 + 0.6 * images(1, dtype=torch.float64))[:, :, :4, :4]
    clean.classifier.linear = nn.Linear(4 * 4, 4).double()
    torch.autograd.gradcheck(lambda v: clean(v).sum((0, 1)), u.requires_grad_(), fast_mode=True)


def test_energy_models_and_silu_networks_are_differentiated_exactly() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return nn.functional.silu(self.conv(x)).square().sum((1, 2, 3))

    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5))
    u = images()
    for method, kind in (("coup", "score"), ("adp", "ncsn")):
        model = ScoreModel(EnergyModel(Energy()), kind)
        both = [
            Purifier(model, classifier, method=method, num_steps=3, verify_states=True),
            Purifier(model, classifier, method=method, num_steps=3, gradient="autograd"),
        ]
        got, want = (gradient(clean, u)[1] for clean in both)
        assert error(got, want) <= 1e-4


# The vote.


@pytest.mark.parametrize("vote", ["logits", "softmax", "majority"])
def test_purified_classifier_with_draws_and_each_vote(vote: str) -> None:
    labels = torch.tensor([0, 1, 2])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        gradients = []
        for kind in ("autograd", "exact"):
            clean = purifier("coup", dtype, gradient=kind)
            model = PurifiedClassifier(clean, clean.classifier, num_draws=3, vote=vote)
            leaf = images(dtype=dtype).requires_grad_()
            loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        assert gradients[0].abs().max() > 0
        assert error(gradients[1], gradients[0]) <= tolerance


# The other kinds of gradient.


def test_bpda_is_the_identity_and_none_is_detached() -> None:
    u = images().requires_grad_()
    out = purifier("coup", gradient="bpda")(u)
    assert torch.equal(out, purifier("coup")(u.detach()))
    cotangent = torch.randn(u.shape)
    assert torch.equal(torch.autograd.grad(out, u, cotangent)[0], cotangent)
    assert not purifier("coup", gradient="none")(u).requires_grad
    assert not purifier("coup")(u.detach()).requires_grad
    with torch.no_grad():
        assert not purifier("coup")(u).requires_grad


def test_unknown_gradients_and_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient .*exact, autograd, bpda, none.*'adjoint'"):
        purifier("coup", gradient="adjoint")
    with pytest.raises(ValueError, match=r"states .*device, host, sqrt.*'disk'"):
        purifier("coup", states="disk")


# Use of the graph.


def test_two_forwards_then_two_backwards_in_any_order() -> None:
    clean = purifier("diffpure")
    u = images()
    want = [gradient(clean, u, draw=d)[1] for d in range(2)]
    leaves = [u.clone().requires_grad_() for _ in range(2)]
    losses = [loss_of(clean(leaf, draw=d)) for d, leaf in enumerate(leaves)]
    for d in (1, 0):
        losses[d].backward()
        assert torch.equal(leaves[d].grad, want[d])
    shared = u.clone().requires_grad_()
    (loss_of(clean(shared, draw=0)) + loss_of(clean(shared, draw=1))).backward()
    torch.testing.assert_close(shared.grad, want[0] + want[1])


def test_backward_twice_is_right_with_retain_graph_and_refused_without() -> None:
    u = images().requires_grad_()
    out = purifier("coup", states="sqrt")(u)
    first = torch.autograd.grad(loss_of(out), u, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss_of(out), u)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), u)


def test_second_derivatives_are_refused_and_autograd_has_them() -> None:
    u = images(1, dtype=torch.float64).requires_grad_()
    out = purifier("coup", torch.float64)(u)
    (first,) = torch.autograd.grad(loss_of(out), u, create_graph=True)
    assert torch.equal(first.detach(), gradient(purifier("coup", torch.float64), u.detach())[1])
    with pytest.raises(RuntimeError, match=r'gradient="autograd".*backend="reference"'):
        torch.autograd.grad(first.sum(), u)
    out = purifier("coup", torch.float64, gradient="autograd")(u)
    (first,) = torch.autograd.grad(loss_of(out), u, create_graph=True)
    assert torch.autograd.grad(first.sum(), u)[0].abs().max() > 0


def test_in_place_changes_of_the_result_are_allowed_and_of_the_images_noticed() -> None:
    u = images().requires_grad_()
    clean = purifier("diffpure")
    want = torch.autograd.grad(clean(u).clamp(0.2, 0.8).sum(), u)[0]
    assert torch.equal(torch.autograd.grad(clean(u).clamp_(0.2, 0.8).sum(), u)[0], want)
    v = images().requires_grad_()
    w = v * 1.0
    out = clean(w)
    w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_threads_may_differentiate_at_once() -> None:
    clean = purifier("coup")
    want = [gradient(clean, images(), draw=d)[1] for d in range(3)]
    got: dict[int, Tensor] = {}

    def work(draw: int) -> None:
        got[draw] = gradient(clean, images(), draw=draw)[1]

    threads = [threading.Thread(target=work, args=(d,)) for d in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[d], want[d]) for d in range(3))
    assert all(p.requires_grad and p.grad is None for p in clean.parameters())


def test_saved_tensor_hooks_see_the_states() -> None:
    u = images()
    clean = purifier("diffpure", num_steps=5)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        clean(u.clone().requires_grad_())
    assert len(packed) == 6  # the images and five states


# Memory.


def test_memory_grows_by_one_state_a_step_and_by_less_than_that_with_sqrt() -> None:
    u = images(4, size=16).requires_grad_()
    state = u.numel() * u.element_size()

    def peak(steps: int, **options) -> int:
        clean = purifier("coup", num_steps=steps, check_values=False, **options)
        clean.classifier = TinyClassifier(size=16)
        return peak_bytes(lambda: torch.autograd.grad(loss_of(clean(u)), u), u.device)

    short, long = peak(8), peak(24)
    assert (long - short) / 16 <= 1.1 * state
    growth = (peak(36, states="sqrt") - peak(9, states="sqrt")) / state
    assert growth <= 1.1 * (12 - 6)  # two √N: 6 at N = 9, 12 at N = 36
    assert peak(24, gradient="autograd") > 3 * long


def test_live_bytes_counts_what_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = (a + 1)[10:]
        assert live.current == 8000
        del a
        assert live.current == 4000
        view.mul_(2)
        del view
        assert live.current == 0
    assert live.peak == 8000


def test_sqrt_computes_each_state_at_most_once_more() -> None:
    calls = 0
    network = TinyNetwork()

    def counting(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x, t)

    steps = 20
    for states, extra in (("device", 0), ("sqrt", steps - math.ceil(steps / 5))):
        calls = 0
        model = ScoreModel(counting, "eps")
        options = {"num_steps": steps, "states": states, "check_values": False}
        gradient(Purifier(model, method="diffpure", **options), images())
        assert calls == 2 * steps + extra


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["coup", "gdmp", "adp"])
def test_on_cuda_with_states_on_the_device_in_the_host_and_sqrt(method: str) -> None:
    u = images().cuda()
    want = gradient(purifier(method, gradient="autograd").cuda(), u)[1]
    for states in ("device", "host", "sqrt"):
        assert error(gradient(purifier(method, states=states).cuda(), u)[1], want) <= 1e-4
