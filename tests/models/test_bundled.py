"""The bundled models: whole, as good as their card says, and able to clean attacked digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import ROOT
from torch import Tensor, nn

from coup_fast.data import demo_digits
from coup_fast.models import bundled
from coup_fast.models.bundled import bundled_settings, describe_bundled, load_bundled
from coup_fast.purifier import Purifier
from coup_fast.training.classifier import count_correct
from coup_fast.training.measures import error_per_level


def test_load_bundled_gives_modules_ready_for_use() -> None:
    score_model, classifier = load_bundled("mnist")
    assert score_model.kind == "eps"
    assert load_bundled("mnist", score="ncsn")[0].kind == "ncsn"
    for module in (score_model, classifier):
        assert not module.training
        assert all(p.dtype == torch.float32 for p in module.parameters())
    x = torch.zeros(2, 1, 28, 28)
    assert score_model(x, torch.tensor([0.1, 0.5])).shape == x.shape
    assert classifier(x).shape == (2, 10)
    with pytest.raises(ValueError, match=r"'imagenet'.* mnist, cifar10"):
        load_bundled("imagenet")
    with pytest.raises(ValueError, match=r"score .*vp, ncsn, got 'edm'"):
        load_bundled("mnist", score="edm")


def test_weights_are_small_and_described() -> None:
    sizes = {path.name: path.stat().st_size for path in bundled.WEIGHTS.glob("*.safetensors")}
    assert set(sizes) == set(bundled.CHECKSUMS)
    assert sum(sizes.values()) < 20_000_000
    for name, images in (("mnist", 55_000), ("cifar10", 45_000)):  # without those held out
        card = (bundled.WEIGHTS / f"MODEL_CARD_{name}.md").read_text()
        described = describe_bundled(name)
        assert len(described) == 3
        for file, facts in described.items():
            assert file in card
            assert facts["images"] == images
            assert facts["training"]["seed"] == 0


def test_damaged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in bundled.CHECKSUMS:
        content = bytearray((bundled.WEIGHTS / file).read_bytes())
        content[-1] ^= 1
        (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(bundled, "WEIGHTS", tmp_path)
    with pytest.raises(RuntimeError, match=r"mnist_vp\.safetensors .*SHA-256"):
        load_bundled()


def test_the_classifier_is_right_on_held_out_digits() -> None:
    images, labels = demo_digits(1000)
    assert count_correct(load_bundled()[1], images, labels) >= 985


@pytest.mark.parametrize("score", ["vp", "ncsn"])
def test_cifar10_models_are_ready_for_use(score: str) -> None:
    score_model, classifier = load_bundled("cifar10", score=score)
    x = torch.rand(2, 3, 32, 32)
    assert not score_model.training
    assert not classifier.training
    assert score_model.kind == {"vp": "eps", "ncsn": "ncsn"}[score]
    assert score_model(x, torch.tensor([0.1, 0.2])).shape == x.shape
    assert classifier(x).shape == (2, 10)
    torch.testing.assert_close(classifier(x)[:1], classifier(x[:1]))  # no batch statistics
    if score == "vp":
        assert score_model.t_max == 0.2
        with pytest.raises(ValueError, match=r"t = 0\.3.* 0\.2 \(t_max\)"):
            Purifier(score_model, method="diffpure", t_star=0.3)


def test_cifar10_models_on_test_images() -> None:
    images, labels = cifar10_test_images(200)
    score_model, classifier = load_bundled("cifar10")
    assert count_correct(classifier, images, labels) >= 170
    errors = error_per_level(score_model.network, images, "eps", [0.02, 0.05, 0.1, 0.2])
    for error, bound in zip(errors, (0.31, 0.18, 0.107, 0.056), strict=True):
        assert error < bound


def cifar10_test_images(count: int) -> tuple[Tensor, Tensor]:
    """The first test images; skips where there are none beside the repository."""
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not (folder / "test_0.webp").is_file():
        pytest.skip("CIFAR-10 images are not in ../shared/data/cifar10")
    picture = pytest.importorskip("PIL.Image").open(folder / "test_0.webp").convert("RGB")
    pixels = torch.from_numpy(np.asarray(picture).copy())
    tiles = pixels.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1)[:count]  # [N, 3, 32, 32]
    labels = torch.from_numpy(np.load(folder / "test_labels.npy")[:count]).long()
    return tiles.float() / 255.0, labels


# (validation error of the shipped weights) x 1.15, per level
EPS_BOUND = {0.02: 0.170, 0.05: 0.117, 0.1: 0.079, 0.2: 0.048, 0.3: 0.034, 0.5: 0.0165, 0.8: 0.001}
NCSN_BOUND = {1.0: 0.035, 0.25: 0.071, 0.1: 0.114, 0.03: 0.174}


def test_the_score_models_denoise_held_out_digits() -> None:
    images, _ = demo_digits(200)
    network = load_bundled()[0].network
    errors = error_per_level(network, images, "eps", list(EPS_BOUND))
    for (t, bound), error in zip(EPS_BOUND.items(), errors, strict=True):
        assert error < bound, t
    network = load_bundled(score="ncsn")[0].network
    errors = error_per_level(network, images, "ncsn", list(NCSN_BOUND))
    for (sigma, bound), error in zip(NCSN_BOUND.items(), errors, strict=True):
        assert error < bound, sigma


def attacked(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """l-infinity PGD on the classifier alone, from the images, with the demo's bound."""
    epsilon, steps = bundled_settings()["epsilon"], bundled_settings()["attack_steps"]
    x = images.clone()
    for _ in range(steps):
        x.requires_grad_(True)
        loss = nn.functional.cross_entropy(classifier(x), labels)
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() + epsilon / 10 * gradient.sign()
        x = x.clamp(images - epsilon, images + epsilon).clamp(0, 1)
    return x


@pytest.mark.parametrize("method", ["coup", "diffpure", "adp"])
def test_the_chosen_settings_clean_attacked_digits(method: str) -> None:
    images, labels = demo_digits(48)
    score_model, classifier = load_bundled(score="ncsn" if method == "adp" else "vp")
    bad = attacked(classifier, images, labels)
    assert count_correct(classifier, bad, labels) <= 3
    options = dict(bundled_settings()["methods"][method])
    if method != "adp":  # a fifth of the steps is enough for a test
        options.update(num_steps=20, solver="exponential")
    purifier = Purifier(score_model, classifier, method=method, **options)
    with torch.no_grad():
        assert count_correct(classifier, purifier(images), labels) >= 45
        assert count_correct(classifier, purifier(bad), labels) >= 42
