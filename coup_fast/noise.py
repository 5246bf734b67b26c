"""Counter-based noise: Philox4x32-10 words, uniforms, and the keys of samples and steps.

Noise is a pure function of (seed, sample id, draw, position in the run, element), so an image gets
the same noise in any batch, at any position, on any device. Everything here is exact integer
arithmetic in plain PyTorch, and the kernels compute the same words.

The source of Philox is Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coup_fast import checks

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# On a CPU an operator of NumPy starts in a fraction of the time of one of PyTorch, and up to this
# many samples Python's own integers are faster still.
_FEW = 12


def philox(key: tuple[Any, Any], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four 32-bit words of a (key, counter) pair.

    The counter's words are int64 tensors, int64 NumPy arrays, or ints, holding values in [0, 2^32),
    low word first; the key's words are the same or ints. All broadcast together.

    int64 products of 32-bit words wrap, and so keep all of their 64 bits. Words 1 and 3 are lower
    halves of products, and their upper bits are cut off where the words are next used.
    """
    key0, key1 = key
    word0, word1, word2, word3 = counter
    for _ in range(_ROUNDS):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0 = ((product1 >> 32) ^ word1 ^ key0) & _MASK
        word2 = ((product0 >> 32) ^ word3 ^ key1) & _MASK
        word1, word3 = product1, product0
        key0 = (key0 + _KEY_INCREMENTS[0]) & _MASK
        key1 = (key1 + _KEY_INCREMENTS[1]) & _MASK
    return word0, word1 & _MASK, word2, word3 & _MASK


def _split(value: Any) -> tuple[Any, Any]:
    """Low and high 32-bit words of 64-bit patterns."""
    return value & _MASK, (value >> 32) & _MASK


def words(keys: Tensor, numel: int) -> Tensor:
    """The first `numel` words of each row of keys, in order: int64 [B, numel] in [0, 2^32).

    Word i is word i mod 4 of the block at counter offset + i // 4 (mod 2^64), subsequence 0.

    Args:
        keys: int64 [B, 2], rows [key, offset] as 64-bit patterns.
        numel: how many words.
    """
    blocks = torch.arange((numel + 3) // 4, dtype=torch.int64, device=keys.device)
    key_low, key_high = _split(keys[:, :1])
    offset_low, offset_high = _split(keys[:, 1:])
    low = offset_low + blocks
    counter = (low & _MASK, (offset_high + (low >> 32)) & _MASK)
    zero = torch.zeros_like(low)
    block = philox((key_low, key_high), (*counter, zero, zero))
    return torch.stack(block, dim=-1).flatten(1)[:, :numel]


def uniform(word: Tensor) -> Tensor:
    """float32 uniforms in (0, 1] of int64 words: float32(word) * 2^-32 + 2^-33.

    The product is exact, so only the sum rounds after the conversion. The bits are those of a fused
    multiply-add.
    """
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def sample_keys(seed: int, sample_ids: Tensor | Sequence[int], draw: int | Tensor = 0) -> Tensor:
    """The 64-bit key of each sample, as int64 bit patterns [B] on the device of sample_ids.

    The key is words 0 (low) and 1 (high) of Philox under key `seed`, at the counter whose low half
    is the sample id and whose high half is the draw.

    Args:
        seed: int in [0, 2^64).
        sample_ids: int64 [B] or a sequence of ints.
        draw: int in [0, 2^63), or an int64 tensor [B] of one draw per sample.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.
    """
    key = _split(checks.integer("seed", seed, 0, 2**64 - 1))
    ids = checks.ids("sample_ids", sample_ids)
    draw = checks.draw("draw", draw, len(ids), ids.device)
    draws = draw if isinstance(draw, Tensor) else torch.full_like(ids, draw)
    if ids.device.type == "cpu" and len(ids) <= _FEW:
        pairs = zip(ids.tolist(), draws.tolist(), strict=True)
        keys = [_signed(_joined(key, *pair)) for pair in pairs]
        return torch.tensor(keys, dtype=torch.int64, device=ids.device)
    if ids.device.type == "cpu":
        return torch.from_numpy(_joined(key, ids.numpy(), draws.numpy()))
    result: Tensor = _joined(key, ids, draws)
    return result


def _joined(key: tuple[int, int], ids: Any, draws: Any) -> Any:
    """Words 0 and 1 as one 64-bit pattern; the upper one shifts its bits into an int64's sign."""
    low, high, _, _ = philox(key, (*_split(ids), *_split(draws)))
    return (high << 32) | low


def _signed(pattern: int) -> int:
    """The int64 of a 64-bit pattern in [0, 2^64)."""
    return pattern - 2**64 if pattern >= 2**63 else pattern


def step_keys(
    seed: int,
    sample_ids: Tensor | Sequence[int],
    draw: int | Tensor,
    num_steps: int,
    numel: int,
) -> Tensor:
    """Keys of a run's noise tensors: int64 [num_steps, B, 2], rows [sample key, offset].

    Noise tensors are numbered in order of need; forward diffusion comes first, where a method has
    it. Number k of a sample with `numel` elements starts at counter k * ceil(numel / 4), so no two
    of them share a block. `ops.normal(keys[k], shape)` is noise tensor k.

    Args:
        seed: as for `sample_keys`.
        sample_ids: as for `sample_keys`.
        draw: as for `sample_keys`.
        num_steps: how many noise tensors, >= 0.
        numel: elements of one sample, >= 0.
    """
    num_steps = checks.integer("num_steps", num_steps, 0, 2**31 - 1)
    numel = checks.integer("numel", numel, 0, 2**31 - 1)
    key = sample_keys(seed, sample_ids, draw)
    rows = key.new_empty((num_steps, key.shape[0], 2))
    rows[..., 0] = key
    blocks = (numel + 3) // 4
    rows[..., 1] = torch.arange(num_steps, device=key.device)[:, None] * blocks
    return rows
