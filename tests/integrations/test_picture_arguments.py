"""Arguments of `purify_image` as users first write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import coup_fast
from coup_fast.integrations.pictures import purify_image
from coup_fast.models import Classifier, UNet

RGB = np.random.default_rng(0).integers(0, 256, (18, 27, 3), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)


def purifier(**options: Any) -> coup_fast.Purifier:
    torch.manual_seed(0)
    network = coup_fast.ScoreModel(UNet(3, (8,)))
    return coup_fast.Purifier(network, method="coup", num_steps=1, **options)


def unguided() -> coup_fast.Purifier:
    return purifier(guidance_scale=0.0)


@pytest.mark.parametrize("image", [torch.rand(1, 3, 8, 8), RGB, None, b"png"])
def test_what_is_no_picture_says_where_it_goes(image: Any) -> None:
    with pytest.raises(TypeError, match=type(image).__name__) as error:
        purify_image(image, unguided())
    assert "purifier(pixels)" in str(error.value)
    assert "fromarray" in str(error.value)


def test_one_number_is_a_square() -> None:
    one, two = (purify_image(PICTURE, unguided(), resize=size) for size in (16, (16, 16)))
    assert np.array_equal(np.asarray(one), np.asarray(two))
    assert one.size == PICTURE.size


@pytest.mark.parametrize("resize", ["32x32", (32,), (8, 8, 3), 3.5, True, {8: 8}])
def test_other_sizes_are_refused_by_name(resize: Any) -> None:
    with pytest.raises(TypeError, match=r"^resize must be"):
        purify_image(PICTURE, unguided(), resize=resize)


@pytest.mark.parametrize("resize", [0, (-8, 8)])
def test_sizes_of_no_pixel_are_refused_by_name(resize: Any) -> None:
    with pytest.raises(ValueError, match="resize must be an int of at least 1"):
        purify_image(PICTURE, unguided(), resize=resize)


def test_models_of_one_size_ask_for_resize() -> None:
    ours = purifier(classifier=Classifier(3, size=16, width=4, hidden=8).eval())
    with pytest.raises(ValueError, match=r"its own size, 18 x 27 .* write resize=32") as error:
        purify_image(PICTURE, ours)
    assert isinstance(error.value.__cause__, RuntimeError)
    assert purify_image(PICTURE, ours, resize=16).size == PICTURE.size


def test_another_fault_at_a_size_that_was_chosen_is_not_called_one_of_size() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise RuntimeError("broken")

    broken = coup_fast.Purifier(coup_fast.ScoreModel(Broken()), method="diffpure", num_steps=1)
    with pytest.raises(RuntimeError, match=r"^the score network Broken failed: broken"):
        purify_image(PICTURE, broken, resize=16)
