"""Index arithmetic of the CUDA kernels on the host: who works on what, in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

host = pytest.importorskip("coup_fast._host")

QUAD = 4
SIZES = st.integers(1, 70)


def grid(threads: int, batch: int, channels: int, pixels: int, channels_last: bool) -> np.ndarray:
    rows = host.grid_places(threads, batch, channels, pixels, channels_last)
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


@given(SIZES, st.integers(1, 5), st.integers(1, 6), SIZES, st.booleans())
@example(256, 2, 3, 1024, True)
@example(256, 33, 1, 784, False)
@example(1000, 2, 1, 1, False)
@example(7, 3, 1003, 1, True)
def test_a_grid_visits_every_element_once(threads, batch, channels, pixels, last) -> None:
    _, sample, first, count, channel, pixel = grid(threads, batch, channels, pixels, last).T
    numel = channels * pixels
    assert (first % QUAD == 0).all()  # so a quad is a Philox block
    assert (count == np.minimum(QUAD, numel - first)).all()
    visited = np.concatenate(
        [s * numel + f + np.arange(c) for s, f, c in zip(sample, first, count, strict=True)]
    )
    assert (np.sort(visited) == np.arange(batch * numel)).all()
    assert (channel * pixels + pixel == first).all()
    assert (pixel < pixels).all()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_threads_share_the_work_evenly(threads, batch, pixels) -> None:
    thread = grid(threads, batch, 1, pixels, False)[:, 0]
    work = np.bincount(thread, minlength=threads)
    assert work.max() - work.min() <= 1


@given(st.integers(2, 6), st.integers(1, 30))
def test_channels_last_neighbours_are_neighbours_in_memory(channels, groups) -> None:
    """Quads of one group of four pixels follow each other, channel by channel."""
    pixels = QUAD * groups
    rows = grid(channels * groups, 1, channels, pixels, True)
    offset = rows[:, 5] * channels + rows[:, 4]  # in memory, of a quad's first element
    expected = np.arange(groups)[:, None] * QUAD * channels + np.arange(channels)
    assert (offset == expected.reshape(-1)).all()


NUMELS = [1, 3, 4, 5, 1003, 1024, 1025, 16384, 16385, 40000, 150528, 196608]


@pytest.mark.parametrize("numel", NUMELS)
def test_sums_follow_the_canonical_order(numel: int) -> None:
    segments = -(-numel // host.segment)
    for blocks, groups in {host.team_of(segments, 3, True), (min(segments, 5), 1), (segments, 2)}:
        rows = np.array(host.sum_places(numel, blocks, groups), dtype=np.int64)
        block, turn, group, segment, step, thread, first, count, slot = rows.T
        visited = np.concatenate([f + np.arange(c) for f, c in zip(first, count, strict=True)])
        assert (np.sort(visited) == np.arange(numel)).all()
        assert (segment == (turn * blocks + block) * groups + group).all()
        assert (group < groups).all()
        assert (segment == first // host.segment).all()
        # lanes 4 t .. 4 t + 3 are thread t's, and a thread's steps are in order of the elements
        assert (first % host.reduce_lanes == QUAD * thread).all()
        assert (step == first % host.segment // host.reduce_lanes).all()
        same = (np.diff(thread) == 0) & (np.diff(segment) == 0)
        assert (np.diff(first)[same] == host.reduce_lanes).all()
        # every quad of a turn has its own place in its block's shared memory, aligned for vectors
        assert (slot % QUAD == 0).all()
        assert (slot < groups * host.segment).all()
        places = (turn * blocks + block) * groups * host.segment + slot
        assert len(np.unique(places)) == len(places)


def test_teams() -> None:
    def teams(segments, most, clusters=True):
        return [host.team_of(n, most, clusters) for n in segments]

    assert teams((0, 1, 2, 3), 3) == [(1, 1), (1, 1), (1, 2), (1, 3)]
    assert teams((4, 6, 7, 10, 12, 13, 24, 25), 3) == [
        (2, 2), (2, 3), (4, 2), (4, 3), (4, 3), (8, 2), (8, 3), (8, 3),
    ]  # fmt: skip
    assert teams((2, 3, 12, 16, 17), 2) == [(1, 2), (2, 2), (8, 2), (8, 2), (8, 2)]
    most = host.max_segments
    assert teams((most, most + 1), 3) == [(8, 3), (0, 1)]
    assert teams((1, 3, 4), 3, False) == [(1, 1), (1, 3), (0, 1)]
    for groups in (1, 2, 3):
        for segments in range(1, most + 1):
            blocks, own = host.team_of(segments, groups, True)
            turns = -(-segments // (blocks * own))
            assert own <= groups
            assert turns * own <= host.max_own
            assert turns == 1 or (blocks, own) == (host.max_cluster, groups)


def test_log_confidence_is_log1p() -> None:
    others = np.concatenate([np.float32(10.0) ** np.arange(-38, 6), np.linspace(0, 9, 20001)])
    others = others.astype(np.float32)
    expected = -np.log1p(others.astype(np.float64))
    error = np.abs(host.log_confidence(others) - expected)
    assert (error <= 2 * np.spacing(np.abs(expected).astype(np.float32))).all()
