"""Classifiers by name and from files: normalisation, errors; timm and RobustBench where present."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.filling import fill, scatter
from helpers.tiny import TinyClassifier
from torch import nn

import coup_fast
from coup_fast.models import Normalized, load_classifier
from coup_fast.models.classifier import Classifier
from coup_fast.models.network_files import save_network

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def images() -> torch.Tensor:
    return 0.5 + 0.5 * scatter(2, 3, 8, 8)


def test_normalised_networks_take_pixels() -> None:
    network = TinyClassifier()
    classifier = Normalized(network, MEAN, STD)
    assert classifier.in_channels == 3
    x = torch.stack([(images()[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(classifier(images()), network(x))


@pytest.mark.parametrize(
    "make", [tuple, list, torch.tensor, lambda x: torch.tensor(x)[:, None, None]]
)
def test_mean_and_std_come_in_many_forms(make) -> None:
    wanted = Normalized(TinyClassifier(), MEAN, STD)
    found = Normalized(TinyClassifier(), make(MEAN), make(STD))
    assert torch.equal(found(images()), wanted(images()))
    one = Normalized(TinyClassifier(), 0.5, 0.25)
    assert torch.equal(one(images()), TinyClassifier()((images() - 0.5) / 0.25))
    assert one.in_channels is None


def test_normalized_follows_dtypes_saves_its_numbers_and_lets_gradients_through() -> None:
    wide = Normalized(TinyClassifier().double(), MEAN, STD)
    assert wide.mean.dtype == torch.float64
    assert wide.mean.flatten().tolist() == list(MEAN)  # not by way of float32
    half = Normalized(TinyClassifier(), MEAN, STD).to(torch.bfloat16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16}
    other = Normalized(TinyClassifier(seed=9), 3 * (0.5,), 3 * (0.5,))
    other.load_state_dict(wide.state_dict())
    leaf = images().requires_grad_()
    other(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0
    assert all(p.grad is not None for p in other.parameters())
    score = coup_fast.ScoreModel(lambda x, t: 0.1 * x)
    for model in (wide, half):
        assert coup_fast.Purifier(score, model, num_steps=2)(images()).dtype == torch.float32
    meta = Normalized(TinyClassifier().to("meta"), MEAN, STD)
    assert meta.mean.device.type == "meta"


def test_answers_with_logits_are_unwrapped() -> None:
    class Output(dict):
        logits = property(lambda self: self["logits"])

    network = TinyClassifier()
    classifier = Normalized(lambda x: Output(logits=network(x)), MEAN, STD)
    assert torch.equal(classifier(images()), Normalized(network, MEAN, STD)(images()))


def test_bad_numbers_are_named() -> None:
    network = TinyClassifier()
    with pytest.raises(ValueError, match=r"each of std must be a number in \(0, inf\), got 0"):
        Normalized(network, MEAN, (1, 0, 1))
    with pytest.raises(ValueError, match=r"mean and std .*got 3 and 1"):
        Normalized(network, MEAN, 0.5)
    with pytest.raises(ValueError, match=r"each of mean .*\[0, 1\].*got 123.*by 255"):
        Normalized(network, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
    with pytest.raises(ValueError, match="each of mean must be a finite number, got nan"):
        Normalized(network, (float("nan"), 0, 0), STD)
    with pytest.raises(TypeError, match=r"mean must be numbers, one per channel, got \[2, 3\]"):
        Normalized(network, torch.zeros(2, 3), STD)
    with pytest.raises(TypeError, match="std must be numbers, one per channel, got 'a'"):
        Normalized(network, MEAN, "a")
    with pytest.raises(TypeError, match="network must be a module or a callable, got int"):
        Normalized(3, MEAN, STD)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_fill_an_architecture(tmp_path: Path, prefix: str) -> None:
    network = TinyClassifier(seed=5)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"net": {"state": state}, "acc": 93.1}, tmp_path / "checkpoint.pt")
    path = tmp_path / "checkpoint.pt"
    for architecture in (TinyClassifier(seed=1), TinyClassifier):
        found = load_classifier(path, architecture=architecture, key="net.state")
        assert not found.training
        torch.testing.assert_close(found(images()), network(images()))
    scaled = load_classifier(path, architecture=TinyClassifier, key="net.state", mean=MEAN, std=STD)
    assert torch.equal(scaled(images()), Normalized(network, MEAN, STD)(images()))
    with pytest.raises(ValueError, match=r"\(net, acc\); .* key="):
        load_classifier(path, architecture=TinyClassifier)
    with pytest.raises(ValueError, match=r"\[net\] .*'model'.* state"):
        load_classifier(path, architecture=TinyClassifier, key="net.model")
    with pytest.raises(ValueError, match="architecture="):
        load_classifier(path, key="net.state")
    with pytest.raises(ValueError, match=r"2 of another shape: linear\.weight is"):
        load_classifier(path, architecture=TinyClassifier(classes=3), key="net.state")
    with pytest.raises(ValueError, match=r"mean=.* and std=None"):
        load_classifier(path, architecture=TinyClassifier, key="net.state", mean=MEAN)
    with pytest.raises(ValueError, match="pretrained"):
        load_classifier(path, architecture=TinyClassifier, key="net.state", pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_classifier(tmp_path / "absent.safetensors")


def test_files_of_ours_need_no_architecture(tmp_path: Path) -> None:
    network = fill(Classifier(3, 7, size=8, width=4, hidden=5))
    save_network(tmp_path / "own.safetensors", network, {"kind": "classifier"})
    found = load_classifier(tmp_path / "own.safetensors")
    torch.testing.assert_close(found(images()), network(images()))


@pytest.mark.parametrize("name", ["robustbench", "timm"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"'{name}:.*pip install {name}"):
        load_classifier(f"{name}:Standard")
    with pytest.raises(ValueError, match="architecture, key and prefix"):
        load_classifier(f"{name}:Standard", architecture=TinyClassifier)


class TestStandIns:
    """Stand-ins for the packages, which are large and not in the test extra: what we do with them.

    `create_model`, `is_model`, `pretrained_cfg` and `load_model` are as timm 1.0 and RobustBench
    1.1 have them; the tests below this class run the real ones where they are installed.
    """

    @pytest.fixture
    def stand_in_timm(self, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
        calls: list[dict] = []

        def create_model(name: str, **options) -> nn.Module:
            calls.append(options)
            network = TinyClassifier(channels=options.get("in_chans", 3)).train()
            network.pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 8, 8)}
            return network

        module = types.ModuleType("timm")
        module.create_model, module.is_model = create_model, lambda name: name == "tiny"
        monkeypatch.setitem(sys.modules, "timm", module)
        return calls

    def test_timm_models_are_normalised_as_they_say(self, stand_in_timm: list[dict]) -> None:
        found = load_classifier("timm:tiny", num_classes=4)
        assert stand_in_timm == [{"pretrained": True, "num_classes": 4}]
        assert not found.training
        assert not found.network.training
        wanted = Normalized(TinyClassifier(), MEAN, STD)(images())
        assert torch.equal(found(images()), wanted)
        own = load_classifier("timm:tiny", pretrained=False, mean=(0.5,) * 3, std=(0.5,) * 3)
        assert torch.equal(own(images()), TinyClassifier()((images() - 0.5) / 0.5))
        assert stand_in_timm[-1] == {"pretrained": False}
        with pytest.raises(ValueError, match=r"timm .*'huge'"):
            load_classifier("timm:huge")
        with pytest.raises(ValueError, match=r"3 channels.* in_chans is 1"):
            load_classifier("timm:tiny", in_chans=1)

    def test_robustbench_models_are_taken_as_they_are(self, monkeypatch) -> None:
        calls: list[dict] = []

        def load_model(model_name: str, **options) -> nn.Module:
            calls.append(options)
            return {"Standard": TinyClassifier}[model_name]()

        package, utils = types.ModuleType("robustbench"), types.ModuleType("robustbench.utils")
        utils.load_model = load_model
        monkeypatch.setitem(sys.modules, "robustbench", package)
        monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
        found = load_classifier("robustbench:Standard", threat_model="L2")
        assert calls == [{"threat_model": "L2"}]
        assert torch.equal(found(images()), TinyClassifier()(images()))
        with pytest.raises(ValueError, match=r"'Other' .*threat_model='L2'"):
            load_classifier("robustbench:Other", threat_model="L2")
        with pytest.raises(ValueError, match="RobustBench"):
            load_classifier("robustbench:Standard", mean=MEAN, std=STD)


def test_a_real_timm_model() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    found = load_classifier("timm:resnet10t", pretrained=False, num_classes=4)
    config = found.network.pretrained_cfg
    mean = torch.tensor(config["mean"]).reshape(3, 1, 1)
    std = torch.tensor(config["std"]).reshape(3, 1, 1)
    x = 0.5 + 0.5 * scatter(2, 3, 32, 32)
    fill(found.network)
    torch.testing.assert_close(found(x), found.network((x - mean) / std))
    score = coup_fast.ScoreModel(lambda x, t: 0.1 * x)
    purified = coup_fast.Purifier(score, found, method="coup", num_steps=2)(x)
    assert purified.isfinite().all()
    assert timm.is_model("resnet10t")


def test_a_real_robustbench_model(tmp_path: Path) -> None:
    """WideResNet-28-10 ("Standard"), with weights of ours where its cache is looked for."""
    pytest.importorskip("robustbench", reason="robustbench is not installed")
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    network = fill(WideResNet(depth=28, widen_factor=10))
    assert sum(p.numel() for p in network.parameters()) == 36_479_194
    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    torch.save({"state_dict": network.state_dict()}, folder / "Standard.pt")
    found = load_classifier("robustbench:Standard", model_dir=str(tmp_path))
    x = 0.5 + 0.5 * scatter(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(x), network(x))
    with pytest.raises(ValueError, match=r"RobustBench .*'None2020'"):
        load_classifier("robustbench:None2020", model_dir=str(tmp_path))
