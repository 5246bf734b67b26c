"""The noise that docs/reproducibility.md promises not to change within a major version.

These numbers may change in a new major version only. A change of any of them gives every user other
purified images under the same seed.
"""

from __future__ import annotations

import torch

from coup_fast import noise, ops
from coup_fast.integrations.pictures import picture_id
from coup_fast.run.sample_ids import content_ids

KEYS = [[1301179919894244081, 2], [9016000397232491453, 2]]
NORMALS = [
    ["4018b261", "be588984", "3e4b7f5e", "bf03c382", "bfbca4e9", "3d99e7de"],
    ["bf349233", "3f28ccd7", "bec0bf65", "bf08c567", "3f2de0fe", "be208a41"],
]


def test_keys_and_normals() -> None:
    keys = noise.step_keys(seed=7, sample_ids=[3, -1], draw=2, num_steps=2, numel=6)[1]
    assert keys.tolist() == KEYS
    bits = ops.normal(keys, (2, 6)).view(torch.int32).tolist()
    assert [[f"{value & 0xFFFFFFFF:08x}" for value in row] for row in bits] == NORMALS


def test_ids_of_pixels_and_of_file_names() -> None:
    image = torch.arange(12).reshape(1, 3, 2, 2) / 16
    assert content_ids(image).tolist() == [1354167715565025285]
    assert picture_id("a.png") == 4576652394325073836
    assert picture_id("sub/a.png") == 5147039527522950483
