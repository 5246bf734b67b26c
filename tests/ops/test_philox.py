"""Philox words and uniforms: exact, on known answers and at the ends of their ranges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from coup_fast import noise, ops

host = pytest.importorskip("coup_fast._host")

# Random123 kat_vectors, philox4x32 10: counter, key -> words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16) for word in text.split()]], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert (host.philox(words(counter), words(key)) == words(expected)).all()
    tensors = [torch.tensor(words(text).astype(np.int64)[0]) for text in (key, counter)]
    block = noise.philox(*(tuple(t.unbind()) for t in tensors))
    assert [int(w) for w in block] == words(expected)[0].tolist()


def test_words_in_python_are_words_in_c() -> None:
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (1000, 4), dtype=np.uint64).astype(np.uint32)
    keys = generator.integers(0, 2**32, (1000, 2), dtype=np.uint64).astype(np.uint32)
    columns = [torch.tensor(a.astype(np.int64)).unbind(1) for a in (keys, counters)]
    block = torch.stack(noise.philox(*columns), 1).numpy().astype(np.uint32)
    assert (host.philox(counters, keys) == block).all()


def test_uniforms_are_exact() -> None:
    edges = [0, 1, 2, 2**8 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 129]
    edges += [2**32 - 128, 2**32 - 127, 2**32 - 2, 2**32 - 1]
    some = np.random.default_rng(1).integers(0, 2**32, 2000)
    word = np.array([*edges, *some.tolist()], dtype=np.uint32)
    exact = [
        np.float32(float(Fraction(float(np.float32(int(w)))) / 2**32 + Fraction(1, 2**33)))
        for w in word
    ]
    result = host.uniform(word)
    assert (result == np.array(exact)).all()
    assert (noise.uniform(torch.tensor(word.astype(np.int64))).numpy() == result).all()
    assert result.min() == 2.0**-33
    assert result.max() == 1.0


@pytest.mark.parametrize("offset", [0, 2**32 - 3, 2**63 - 2, 2**64 - 1, 2**64 - 300])
def test_counters_carry_and_wrap(offset: int) -> None:
    """Also where a vector's lanes straddle the carry: bits of the scalar mathematics."""
    key = 0x9E3779B97F4A7C15
    signed = [v - 2**64 if v >= 2**63 else v for v in (key, offset)]
    z = ops.normal(torch.tensor([signed]), (1, 3000))[0].numpy()
    assert (z.view(np.uint32) == host.normals(key, offset, 3000).view(np.uint32)).all()
    shifted = [signed[0], (offset + 2) % 2**64]
    shifted[1] -= 2**64 if shifted[1] >= 2**63 else 0
    assert (ops.normal(torch.tensor([shifted]), (1, 2992))[0].numpy() == z[8:]).all()
