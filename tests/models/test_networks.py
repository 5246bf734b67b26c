"""The networks: shapes, conditioning, independence of the batch, weights files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coup_fast.models.classifier import Classifier
from coup_fast.models.network_files import build_network, load_network, save_network
from coup_fast.models.unet import EnergyUNet, UNet, time_embedding
from coup_fast.score_model import EnergyModel


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """The zero-initialised layers would hide everything behind them."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"in_channels": 1, "channels": [8, 16], "patch": 2}, (2, 1, 28, 28)),
        ({"in_channels": 3, "channels": [8, 8, 16], "blocks": 2}, (2, 3, 32, 24)),
        ({"in_channels": 1, "channels": [4]}, (1, 1, 5, 7)),
    ],
)
def test_unet_keeps_the_shape(arguments: dict, shape: tuple[int, ...]) -> None:
    network = randomised(UNet(**arguments))
    out = network(torch.randn(shape), torch.rand(shape[0]) * 999)
    assert out.shape == shape
    assert out.any()
    wide = UNet(**arguments, out_channels=2 * shape[1])
    assert wide(torch.randn(shape), torch.zeros(shape[0])).shape == (
        shape[0],
        2 * shape[1],
        *shape[2:],
    )


def test_unet_depends_on_time_only_if_conditioned() -> None:
    x = torch.randn(2, 1, 8, 8)
    early, late = torch.full((2,), 10.0), torch.full((2,), 500.0)
    conditioned = randomised(UNet(1, [8, 8]))
    assert not torch.allclose(conditioned(x, early), conditioned(x, late))
    plain = randomised(UNet(1, [8, 8], time_conditioned=False))
    assert torch.equal(plain(x, early), plain(x, late))
    assert torch.equal(plain(x), plain(x, late))
    with pytest.raises(ValueError, match=r"network\(x, t\)"):
        conditioned(x)


def test_an_image_does_not_depend_on_its_batch() -> None:
    network = randomised(UNet(1, [8, 16], patch=2))
    x, t = torch.randn(5, 1, 28, 28), torch.rand(5) * 999
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(x, t), alone, rtol=1e-5, atol=1e-5)
    classifier = Classifier().eval()
    images = torch.rand(5, 1, 28, 28)
    alone = torch.cat([classifier(images[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(classifier(images), alone, rtol=1e-5, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        UNet(1, [4, 4, 4])(torch.zeros(1, 1, 28, 30), torch.zeros(1))
    with pytest.raises(ValueError, match=r"channels=\(4, 0\)"):
        UNet(1, [4, 0])
    with pytest.raises(ValueError, match="divisible by 4"):
        Classifier(size=30)


def test_time_embedding_separates_the_times_in_use() -> None:
    features = time_embedding(torch.tensor([0.0, 1.0, 2.0, 999.0]), 32)
    assert features.shape == (4, 32)
    assert torch.equal(features[0, :16], torch.ones(16))
    assert torch.cdist(features, features).fill_diagonal_(1.0).min() > 0.5


@pytest.mark.parametrize("time_conditioned", [True, False])
def test_energy_network_is_a_score_model_that_can_be_trained(time_conditioned: bool) -> None:
    energy = randomised(EnergyUNet(1, [8, 8], time_conditioned=time_conditioned)).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([5.0, 700.0])
    value, score = energy(x, t), EnergyModel(energy)(x, t)
    assert value.shape == (2,)
    assert score.shape == x.shape
    step = torch.zeros_like(x)
    step[0, 0, 1, 2] = 1e-6
    slope = (energy(x + step, t) - energy(x - step, t)) / 2e-6
    assert slope[0].item() == pytest.approx(-score[0, 0, 1, 2].item(), rel=1e-5)
    assert slope[1].item() == 0.0
    score.square().sum().backward()
    assert all(p.grad is not None for p in energy.body.head.parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    "network",
    [
        UNet(1, [8, 8], patch=2, time_conditioned=False),
        UNet(3, [4], out_channels=6, blocks=2),
        EnergyUNet(1, [4, 4]),
        Classifier(3, 7, size=8, width=4, hidden=5),
    ],
    ids=["ncsn", "variance", "energy", "classifier"],
)
def test_weights_files_rebuild_the_network(tmp_path: Path, network: torch.nn.Module) -> None:
    path = tmp_path / "weights.safetensors"
    save_network(path, randomised(network), {"kind": "eps", "seconds": 3})
    loaded, description = load_network(path)
    assert type(loaded) is type(network)
    assert description["kind"] == "eps"
    assert description["seconds"] == 3
    assert loaded.config == network.config
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    save_network(path, network, {}, torch.float16)
    for tensor in load_network(path)[0].state_dict().values():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.half().float())


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors .*which network"):
        load_network(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'Nothing'.* UNet, "):
        build_network("Nothing", {})
