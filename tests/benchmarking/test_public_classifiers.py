"""benchmarks/public_classifiers.py: networks as they were published, from files of their layout."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.scripts import load_script
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture(scope="module")
def public() -> ModuleType:
    return load_script("benchmarks/public_classifiers.py")


@pytest.fixture
def folder(public: ModuleType, tmp_path: Path) -> Path:
    """Files with the published names and layouts, of random weights."""
    torch.manual_seed(0)
    for name, published in public.PUBLISHED.items():
        weights = published.network().state_dict()
        content: Any = {"state_dict": weights, "test_acc": 0.5}
        if name.startswith("resnet20"):
            content = {"best_prec1": 91.7}
            content["state_dict"] = {f"module.{key}": value for key, value in weights.items()}
        elif name == "mnist_cnn_a_adv":
            content = weights
        torch.save(content, tmp_path / published.file.replace("*", "12345678"))
    return tmp_path


def test_every_file_becomes_a_classifier_of_pixels(public: ModuleType, folder: Path) -> None:
    for name, published in public.PUBLISHED.items():
        classifier = public.load_public(name, folder)
        shape = (1, 28, 28) if published.images == "mnist" else (3, 32, 32)
        assert not classifier.training
        assert classifier(torch.rand(2, *shape)).shape == (2, 10)


def test_resnet20_is_what_its_paper_says(public: ModuleType, folder: Path) -> None:
    """Written again without modules, from He et al., section 4.2, in float64."""
    content = torch.load(folder / "resnet20-12345678.th", weights_only=True)["state_dict"]
    w = {key.removeprefix("module."): value.double() for key, value in content.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        of = [w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *of)

    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(n).double().view(1, 3, 1, 1) for n in public._IMAGENET)
    x = norm(F.conv2d((pixels - mean) / std, w["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, w[f"{at}.conv1.weight"], None, stride, 1), f"{at}.bn1").relu()
            y = norm(F.conv2d(y, w[f"{at}.conv2.weight"], None, 1, 1), f"{at}.bn2")
            if stride == 2:
                wide = torch.zeros_like(y)
                quarter = x.shape[1] // 2
                wide[:, quarter : quarter + x.shape[1]] = x[..., ::2, ::2]
                x = wide
            x = (x + y).relu()
    wanted = F.linear(x.mean((2, 3)), w["linear.weight"], w["linear.bias"])
    found = public.load_public("resnet20", folder)(pixels.float())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_files_are_missed_and_mistaken_in_one_sentence(
    public: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"name must be one of resnet20, .* got 'vgg'"):
        public.load_public("vgg", folder)
    monkeypatch.delenv("PUBLIC_CLASSIFIERS", raising=False)
    with pytest.raises(ValueError, match="set PUBLIC_CLASSIFIERS"):
        public.load_public("resnet20")
    monkeypatch.setenv("PUBLIC_CLASSIFIERS", str(folder))
    (folder / "resnet56-12345678.th").rename(folder / "resnet20-12345678.th")
    with pytest.raises(ValueError, match=r"resnet20-12345678\.th does not hold resnet20"):
        public.load_public("resnet20")
    with pytest.raises(FileNotFoundError, match=r"must hold one resnet56-\*\.th, it has 0"):
        public.load_public("resnet56")
