"""Philox words, uniforms and keys, against an implementation in Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coup_fast import noise

M32, M64 = 2**32 - 1, 2**64 - 1


def philox(key: int, low: int, high: int) -> list[int]:
    """Philox4x32-10 on Python integers: 64-bit key, 128-bit counter as two 64-bit halves."""
    k0, k1 = key & M32, key >> 32
    c = [low & M32, low >> 32, high & M32, high >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & M32, (p0 >> 32) ^ c[3] ^ k1, p0 & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c


def pattern(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - 2**64 if value >= 2**63 else value


def as_tensors(values: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # random123's kat_vectors for philox4x32, 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([M32] * 4, [M32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected) -> None:
    words = noise.philox(as_tensors(key), as_tensors(counter))
    assert [int(word) for word in words] == expected
    halves = [counter[0] | counter[1] << 32, counter[2] | counter[3] << 32]
    assert philox(key[0] | key[1] << 32, *halves) == expected


@given(
    key=st.integers(0, M64),
    offset=st.one_of(st.integers(0, M64), st.integers(M64 - 8, M64), st.integers(M32 - 4, M32 + 4)),
    numel=st.integers(0, 23),
)
def test_words_of_any_key_and_counter(key: int, offset: int, numel: int) -> None:
    keys = torch.tensor([[pattern(key), pattern(offset)]])
    stream = [word for j in range(6) for word in philox(key, (offset + j) & M64, 0)]
    assert noise.words(keys, numel).tolist() == [stream[:numel]]


def test_uniforms_are_exact_and_in_range() -> None:
    edges = [0, 1, 127, 128, 129, 2**24, 2**24 + 1, 2**31 - 1, 2**31, M32 - 128, M32 - 127, M32]
    words = torch.tensor(edges + torch.randint(0, 2**32, (5000,)).tolist())
    result = noise.uniform(words)
    word32 = words.numpy().astype(np.uint64).astype(np.float32)  # rounded to nearest
    exact = word32.astype(np.float64) * 2.0**-32 + 2.0**-33  # exact in float64
    assert np.array_equal(result.numpy(), exact.astype(np.float32))
    assert result.dtype == torch.float32
    assert float(result.min()) == 2.0**-33
    assert float(result.max()) == 1.0


@given(
    seed=st.integers(0, M64),
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    draw=st.integers(0, 2**63 - 1),
)
def test_keys_are_the_same_by_torch(seed: int, ids: list[int], draw: int) -> None:
    """As on devices other than the CPU, which takes NumPy's integers, or Python's for a few."""
    words = (seed & M32, seed >> 32)
    for some in (ids, ids * (noise._FEW + 1)):
        by_torch = noise._joined(words, torch.tensor(some), torch.full((len(some),), draw))
        assert torch.equal(by_torch, noise.sample_keys(seed, some, draw))


@given(seed=st.integers(0, M64), ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_sample_keys(seed: int, ids: list[int]) -> None:
    for draw in (0, 1, 2**63 - 1):
        words = [philox(seed, sample_id & M64, draw) for sample_id in ids]
        expected = [pattern(w[0] | w[1] << 32) for w in words]
        assert noise.sample_keys(seed, ids, draw).tolist() == expected
        many = noise._FEW + 1
        assert noise.sample_keys(seed, ids * many, draw).tolist() == expected * many
        assert noise.sample_keys(seed, torch.tensor(ids, dtype=torch.int64), draw).tolist() == (
            expected
        )


def test_a_draw_per_sample() -> None:
    draws = torch.tensor([4, 0, 7])
    keys = noise.sample_keys(5, [1, 2, 3], draws)
    for i, draw in enumerate(draws.tolist()):
        assert keys[i] == noise.sample_keys(5, [i + 1], draw)[0]
    with pytest.raises(ValueError, match=r"draw .*\[2\].*\[3\]"):
        noise.sample_keys(5, [1, 2], draws)


@pytest.mark.parametrize(("numel", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (3072, 768)])
def test_step_keys(numel: int, blocks: int) -> None:
    keys = noise.step_keys(3, [10, 11, 12], 2, 4, numel)
    assert keys.shape == (4, 3, 2)
    assert keys.dtype == torch.int64
    assert torch.equal(keys[..., 0], noise.sample_keys(3, [10, 11, 12], 2).expand(4, 3))
    assert torch.equal(keys[..., 1], (torch.arange(4) * blocks)[:, None].expand(4, 3))


def test_consecutive_noise_tensors_continue_one_stream() -> None:
    keys = noise.step_keys(0, [5], 0, 3, 8)
    stream = noise.words(keys[0], 24)
    assert torch.equal(torch.cat([noise.words(k, 8) for k in keys], dim=1), stream)


def test_keys_do_not_depend_on_the_batch() -> None:
    keys = noise.step_keys(1, range(33), 0, 2, 100)
    assert torch.equal(noise.step_keys(1, [7, 32], 0, 2, 100), keys[:, [7, 32]])
    assert len(set(keys[0, :, 0].tolist())) == 33
    assert noise.step_keys(1, [], 0, 2, 100).shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, [0], 0, 1, 1), ValueError),
        ((2**64, [0], 0, 1, 1), ValueError),
        ((1.5, [0], 0, 1, 1), TypeError),
        ((True, [0], 0, 1, 1), TypeError),
        ((0, [0], -1, 1, 1), ValueError),
        ((0, [0], 2**63, 1, 1), ValueError),
        ((0, [0.5], 0, 1, 1), TypeError),
        ((0, [2**63], 0, 1, 1), ValueError),
        ((0, torch.zeros(2), 0, 1, 1), TypeError),
        ((0, torch.zeros(2, dtype=torch.bool), 0, 1, 1), TypeError),
        ((0, torch.zeros(2, 1, dtype=torch.int64), 0, 1, 1), ValueError),
        ((0, [0], 0, -1, 1), ValueError),
        ((0, [0], 0, 1, -1), ValueError),
        ((0, [0], 0, 1, 2.0), TypeError),
    ],
)
def test_bad_arguments(arguments, error) -> None:
    with pytest.raises(error):
        noise.step_keys(*arguments)
