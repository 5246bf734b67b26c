"""The purifier's loop on a device: graphs against the eager loop, and nothing that waits.

Skipped without a device, unless COUP_FAST_FAIL_WITHOUT_CUDA is set: then they fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import SHORT, Asking, TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

from coup_fast import Purifier, ScoreModel

pytestmark = pytest.mark.cuda
METHODS = sorted(SHORT)


def purifier(method: str = "coup", network: nn.Module | None = None, **options) -> Purifier:
    kind, short = SHORT[method]
    network = network or TinyNetwork(pull=6.0 if kind == "ncsn" else 0.0)
    model = ScoreModel(network.cuda(), kind)
    return Purifier(model, TinyClassifier().cuda(), method=method, **short | options)


def pictures(batch: int = 3) -> Tensor:
    return images(batch).cuda()


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, and the same algorithms in every run."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("method", METHODS)
def test_graphs_have_the_bits_of_the_eager_loop(method: str) -> None:
    clean, plain = purifier(method, cuda_graph=True), purifier(method, cuda_graph=False)
    with exact_float32():
        for seed, ids, draw in [(0, [0, 1, 2], 0), (1, [5, 5, 9], 3)]:
            u = pictures().roll(seed, 0)
            assert torch.equal(clean(u, ids, draw), plain(u, ids, draw))
            assert clean.graph_reason is None


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_agrees_with_the_cpu(method: str) -> None:
    kind, short = SHORT[method]
    model = ScoreModel(TinyNetwork(pull=6.0 if kind == "ncsn" else 0.0), kind)
    on_cpu = Purifier(model, TinyClassifier(), method=method, **short)(images())
    with exact_float32():
        on_gpu = purifier(method, cuda_graph=True)(pictures())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_run_waits_for_the_device(method: str, cuda_graph: bool) -> None:
    clean = purifier(method, cuda_graph=cuda_graph, check_values=False)
    u = pictures()
    want = clean(u)  # tables, kernels and graphs are made once
    with no_waiting():
        got = clean(u)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (clean.graph_reason is None) == cuda_graph


def test_replays_are_enqueued_while_the_device_is_busy() -> None:
    clean = purifier(cuda_graph=True, check_values=False)
    u = pictures()
    clean(u)
    torch.cuda.synchronize()
    with no_waiting():
        torch.cuda._sleep(2_000_000_000)
        done = torch.cuda.Event()
        clean(u)
        done.record()
        assert not done.query()
    torch.cuda.synchronize()


def test_the_exact_gradient_waits_for_nothing_either() -> None:
    clean = purifier(check_values=False)

    def gradient() -> Tensor:
        u = pictures().requires_grad_()
        return torch.autograd.grad(clean(u).sum(), u)[0]

    gradient()
    u = pictures().requires_grad_()
    with no_waiting():
        (gradient_,) = torch.autograd.grad(clean(u).sum(), u)
    assert gradient_.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "tf32"},
        {"channels_last": True},
        {"max_batch": 2},
        {"compile": True},
        {"compile": True, "precision": "bf16", "channels_last": True},
    ],
    ids=str,
)
def test_options_of_the_loop_go_together_with_graphs(options) -> None:
    clean = purifier(cuda_graph=True, **options)
    plain = purifier(cuda_graph=False, **options)
    got, want = clean(pictures(4)), plain(pictures(4))
    assert clean.graph_reason is None
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    u = pictures(4).requires_grad_()
    (gradient,) = torch.autograd.grad(clean(u).sum(), u)
    assert gradient.isfinite().all()


def test_tf32_flags_are_as_found_after_a_run() -> None:
    found = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    seen = []
    clean = purifier(precision="tf32", cuda_graph=False)
    clean.classifier.register_forward_hook(
        lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32)
    )
    clean(pictures())
    assert all(seen)
    assert found == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_runs_of_one_graph_on_several_streams_keep_their_order() -> None:
    clean = purifier(cuda_graph=True, check_values=False)
    inputs = [pictures().roll(k, 0) for k in range(4)]
    want = [clean(u) for u in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for stream, u in zip(streams, inputs, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            results.append(clean(u))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_a_network_that_waits_runs_eagerly_and_leaves_no_damage() -> None:
    clean = purifier("diffpure", Asking())
    want = clean(pictures())
    with pytest.warns(UserWarning, match="a model makes the host wait for the device"):
        assert torch.equal(clean(pictures()), want)
    assert "host wait" in clean.graph_reason
    assert torch.randn(4, device="cuda").isfinite().all()
    other = purifier(cuda_graph=True)
    other(pictures())
    assert other.graph_reason is None


class Waiting(Asking):
    """A network that waits in a way that torch's debug mode does not see."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return self.inner(x, t)


class Refusing(Asking):
    """A network that does not like to be captured."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("refused")
        return self.inner(x, t)


@pytest.mark.parametrize("method", ["diffpure", "coup"])  # coup: on a stream of its own
@pytest.mark.parametrize("network", [Waiting, Refusing])
def test_a_capture_that_fails_leaves_no_damage(network: type[nn.Module], method: str) -> None:
    clean = purifier(method, network())
    want = clean(pictures())
    with pytest.warns(UserWarning, match="the step cannot be captured"):
        assert torch.equal(clean(pictures()), want)
    assert torch.randn(4, device="cuda").isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = torch.randn(4, device="cuda")
    graph.replay()
    assert drawn.isfinite().all()
    other = purifier(cuda_graph=True)
    other(pictures())
    assert other.graph_reason is None


def test_moved_weights_are_captured_anew() -> None:
    clean = purifier(cuda_graph=True)
    first = clean(pictures())
    clean.cpu()
    clean.score_model.network.first.weight.data.mul_(0.5)
    clean.cuda()
    assert not torch.equal(clean(pictures()), first)
    plain = purifier(cuda_graph=False)
    plain.load_state_dict(clean.state_dict())
    torch.testing.assert_close(clean(pictures()), plain(pictures()), rtol=1e-4, atol=1e-5)


def test_memory_of_inference_does_not_grow_with_steps() -> None:
    peaks = []
    for steps in (3, 30):
        clean = purifier(num_steps=steps, cuda_graph=False, check_values=False)
        u = pictures(64)
        clean(u)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clean(u)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # 27 more steps need keys, half a state here; autograd's thread may free a gradient late.
    assert peaks[1] - peaks[0] < 3 * 4 * pictures(64).numel()
