"""Normals against float64, and the logarithm and exponential under them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.sampling import keys_of, ulps

from coup_fast import noise, ops, reference

host = pytest.importorskip("coup_fast._host")
SHAPES = [(0,), (1,), (2,), (3,), (4,), (5,), (7,), (1003,), (1024,), (1025,), (3, 13, 17)]


def exact_pairs(word0: np.ndarray, word1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller in float64 of the float32 uniforms of two words, the angle reduced exactly."""
    u0, u1 = (host.uniform(w).astype(np.float64) for w in (word0, word1))
    radius = np.sqrt(-2 * np.log(u0))
    k = np.rint(4 * u1)
    angle = (4 * u1 - k) * (np.pi / 2)
    quadrant = k.astype(int) % 4
    cosine = np.choose(quadrant, [np.cos(angle), -np.sin(angle), -np.cos(angle), np.sin(angle)])
    sine = np.choose(quadrant, [np.sin(angle), np.cos(angle), -np.sin(angle), -np.cos(angle)])
    return radius * cosine, radius * sine


def hard_words() -> tuple[np.ndarray, np.ndarray]:
    """Radii near 0, the largest and the powers of two; angles near quarters; and random words."""
    generator = np.random.default_rng(0)
    count = 300_000
    near_one = 2**32 - 1 - generator.integers(0, 2**12, count)
    small = generator.integers(0, 2**32, count) >> generator.integers(0, 32, count)
    radii = 2.0 ** generator.integers(-2, 3, count)
    power = np.exp(-(radii**2) / 2) * 2**32 + generator.integers(-2000, 2000, count)
    first = np.concatenate([near_one, small, power, generator.integers(0, 2**32, count)])
    near_quarter = generator.integers(0, 5, count) * 2**30 + generator.integers(-999, 999, count)
    diagonal = (
        generator.integers(0, 4, count) * 2**30 + 2**29 + generator.integers(-999, 999, count)
    )
    uniform = generator.integers(0, 2**32, 2 * count)
    second = generator.permutation(np.concatenate([near_quarter, diagonal, uniform]))
    edges = np.array([0, 1, 2**29, 2**30, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1])
    first = np.concatenate([first, np.repeat(edges, len(edges))])
    second = np.concatenate([second, np.tile(edges, len(edges))])
    return tuple(np.clip(w, 0, 2**32 - 1).astype(np.uint32) for w in (first, second))


def test_normals_are_within_two_ulp() -> None:
    words = hard_words()
    for actual, exact in zip(host.box_muller(*words), exact_pairs(*words), strict=True):
        error = ulps(torch.tensor(actual), torch.tensor(exact))
        assert float(error.max()) <= 2.0
        assert float(error.mean()) < 0.4


@pytest.mark.parametrize("error", [-8, -2, -1, 0, 1, 2, 8])
def test_a_root_by_a_reciprocal_is_rounded_correctly(error: int) -> None:
    """Of all significands and both parities of the exponent, with a reciprocal `error` ulp off.

    What CUDA's kernels do, where the reciprocal is within 2 ulp.
    """
    value = np.arange(0x3F800000, 0x40800000, dtype=np.int32).view(np.float32)
    exact = 1 / np.sqrt(value.astype(np.float64))
    reciprocal = (exact.astype(np.float32).view(np.int32) + np.int32(error)).view(np.float32)
    assert np.array_equal(host.sqrt_by_reciprocal(value, reciprocal), np.sqrt(value))


def test_the_root_of_nothing_is_nothing() -> None:
    assert host.sqrt_by_reciprocal(np.float32(0), np.float32(2.0**50)) == 0


@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [("log", -22.9, 0.0, 1.0), ("log", 0.0, 12.0, 1.0), ("exp", -87.3, 88.7, 1.2)],
)
def test_logarithm_and_exponential(name: str, low: float, high: float, bound: float) -> None:
    x = np.random.default_rng(2).uniform(low, high, 300_000)
    x = (np.exp(x) if name == "log" else x).astype(np.float32)
    exact = getattr(np, name)(x.astype(np.float64))
    actual = getattr(host, name)(x)
    keep = exact != 0
    assert float(ulps(torch.tensor(actual[keep]), torch.tensor(exact[keep])).max()) <= bound


def test_exponential_at_its_ends() -> None:
    x = np.array([0.0, np.nan, -88, -100, -1000, -np.inf, 88.8, 100, 1000, np.inf])
    expected = np.array([1, np.nan, *[0] * 4, *[np.inf] * 4])
    assert np.array_equal(host.exp(x.astype(np.float32)), expected, equal_nan=True)
    assert host.log(np.float32(1)) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_op_has_the_bits_of_the_scalar_mathematics(shape: tuple[int, ...], batch: int) -> None:
    keys = keys_of(batch, shape)
    z = ops.normal(keys, (batch, *shape))
    assert z.dtype == torch.float32
    assert z.shape == (batch, *shape)
    assert z.is_contiguous()
    for row, sample in zip(keys.tolist(), z, strict=True):
        expected = host.normals(*(v % 2**64 for v in row), sample.numel())
        assert (sample.flatten().numpy().view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("offset", [2**32 - 100, 2**32 - 103, 2**40 - 1, 2**63 - 5, 2**64 - 77])
def test_counters_carry_into_their_upper_word(offset: int) -> None:
    """Vectors share what follows from the upper word: not where it changes among their blocks."""
    key = 2**63 + 12345
    signed = [v - 2**64 if v >= 2**63 else v for v in (key, offset)]
    z = ops.normal(torch.tensor([signed]), (1, 3000))
    assert (z[0].numpy().view(np.uint32) == host.normals(key, offset, 3000).view(np.uint32)).all()


def test_reference_agrees() -> None:
    keys = keys_of(33, (3, 32, 32))
    z = ops.normal(keys, (33, 3, 32, 32))
    assert float(ulps(z, reference.normal(keys, z.shape).double()).max()) <= 2


def test_samples_and_steps_do_not_repeat() -> None:
    keys = noise.step_keys(0, range(4), 0, 4, 64).reshape(16, 2)
    assert ops.normal(keys, (16, 64)).unique().numel() == 16 * 64


def test_keys_may_be_a_strided_view() -> None:
    keys = keys_of(4, (9,))
    wide = torch.stack([keys, keys + 1], 1)[:, 0]
    assert not wide.is_contiguous()
    assert torch.equal(ops.normal(wide, (4, 9)), ops.normal(keys, (4, 9)))


@pytest.mark.parametrize(
    ("keys", "shape", "said"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), (3, 4), r"keys int32 \[3, 2\]"),
        (torch.zeros(3, 3, dtype=torch.int64), (3, 4), r"keys int64 \[3, 3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), (2, 4), r"shape \[2, 4\] and keys int64 \[3, 2\]"),
        (torch.zeros(3, 2, dtype=torch.int64), (), r"shape \[\]"),
        (torch.zeros(3, 2, dtype=torch.int64), (3, -1), r"negative.*shape \[3, -1\]"),
    ],
)
def test_errors_name_what_was_given(keys, shape, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        ops.normal(keys, shape)


@pytest.mark.parametrize("sizes", [(0, 2**62, 8), (1, 2**31, 2**31), (0, 2**60)])
def test_sizes_are_bounded_before_anything_is_allocated(sizes: tuple[int, ...]) -> None:
    keys = torch.zeros(sizes[0], 2, dtype=torch.int64)
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=r"fewer than 2\^60 elements.*got shape \["):
            ops.normal(keys.to(device), sizes)
    with pytest.raises(ValueError, match=r"below 2\^60"):
        reference.normal(keys, sizes)
