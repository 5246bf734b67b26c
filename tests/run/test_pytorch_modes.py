"""What surrounds a run in PyTorch: inference mode, default devices, the compiler, other dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.forks import child_can_take, needs_fork
from helpers.tiny import SHORT, TinyNetwork, images, short_purifier
from torch import nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel
from coup_fast._torch.frozen import _held

ONES = torch.ones(3, 3, 8, 8)


def gradient(clean: Callable, **call) -> torch.Tensor:
    u = images().requires_grad_()
    return torch.autograd.grad(clean(u, **call).sum(), u)[0]


@pytest.mark.parametrize("options", [{}, {"gradient": "autograd"}, {"backend": "reference"}])
@pytest.mark.parametrize("method", ["coup", "gdmp", "adp"])
def test_gradients_after_a_run_under_inference_mode(method: str, options: dict) -> None:
    """What a purifier keeps between runs must not be of that mode."""
    clean = short_purifier(method, **options)
    with torch.inference_mode():
        value = clean(images())
    assert torch.equal(clean(images()), value)
    assert torch.equal(gradient(clean), gradient(short_purifier(method, **options)))


def test_noise_ids_and_draws_made_under_inference_mode() -> None:
    clean = short_purifier("coup")
    with torch.inference_mode():
        noise = torch.randn(clean.num_noise, 3, 3, 8, 8)
        names = {"sample_ids": torch.tensor([4, 2, 9]), "draw": torch.tensor([1, 0, 5])}
    assert torch.equal(gradient(clean, noise=noise), gradient(clean, noise=noise.clone()))
    usual = {name: tensor.clone() for name, tensor in names.items()}
    assert torch.equal(gradient(clean, **names), gradient(clean, **usual))


@pytest.mark.parametrize("states", ["device", "sqrt"])
@pytest.mark.parametrize("method", ["coup", "gdmp", "adp"])
def test_a_backward_pass_under_inference_mode(method: str, states: str) -> None:
    clean = short_purifier(method, states=states)
    u = images().requires_grad_()
    out = clean(u)
    with torch.inference_mode():
        out.backward(ONES)
    assert torch.equal(u.grad, gradient(clean))


def test_models_made_under_inference_mode() -> None:
    with torch.inference_mode():
        clean = short_purifier("diffpure")
    assert torch.equal(clean(images()), short_purifier("diffpure")(images()))
    assert all(parameter.requires_grad for parameter in clean.parameters())
    assert not _held


@pytest.mark.parametrize("method", ["coup", "gdmp", "adp", "one-shot"])
def test_networks_in_float64_take_a_float32_state(method: str) -> None:
    wide, narrow = short_purifier(method, double=True), short_purifier(method)
    assert wide(images()).dtype == torch.float32
    torch.testing.assert_close(wide(images()), narrow(images()), rtol=1e-5, atol=1e-5)
    want = gradient(narrow)
    torch.testing.assert_close(gradient(wide), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    halves = images().half()
    torch.testing.assert_close(wide(halves), narrow(halves), rtol=2e-3, atol=2e-3)
    logits = PurifiedClassifier(wide, wide.classifier)(images())
    assert logits.dtype == torch.float64


def test_a_float64_network_may_round_otherwise_under_gradients() -> None:
    """As SiLU does; the state that is compared is float32."""

    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TinyNetwork().double()

        def forward(self, x, t):
            out = self.inner(x, t)
            return out * (1 + 3e-7) if torch.is_grad_enabled() and x.requires_grad else out

    clean = Purifier(ScoreModel(Rounding()), method="diffpure", num_steps=3)
    torch.testing.assert_close(gradient(clean), gradient(short_purifier("diffpure")))


@pytest.mark.parametrize("method", SHORT)
def test_the_default_device_is_not_asked(method: str) -> None:
    clean = short_purifier(method)
    want = clean(images(), [3, 1, 2])
    fresh = Purifier(clean.score_model, clean.classifier, method=method, **clean.options)
    u = images()
    with torch.device("meta"):
        assert torch.equal(fresh(u, [3, 1, 2]), want)


@pytest.mark.parametrize("choice", ["exact", "bpda", "none"])
def test_an_empty_batch_requires_grad_as_a_full_one(choice: str) -> None:
    clean = short_purifier("diffpure", gradient=choice)
    for batch in (0, 1):
        out = clean(images(1)[:batch].requires_grad_())
        assert out.requires_grad == (choice != "none")


def test_the_compiler_leaves_the_loop_alone() -> None:
    """It would unroll the steps: half a minute for three of them, and slower calls."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = nn.Sequential(nn.Hardsigmoid(), short_purifier("coup"))
    u, v = (images().requires_grad_() for _ in range(2))
    want, got = model(u), torch.compile(model, backend=backend)(v)
    assert torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    assert torch.equal(v.grad, u.grad)
    assert not [target for target in seen if "conv" in target or "coup_fast" in target]


@needs_fork
def test_a_process_forked_during_a_run_can_run_as_well() -> None:
    graphs = short_purifier("diffpure")._kept.graphs
    assert child_can_take(lambda: graphs._lock)
