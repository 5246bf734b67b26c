"""What CIFAR-10 adds to training: the fast classifier, an NCSN that starts from a VP network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coup_fast.models import NAFNet, UNet, load_network, save_network
from coup_fast.models.conv_net import ConvNet
from coup_fast.training import runs
from coup_fast.training.checkpoint import write_checkpoint
from coup_fast.training.dsm import VPNoise
from coup_fast.training.trainer import Trainer
from coup_fast.training.transfer import ncsn_from_vp


def random_network(name: str = "UNet", **arguments: object) -> UNet | NAFNet:
    """A score network none of whose parameters is zero."""
    torch.manual_seed(3)
    network: UNet | NAFNet = {"UNet": UNet, "NAFNet": NAFNet}[name](3, [8, 8], **arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("t", [0.05, 0.1])
@pytest.mark.parametrize("name", ["UNet", "NAFNet"])
def test_ncsn_from_vp_is_the_vp_network_at_one_time(name: str, t: float) -> None:
    network = random_network(name, patch=2)
    with torch.no_grad():  # one tap: the zeros around the image are the one thing that differs
        taps = torch.zeros(3, 3)
        taps[1, 1] = 1.0
        network.stem.weight.mul_(taps)
    pixels = torch.rand(2, 3, 16, 16)
    noise = VPNoise()
    signal = noise.alpha_bar(torch.tensor(t)).sqrt().float()
    start = ncsn_from_vp(network, noise, t)
    expected = -network(signal * (2 * pixels - 1), torch.full((2,), t * noise.time_scale))
    torch.testing.assert_close(start(pixels), expected, rtol=1e-4, atol=1e-4)
    other = ncsn_from_vp(network, noise, 2 * t)
    assert (other(pixels) - expected).abs().max() > 1e-2


def test_ncsn_from_vp_needs_a_network_that_knows_the_time() -> None:
    with pytest.raises(ValueError, match="conditioned on time"):
        ncsn_from_vp(random_network(time_conditioned=False), VPNoise(), 0.1)


def test_a_damaged_init_is_told_without_advice_on_another_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "renamed.ck", {"identity": {}})
    with pytest.raises(ValueError, match=r"renamed\.ck does not say which network it holds"):
        runs.initialised(tmp_path / "renamed.ck", "score", "eps", None, {})
    (tmp_path / "a.checkpoint").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.checkpoint is damaged .* does not fit\.$"):
        runs.initialised(tmp_path / "a.checkpoint", "score", "eps", None, {})


def test_init_of_another_shape_or_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vp.safetensors"
    save_network(file, random_network(), {"kind": "eps"})
    with pytest.raises(ValueError, match=r"channels \[8, 8\], here \[8, 16\]"):
        runs.initialised(file, "ncsn", "ncsn", None, {"channels": [8, 16]})
    with pytest.raises(ValueError, match="in_channels 3, here 1"):
        runs.initialised(file, "score", "eps", None, {"in_channels": 1})
    with pytest.raises(ValueError, match="holds a UNet, and NAFNet was asked for"):
        runs.initialised(file, "score", "eps", "NAFNet", {})
    with pytest.raises(ValueError, match="holds a VP score network; a classifier is needed"):
        runs.initialised(file, "classifier", "classifier", None, {})
    save_network(file, random_network(), {"kind": "score"})
    with pytest.raises(
        ValueError, match="a VP energy network; an NCSN or a VP score network is needed"
    ):
        runs.initialised(file, "ncsn", "ncsn", None, {})


def test_a_run_goes_on_from_a_file_of_its_own_kind(tmp_path: Path) -> None:
    file, network = tmp_path / "vp.safetensors", random_network()
    save_network(file, network, {"kind": "eps"})
    same = runs.initialised(file, "score", "eps", None, {"in_channels": 3})
    assert isinstance(same, UNet)
    assert same.config == network.config
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name
    moved = runs.initialised(file, "ncsn", "ncsn", None, {"in_channels": 3})
    assert isinstance(moved, UNet)
    assert moved.config["time_conditioned"] is False


def test_an_ncsn_network_starts_from_the_checkpoint_of_a_vp_training(tmp_path: Path) -> None:
    checkpoint = tmp_path / "vp.safetensors.checkpoint"
    network = random_network("NAFNet")
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    recipe = runs.RECIPES["cifar10", "score", "NAFNet"]
    identity = {"network": "NAFNet", "arguments": json.dumps(network.config), "kind": "eps"}
    averaged = Trainer(
        network,
        runs._objective("score", "eps", recipe, flip=True),
        images,
        torch.zeros(8, dtype=torch.int64),
        replace(recipe.config, steps=2, batch_size=4, precision="float32"),
        checkpoint=checkpoint,
        identity=identity,
        progress=False,
    ).run()
    moved = runs.initialised(checkpoint, "ncsn", "ncsn", "NAFNet", {"in_channels": 3})
    assert isinstance(averaged, NAFNet)
    expected = ncsn_from_vp(averaged, VPNoise(), runs.INIT_TIME).state_dict()
    for name, tensor in moved.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ncsn = runs.RECIPES["cifar10", "ncsn", "NAFNet"]
    assert (
        NAFNet(**{**ncsn.arguments, "time_conditioned": False}).config["channels"]
        == (recipe.arguments["channels"])
    )


def test_patches_come_out_white() -> None:
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.rand(200, 3, 4, 4), scale_factor=8, mode="bilinear")
    images += 0.1 * torch.rand_like(images)
    network = ConvNet(widths=[8, 8])
    network.whiten_patches(images, eps=0.0)
    features = network.whiten(images).detach().transpose(0, 1).flatten(1)
    half = len(features) // 2
    torch.testing.assert_close(torch.cov(features[:half]), torch.eye(half), atol=1e-2, rtol=0)
    torch.testing.assert_close(features.mean(1), torch.zeros(2 * half), atol=1e-2, rtol=0)
    torch.testing.assert_close(features[half:], -features[:half])


def test_the_recipes_naf_net_is_small() -> None:
    network = NAFNet(**runs.RECIPES["cifar10", "score", "NAFNet"].arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_735_052


def naf_net_trainer(checkpoint: Path | None) -> Trainer:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    recipe = runs.RECIPES["cifar10", "score", "NAFNet"]
    network = NAFNet(3, [8, 8]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trainer(
        network,
        runs._objective("score", "eps", recipe, flip=True),
        images,
        torch.zeros(64, dtype=torch.int64),
        replace(recipe.config, steps=6, batch_size=8, precision="float32"),
        checkpoint=checkpoint,
        save_every=0.0,
        log_every=2,
        progress=False,
    )


def test_a_naf_net_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    stopped = naf_net_trainer(checkpoint)
    objective = stopped.objective

    def stopping(*arguments: Any) -> Tensor:
        if stopped.state.step == 5:
            raise KeyboardInterrupt
        return objective(*arguments)

    stopped.objective = stopping
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed, whole = naf_net_trainer(checkpoint), naf_net_trainer(None)
    assert resumed.state.step == 5
    ours, theirs = resumed.run().state_dict(), whole.run().state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_large_recipe_is_for_a_gpu() -> None:
    recipe = runs.recipe_for("cifar10", "score", None, (3, 32, 32), 10, large=True)
    with torch.device("meta"):
        network = UNet(**recipe.arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == 28_705_411
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 32, 32, device="meta"), torch.empty(1, device="meta"))
    step = 3 * recipe.config.batch_size * counter.get_total_flops()  # there and back
    assert step == pytest.approx(14.3e12, rel=0.01)
    with pytest.raises(ValueError, match="no large NAFNet for cifar10 score; there is UNet"):
        runs.recipe_for("cifar10", "score", "NAFNet", (3, 32, 32), 10, large=True)
    with pytest.raises(ValueError, match="no large network for photos score"):
        runs.recipe_for("photos", "score", None, (3, 32, 32), 10, large=True)


def classifier_run(steps: int) -> nn.Module:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 10, (64,))
    network = ConvNet(widths=[8, 8])
    network.whiten_patches(images.float() / 255.0)
    objective = runs._objective("classifier", "classifier", runs.RECIPES["mnist", "score"], True)
    config = replace(
        runs.RECIPES["cifar10", "classifier"].config,
        steps=steps,
        batch_size=16,
        learning_rate=0.02,
        ema=0.5,
        precision="float32",
    )
    return Trainer(network, objective, images, labels, config, progress=False).run()


def test_the_classifier_trains_and_its_statistics_are_stored(tmp_path: Path) -> None:
    network = classifier_run(steps=5)
    counters = [b for name, b in network.named_buffers() if name.endswith("batches_tracked")]
    assert counters
    assert all(int(counter) == 5 for counter in counters)
    for counter in counters:
        counter.fill_(2501)  # not a float16 number
    file = tmp_path / "classifier.safetensors"
    save_network(file, network, {"kind": "classifier"}, torch.float16)
    loaded, _ = load_network(file)
    images: Tensor = torch.rand(2, 3, 16, 16)
    logits = loaded(images)
    torch.testing.assert_close(logits, network(images), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(loaded(images[:1]), logits[:1])  # its batch does not matter
    stored = [b for name, b in loaded.named_buffers() if name.endswith("batches_tracked")]
    assert [int(counter) for counter in stored] == [2501] * len(counters)
