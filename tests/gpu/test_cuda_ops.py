"""The CUDA ops on a device: the bits of the CPU, streams, graphs, compilation, messages.

Skipped without a device, unless COUP_FAST_FAIL_WITHOUT_CUDA is set: then they fail.
benchmarks/gpu.sh runs them so.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cuda_cases import CASES, Case, adaptive_arguments, outputs, same_bits
from helpers.sampling import STEP_ROWS, step, step_row
from torch import Tensor

from coup_fast import ops

pytestmark = pytest.mark.cuda
kernels = torch.ops.coup_fast


def on_device(value):
    """A tensor on the device with the same strides, so that views stay the views they are."""
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    moved = storage.cuda().as_strided(value.shape, value.stride(), value.storage_offset())
    return moved.requires_grad_(value.requires_grad)


def to_device(args):
    return tuple(map(on_device, args))


def assert_same(actual, expected) -> None:
    for index, (a, b) in enumerate(zip(outputs(actual), outputs(expected), strict=True)):
        assert a.is_cuda
        assert same_bits(a.cpu(), b), f"output {index}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_cpu(case: Case) -> None:
    args = case.make()
    op = getattr(kernels, case.op)
    assert_same(op(*to_device(args)), op(*args))


@pytest.mark.parametrize(
    "shape", [(7, 3, 224, 224), (2, 3, 256, 256), (1, 3, 512, 512), (1, 3, 640, 640)]
)
@pytest.mark.parametrize("norm", ["none", "normalised", "clipped"])
def test_large_samples(shape, norm: str) -> None:
    """Clusters of 8, and above 2^20 elements several launches."""
    call = step(shape, dtype=torch.bfloat16, learned=True, guidance_norm=norm)
    assert_same(ops.reverse_step(*to_device(call.args)), ops.reverse_step(*call.args))
    args = (torch.randn(shape), *call.args)
    assert_same(
        kernels.reverse_step_backward(*to_device(args)), kernels.reverse_step_backward(*args)
    )
    args = adaptive_arguments(shape)
    assert_same(ops.adaptive_step(*to_device(args)), ops.adaptive_step(*args))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_batch(layout) -> None:
    """More quads than a grid has threads, in every position of the grid-stride loop."""
    for call in (step((4099, 3, 32, 32)), replace(step((4099, 3, 32, 32)), reference=None)):
        args = call.map(lambda t: t.contiguous(memory_format=layout)).args
        assert_same(ops.reverse_step(*to_device(args)), ops.reverse_step(*args))


@pytest.mark.parametrize("norm", ["normalised", "clipped"])
def test_many_samples(norm: str) -> None:
    """More blocks and clusters than are resident at a time."""
    for shape in [(1500, 3, 32, 32), (300, 3, 64, 64), (150, 3, 128, 128)]:
        call = step(shape, "langevin", guidance_norm=norm)
        assert_same(ops.reverse_step(*to_device(call.args)), ops.reverse_step(*call.args))
    args = adaptive_arguments((1500, 3, 32, 32))
    assert_same(ops.adaptive_step(*to_device(args)), ops.adaptive_step(*args))


@pytest.mark.parametrize("norm", ["none", "normalised"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (2, 3, 32, 32), (1, 3, 160, 160)])
def test_in_place_twin(shape, layout, norm: str) -> None:
    call = step(shape, guidance_norm=norm).map(lambda t: t.contiguous(memory_format=layout))
    args = to_device(call.args)
    ops.reverse_step_(*args)
    assert_same(args[0], ops.reverse_step(*call.args))


def test_the_current_stream_is_used() -> None:
    """Inputs written on a side stream, behind work that takes long, are read in order."""
    call = step((16, 3, 64, 64))
    args = to_device(call.args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        state = args[0] + 1
        out = ops.reverse_step(state, *args[1:])
    stream.synchronize()
    assert_same(out, ops.reverse_step(call.x + 1, *call.args[1:]))


def test_no_call_waits_for_the_device() -> None:
    args = to_device(step((2, 3, 32, 32), guidance_norm="normalised").args)
    states = to_device(adaptive_arguments((2, 3, 32, 32)))
    logits = torch.randn(4, 10, device="cuda")

    def calls() -> None:
        ops.reverse_step(*args)
        ops.adaptive_step(*states)
        ops.confidence_cotangent(logits)

    calls()  # once outside: the first launch of a kernel loads it, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        done = torch.cuda.Event()
        calls()
        done.record()
        assert not done.query()  # still asleep: every call has returned before the device began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.parametrize("norm", ["none", "normalised"])
def test_a_graph_reads_its_row_and_keys_at_replay(norm: str) -> None:
    call = step((4, 3, 32, 32), "langevin", guidance_norm=norm)
    x, model_out, coeffs, keys, guidance, *rest = to_device(call.args)
    ops.reverse_step(x, model_out, coeffs, keys, guidance, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.reverse_step(x, model_out, coeffs, keys, guidance, *rest)
    for row in STEP_ROWS.values():
        keys += 3
        coeffs.copy_(row)
        graph.replay()
        expected = ops.reverse_step(
            call.x, call.model_out, row, keys.cpu(), call.guidance, *call.args[5:]
        )
        assert_same(out, expected)


def test_a_graph_of_every_other_op() -> None:
    states = to_device(adaptive_arguments((4, 3, 160, 160)))
    logits = torch.randn(8, 1000, device="cuda")
    ops.adaptive_step(*states)  # once outside: the first launch loads the kernel
    ops.confidence_cotangent(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = ops.adaptive_step(*states)
        confidence = ops.confidence_cotangent(logits)
    logits.mul_(2)
    graph.replay()
    assert_same(moved, ops.adaptive_step(*(t.cpu() for t in states)))
    assert_same(confidence, ops.confidence_cotangent(logits.cpu()))


def test_compiled_without_recompilation() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.reverse_step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 0.5):
            call = step((2, 3, 16, 16))
            call.coeffs.mul_(scale)
            assert_same(compiled(*to_device(call.args)), ops.reverse_step(*call.args))


def test_gradients_through_autograd() -> None:
    call = step((3, 3, 16, 16), guidance_norm="normalised")
    leaves = ("x", "model_out", "guidance", "reference")
    grads = []
    for move in (lambda t: t.clone(), on_device):
        moved = {k: move(v) if isinstance(v, Tensor) else v for k, v in vars(call).items()}
        for name in leaves:
            moved[name].requires_grad_()
        ops.reverse_step(*moved.values()).sum().backward()
        grads.append([moved[name].grad.cpu() for name in leaves])
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_the_tensors_is_used() -> None:
    call = step((2, 3, 8, 8))
    args = [t.to("cuda:1") if isinstance(t, Tensor) else t for t in call.args]
    with torch.cuda.device(0):
        out = ops.reverse_step(*args)
        assert torch.cuda.current_device() == 0
    assert out.device.index == 1
    assert same_bits(out.cpu(), ops.reverse_step(*call.args))


def test_tensors_on_two_devices_are_refused() -> None:
    x = torch.zeros(2, 3, 4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="coeffs is on cpu, but x is on cuda:0"):
        ops.reverse_step(x, None, step_row(v=1.0))


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 40], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(getattr(kernels, case.op).default, to_device(case.make()))
