"""Whose noise: ids by content, a warning where positions are reused, and fresh draws."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.scripts import environment
from helpers.tiny import defended, images, short_purifier
from torch import Tensor

from coup_fast import check_gradient, eot_gradient, purify
from coup_fast.attacks import PGD
from coup_fast.run.sample_ids import content_ids


def by_hand(image: Tensor) -> int:
    values = image.flatten().tolist()
    data = repr(tuple(image.shape)).encode() + struct.pack(f"<{len(values)}f", *values)
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return struct.unpack("<q", digest)[0]


def test_ids_by_content_are_a_hash_of_the_pixels() -> None:
    u = images()
    want = [by_hand(image) for image in u]
    assert content_ids(u).tolist() == want
    assert len(set(want)) == 3
    for same in (u.double(), u.to(memory_format=torch.channels_last), u.clone().requires_grad_()):
        assert content_ids(same).tolist() == want
    assert content_ids(u.flip(0)).tolist() == want[::-1]
    zeros = torch.zeros(1, 3, 8, 8)
    assert content_ids(zeros).tolist() == content_ids(-zeros).tolist()
    assert content_ids(u[:0]).shape == (0,)


@pytest.mark.parametrize("method", ["diffpure", "coup"])
def test_an_image_named_by_content_has_one_result_in_any_batch(method: str) -> None:
    clean = short_purifier(method, per_sample=True)
    u = images(4)
    whole = clean(u, sample_ids="content")
    single = torch.cat([clean(image[None], sample_ids="content") for image in u])
    assert torch.equal(whole, single)
    assert torch.equal(clean(u.flip(0), "content").flip(0), whole)
    assert not torch.equal(clean(u), whole)
    ids = content_ids(u)
    assert torch.equal(clean(u, sample_ids=ids), whole)
    assert torch.equal(
        purify(
            u, clean.score_model, clean.classifier, method=method, num_steps=3, sample_ids="content"
        ),
        whole,
    )


def test_the_outer_callers_take_ids_by_content() -> None:
    model, u, labels = defended("diffpure", num_draws=2), images(), torch.tensor([0, 1, 2])
    ids = content_ids(u)
    assert torch.equal(model(u, "content"), model(u, ids))
    got = eot_gradient(model, u, labels, sample_ids="content", micro_batch=3)
    want = eot_gradient(model, u, labels, sample_ids=ids, micro_batch=3)
    assert torch.equal(got.gradient, want.gradient)
    attack = PGD(eps=0.1, steps=1, eot=1)
    assert torch.equal(
        attack(model, u, labels, sample_ids="content"), attack(model, u, labels, sample_ids=ids)
    )
    assert check_gradient(model, u, steps=2, sample_ids="content").passed
    with pytest.raises(ValueError, match=r"sample_ids .* content, got 'position'"):
        model(u, "position")


def warned(call, *batches: Tensor, **options) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            call(batch, **options)
    return sum("same noise to different images" in str(w.message) for w in caught)


A, B = images(1), images(2)[1:]


@pytest.mark.parametrize(
    "make", [lambda: short_purifier("diffpure"), lambda: defended("diffpure", num_draws=2)]
)
def test_positions_that_get_other_images_are_warned_of_once(make) -> None:
    assert warned(make(), A, B, A, B) == 1
    assert warned(make(), A, A, (A + 8 / 255).clamp(0, 1), torch.cat([A, B])) == 0
    assert warned(make(), A, B, sample_ids=[7]) == 0
    assert warned(make(), A, B, sample_ids="content") == 0
    call = make()
    assert warned(lambda u: call(u, draw=int(u is B)), A, B) == 0


def test_variants_share_the_warning_and_copies_hold_no_images() -> None:
    clean = short_purifier("diffpure")
    assert warned(clean, A, B) == 1
    assert warned(clean.with_options(max_batch=1), A, B) == 0
    for other in (copy.deepcopy(clean), pickle.loads(pickle.dumps(clean))):
        assert not other._kept.positions._first


def test_given_noise_and_fresh_draws_are_no_reason_for_a_warning() -> None:
    clean = short_purifier("diffpure")
    noise = torch.zeros(clean.num_noise, *A.shape)
    assert warned(clean, A, B, noise=noise) == 0
    assert warned(defended("diffpure", fresh_draws=True), A, B, A) == 0


# Fresh draws


def test_two_objects_with_fresh_draws_draw_different_noise() -> None:
    first, second = (defended("diffpure", fresh_draws=True) for _ in range(2))
    assert first.next_draw != second.next_draw
    assert not torch.equal(first(A), second(A))
    second.reset_draws(first.next_draw)
    assert torch.equal(first(A), second(A))
    assert defended("diffpure").next_draw == 0


NEXT = """
import os, sys, torch
from helpers.scripts import environment
from helpers.tiny import defended
if sys.argv[1] != "none":
    torch.manual_seed(int(sys.argv[1]))
print([defended("diffpure", fresh_draws=True).next_draw for _ in range(2)])
"""


def begin(seed: str, rank: str = "0") -> str:
    command = [sys.executable, "-c", NEXT, seed]
    done = subprocess.run(
        command, env=environment(RANK=rank), capture_output=True, text=True, check=True
    )
    return done.stdout


def test_fresh_draws_differ_by_process_and_rank_and_repeat_under_a_seed() -> None:
    seeded = begin("1")
    assert begin("1") == seeded
    assert len({seeded, begin("2"), begin("1", rank="1"), begin("none"), begin("none")}) == 5


def test_warnings_name_the_line_of_the_program() -> None:
    def lines(call: object) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert caught
        return [warning.filename for warning in caught]

    def reused() -> None:
        clean = short_purifier()
        clean(images())
        clean(1 - images())

    still = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).eval()
    labels = torch.tensor([0, 1, 2])
    attack = PGD(steps=1, eot=2)
    assert lines(reused) == [__file__]
    assert lines(lambda: attack(still, images(), labels)) == [__file__]
    assert lines(lambda: attack.run(still, images(), labels)) == [__file__]
    wide = attack.replace(norm="l2", eps=5.0, step_size=0.1, eot=1)
    assert lines(lambda: wide(still, images(), labels)) == [__file__]
    assert lines(lambda: defended().train()(images())) == [__file__]
