"""Index arithmetic of csrc/math on the host: strides, layouts, conversions, order of sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

host = pytest.importorskip("coup_fast._host")

SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@given(SIZES, st.randoms(use_true_random=False))
def test_pixel_stride_is_the_one_that_steps_through_the_pixels(sizes, random) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)
    tensor = torch.arange(int(np.prod(sizes)) * 2).reshape(2, *(sizes[i] for i in order))[1]
    tensor = tensor.permute([order.index(i) for i in range(len(sizes))])
    steps = tensor[0, 0].flatten().diff().unique().tolist()
    stride = host.pixel_stride(list(tensor.shape), list(tensor.stride()))
    assert stride == (steps[0] if steps else stride) if len(steps) <= 1 else stride == -1


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((2, 3, 4, 5), (0, 0, 0, 0), 0),  # expanded
        ((2, 3, 4, 5), (1, 1, 5, 0), -1),
        ((2, 3, 1, 1), (3, 1, 7, 9), 1),
        ((2, 3), (5, 1), 1),
    ],
)
def test_pixel_stride_of_unusual_strides(sizes, strides, expected: int) -> None:
    assert host.pixel_stride(list(sizes), list(strides)) == expected


@given(st.lists(st.integers(1, 3), min_size=4, max_size=5), *[st.booleans()] * 3)
def test_layouts_are_those_of_torch(sizes, channels_last: bool, transposed: bool, apart) -> None:
    layout = torch.channels_last if len(sizes) == 4 else torch.channels_last_3d
    tensor = torch.empty(sizes, memory_format=layout if channels_last else torch.contiguous_format)
    tensor = tensor.mT if transposed else tensor
    tensor = torch.cat([tensor] * 2)[::2] if apart else tensor
    is_last = host.is_channels_last(list(tensor.shape), list(tensor.stride()))
    assert is_last == tensor.is_contiguous(memory_format=layout)
    if not transposed and not apart:
        strides = host.dense_strides(sizes, channels_last)
        assert tuple(strides) == tensor.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "channels_apart"])
def test_offsets_are_in_logical_order(layout: str) -> None:
    base = torch.arange(2 * 6 * 2 * 3).reshape(2, 6, 2, 3)
    if layout == "channels_last":
        base = torch.empty_like(base, memory_format=torch.channels_last).copy_(base)
    view = {"slice": base[:, 1:4], "channels_apart": base[:, ::2]}.get(layout, base)
    channels, pixels = view.shape[1], 6
    strides = [view.stride(0), view.stride(1), view.stride(3)]
    memory = torch.as_strided(view, (base.numel() - view.storage_offset(),), (1,))
    found = memory[host.offsets(1, channels, pixels, strides)]
    assert torch.equal(found, view[1].flatten())
    assert host.sample_is_dense(channels, pixels, strides) == (layout in ("contiguous", "slice"))


def test_float16_and_bfloat16_are_those_of_numpy_and_torch() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    half = bits.view(np.float16).astype(np.float32)
    assert np.array_equal(host.float_of_float16(bits), half, equal_nan=True)
    brain = torch.tensor(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(host.float_of_bfloat16(bits), brain, equal_nan=True)
    # all float16 values, their neighbours and midpoints in float32, and random bits
    patterns = half[np.isfinite(half)].view(np.uint32).astype(np.int64)[:, None]
    near = (patterns + np.array([-1, 0, 1, 4095, 4096, 4097, 2**15 - 1, 2**15, 2**15 + 1])).ravel()
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**18)
    floats = np.concatenate([near, drawn]).astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(np.float16)
    rounded = host.float16_of_float(floats).view(np.float16)
    assert np.array_equal(rounded, expected, equal_nan=True)
    assert np.array_equal(np.signbit(rounded), np.signbit(expected))
    brain = torch.tensor(floats).to(torch.bfloat16).float().numpy()
    narrow = host.float_of_bfloat16(host.bfloat16_of_float(floats))
    assert np.array_equal(narrow, brain, equal_nan=True)


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 16384, 16385, 40000])
def test_sums_follow_the_canonical_order(numel: int) -> None:
    """Products are exact here (integers of 12 bits), so that plain additions show the order."""
    generator = np.random.default_rng(numel)
    a, b = (generator.integers(-2000, 2000, numel).astype(np.float32) for _ in range(2))
    product = a.astype(np.float64) * b
    total = np.float32(0)
    for start in range(0, numel, host.segment):
        part = product[start : start + host.segment]
        padded = np.zeros(-(-len(part) // host.reduce_lanes) * host.reduce_lanes)
        padded[: len(part)] = part
        lanes = np.zeros(host.reduce_lanes, dtype=np.float32)
        for step in padded.reshape(-1, host.reduce_lanes):
            lanes = (lanes + step).astype(np.float32)  # float64 sum, rounded once: a fused one
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        total += lanes[0]
    assert host.canonical_dot(a, b) == total


def test_columns_are_those_of_the_plan() -> None:
    from coup_fast.plan import ROW_COLUMNS, START_COLUMNS

    assert tuple(host.step_columns) == ROW_COLUMNS
    assert tuple(host.perturb_columns) == START_COLUMNS
