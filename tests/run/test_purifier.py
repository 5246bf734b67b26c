"""The purifier: results, noise, gradients, what it leaves behind. Errors: test_validation.py."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, flags, images
from helpers.tiny import short_purifier as purifier
from torch.utils._python_dispatch import TorchDispatchMode

import coup_fast
from coup_fast import Purifier, ScoreModel, _extension, purify, reference
from coup_fast.noise import step_keys

METHODS = sorted(SHORT)
needs_compiled = pytest.mark.skipif(not _extension.available(), reason="needs the extension")
BACKENDS = [pytest.param("compiled", marks=needs_compiled), "reference"]


def test_every_method_is_tested() -> None:
    assert set(METHODS) == set(coup_fast.methods.METHODS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_same_arguments_same_bits_and_other_noise_other_results(method: str, backend) -> None:
    clean = purifier(method, backend=backend)
    u = images()
    first = clean(u)
    assert (first.shape, first.dtype, first.device) == (u.shape, u.dtype, u.device)
    assert not first.requires_grad
    assert torch.isfinite(first).all()
    assert torch.equal(clean(u), first)
    short = SHORT[method][1]
    again = purify(u, clean.score_model, clean.classifier, method=method, backend=backend, **short)
    assert torch.equal(again, first)
    other = [clean(u, draw=1), clean(u, sample_ids=[7, 8, 9])]
    other.append(purifier(method, backend=backend, seed=1)(u))
    for result in other:
        assert torch.equal(result, first) == (clean.num_noise == 0)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_and_reference_agree_to_rounding(method: str, dtype) -> None:
    u = images().to(dtype)
    compiled = purifier(method, backend="compiled")(u)
    plain = purifier(method, backend="reference")(u)
    assert compiled.dtype == plain.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_float64_runs_in_float64_and_agrees(method: str) -> None:
    u = images(dtype=torch.float64)
    exact = purifier(method, double=True)(u)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(purifier(method)(u.float()).double(), exact, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_given_noise_that_equals_the_generated_one_changes_no_bit(method: str, backend) -> None:
    clean = purifier(method, backend=backend, seed=3)
    u = images()
    ops = coup_fast.ops if backend == "compiled" else reference
    keys = step_keys(3, [4, 5, 6], 2, clean.num_noise, u[0].numel())
    noise = torch.empty(clean.num_noise, *u.shape)
    for k in range(clean.num_noise):
        noise[k] = ops.normal(keys[k], u.shape)
    generated = clean(u, sample_ids=[4, 5, 6], draw=2)
    assert torch.equal(clean(u, noise=noise), generated)
    longer = torch.cat([noise, torch.full((1, *u.shape), float("nan"))])
    assert torch.equal(clean(u, noise=longer), generated)


def test_draws_may_differ_per_image() -> None:
    clean = purifier("diffpure")
    u = images()
    mixed = clean(u, draw=torch.tensor([5, 0, 2]))
    for i, draw in enumerate([5, 0, 2]):
        torch.testing.assert_close(mixed[i], clean(u, draw=draw)[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["autograd", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_result_under_grad_has_the_bits_of_the_result_without(method: str, gradient) -> None:
    clean = purifier(method, gradient=gradient)
    u = images()
    differentiable = clean(u.clone().requires_grad_())
    assert differentiable.requires_grad
    assert torch.equal(differentiable.detach(), clean(u))


def test_steps_can_be_run_again_with_the_same_bits() -> None:
    for method in ("coup", "gdmp", "adp"):
        clean = purifier(method)
        u = images()
        with torch.no_grad():
            run = clean.prepare(u)
            states, attacked = [run.start(u)], run.attacked(u)
            for k in range(run.num_steps):
                states.append(run.step(k, states[-1], attacked))
            for k in reversed(range(run.num_steps)):
                again = run.step(k, states[k], attacked)
                assert all(torch.equal(a, b) for a, b in zip(again, states[k + 1], strict=True))
        assert torch.equal(states[-1][0], clean(u))


# What is left behind


@pytest.mark.parametrize("method", ["coup", "adp"])
def test_parameters_are_not_differentiated_and_models_are_left_as_found(method: str) -> None:
    clean = purifier(method)
    clean.score_model.network.first.bias.requires_grad_(False)
    clean.score_model.train()
    clean.classifier.eval()
    before = {k: v.clone() for k, v in clean.state_dict().items()}
    found = flags(clean)
    u = images().requires_grad_()
    out = clean(u)
    out.sum().backward()
    assert u.grad is not None
    assert all(p.grad is None for p in clean.parameters())
    assert flags(clean) == found
    assert clean.score_model.training
    assert clean.score_model.network.training
    assert not clean.classifier.training
    assert all(torch.equal(v, before[k]) for k, v in clean.state_dict().items())


def test_flags_come_back_when_a_network_raises() -> None:
    def broken(x, t):
        raise KeyError("broken")

    classifier = TinyClassifier()
    clean = Purifier(ScoreModel(broken), classifier, num_steps=2)
    for u in (images(), images().requires_grad_()):
        with pytest.raises(KeyError, match="broken"):
            clean(u)
        assert all(p.requires_grad for p in classifier.parameters())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_change_no_bit(method: str, mode) -> None:
    clean = purifier(method)
    want = clean(images())
    with mode():
        assert torch.equal(clean(images()), want)
        assert torch.equal(clean(images().requires_grad_(mode is torch.no_grad)), want)


class CountWaits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        waits = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")
        self.count += name in waits
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("method", [m for m in METHODS if m != "adp"])
def test_nothing_waits_for_the_device(method: str) -> None:
    clean = purifier(method, check_values=False)
    with CountWaits() as unchecked:
        clean(images())
    assert unchecked.count == 0
    clean = purifier(method)
    clean(images())  # the first run of a kind looks at the models
    with CountWaits() as checked:
        clean(images())
    assert 0 < checked.count <= 3  # two numbers before the run, one after


def test_networks_that_return_their_input_or_a_view_of_it_are_safe() -> None:
    u = images(2, size=40)  # more than a kernel reads before it writes
    for network in (
        lambda x, t: x,
        lambda x, t: x.transpose(2, 3),
        lambda x, t: x[:, :1].expand_as(x),
    ):
        results = [
            Purifier(ScoreModel(f), method="diffpure", num_steps=3)(u)
            for f in (network, lambda x, t, network=network: network(x, t).clone())
        ]
        assert torch.equal(*results)


def test_input_images_are_not_written_to() -> None:
    for method in METHODS:
        u = images()
        purifier(method)(u)
        assert torch.equal(u, images())


# Models of every sort


def test_plain_callables_serve_as_network_and_classifier() -> None:
    weight = torch.randn(192, 4)
    clean = Purifier(ScoreModel(lambda x, t: 0.1 * x), lambda u: u.flatten(1) @ weight, num_steps=3)
    u = images().requires_grad_()
    clean(u).sum().backward()
    assert u.grad.isfinite().all()
    assert list(clean.parameters()) == []


def test_half_precision_networks_run_as_they_are() -> None:
    u = images()
    full = purifier("coup")
    half = purifier("coup")
    half.score_model.bfloat16()
    half.classifier.bfloat16()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(u), full(u), rtol=0.05, atol=0.05)
    u.requires_grad_()
    half(u).sum().backward()
    assert u.grad.dtype == torch.float32


def test_under_autocast_networks_run_in_half_and_the_state_does_not() -> None:
    seen = []
    clean = purifier("coup")
    hook = clean.score_model.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    want = clean(images())
    with torch.autocast("cpu", torch.bfloat16):
        got = clean(images())
    hook.remove()
    (x, _), out = seen[-1]
    assert (x.dtype, out.dtype, got.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_variance_channels_are_cut_unless_the_method_uses_them() -> None:
    mean = TinyNetwork()

    def network(x, t):
        out = mean(x, t)
        return torch.cat([out, torch.full_like(out, float("nan"))], dim=1)

    for method in ("diffpure", "coup"):
        options = {"method": method, "num_steps": 3}
        cut = Purifier(ScoreModel(network), TinyClassifier(), **options)(images())
        plain = Purifier(ScoreModel(mean), TinyClassifier(), **options)(images())
        torch.testing.assert_close(cut, plain, rtol=1e-6, atol=1e-6)


# ADP's stop


def pulling(x, t):
    """Pulls bright images to the centre; for dark ones the step size is too small to go on."""
    strength = torch.where(x.flatten(1).mean(1) > 0.5, 30.0, 5000.0).reshape(-1, 1, 1, 1)
    return (0.5 - x) * strength


def test_a_stopped_sample_keeps_its_state_while_others_go_on() -> None:
    clean = Purifier(ScoreModel(pulling, kind="ncsn"), method="adp", num_steps=5)
    u = 0.3 * images(4)
    u[[0, 2]] += 0.6
    together = clean(u)
    states = [state for _, state in clean.trajectory(u)]
    for stopped in (1, 3):  # α = λ/strength is below τ from the first step on
        assert torch.equal(together[stopped], states[0][stopped])
    for i in range(4):
        alone = clean(u[i : i + 1], sample_ids=[i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)
    assert not torch.equal(together[0], states[0][0])


def test_the_loop_ends_once_every_sample_has_stopped() -> None:
    calls = []

    def network(x, t):
        calls.append(1)
        return 5000 * (0.5 - x)

    Purifier(ScoreModel(network, kind="ncsn"), method="adp", check_values=False)(images())
    assert len(calls) == 2


# Trajectories, empty batches, layouts


@pytest.mark.parametrize("method", METHODS)
def test_a_trajectory_ends_in_the_result(method: str) -> None:
    clean = purifier(method)
    u = images()
    steps = list(clean.trajectory(u, draw=3))
    assert [k for k, _ in steps] == list(range(clean.plan.num_steps + 1))
    assert torch.equal(steps[-1][1], clean(u, draw=3))
    if clean.plan.start_noisy is False and method != "adp":
        torch.testing.assert_close(steps[0][1], u, rtol=1e-6, atol=1e-6)
    assert all(not pixels.requires_grad for _, pixels in steps)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_stays_empty(method: str) -> None:
    empty = images()[:0]
    assert purifier(method)(empty).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_images_is_kept(backend) -> None:
    u = images()
    clean = purifier("coup", backend=backend)
    want = clean(u)
    last = clean(u.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-5)
    strided = clean(u.transpose(2, 3).contiguous().transpose(2, 3))
    torch.testing.assert_close(strided, want, rtol=1e-4, atol=1e-5)


def test_purifier_says_what_it_is_and_survives_a_copy(tmp_path) -> None:
    import copy
    import pickle

    clean = purifier("coup", seed=5)
    assert "method='coup', seed=5, num_steps=3" in repr(clean)
    want = clean(images())
    assert torch.equal(copy.deepcopy(clean)(images()), want)
    assert torch.equal(pickle.loads(pickle.dumps(clean))(images()), want)
