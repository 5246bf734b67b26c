"""The networks: shapes, conditioning, independence of the batch, weights files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from coup_fast.models.classifier import Classifier
from coup_fast.models.naf_net import NAFBlock, NAFNet
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
        ({"in_channels": 3, "channels": [8, 8, 16], "blocks": 2, "patch": 1}, (2, 3, 32, 24)),
        ({"in_channels": 1, "channels": [4], "patch": 1}, (1, 1, 5, 7)),
    ],
)
@pytest.mark.parametrize("build", [UNet, NAFNet])
def test_networks_keep_the_shape(
    build: type[UNet | NAFNet], arguments: dict, shape: tuple[int, ...]
) -> None:
    network = randomised(build(**arguments))
    out = network(torch.randn(shape), torch.rand(shape[0]) * 999)
    assert out.shape == shape
    assert out.any()
    wide = build(**arguments, out_channels=2 * shape[1])
    assert wide(torch.randn(shape), torch.zeros(shape[0])).shape == (
        shape[0],
        2 * shape[1],
        *shape[2:],
    )


@pytest.mark.parametrize("build", [UNet, NAFNet])
def test_networks_depend_on_time_only_if_conditioned(build: type[UNet | NAFNet]) -> None:
    x = torch.randn(2, 1, 8, 8)
    early, late = torch.full((2,), 10.0), torch.full((2,), 500.0)
    conditioned = randomised(build(1, [8, 8]))
    assert not torch.allclose(conditioned(x, early), conditioned(x, late))
    plain = randomised(build(1, [8, 8], time_conditioned=False))
    assert torch.equal(plain(x, early), plain(x, late))
    assert torch.equal(plain(x), plain(x, late))
    with pytest.raises(ValueError, match=r"network\(x, t\)"):
        conditioned(x)


@pytest.mark.parametrize("build", [UNet, NAFNet])
def test_an_image_does_not_depend_on_its_batch(build: type[UNet | NAFNet]) -> None:
    network = randomised(build(1, [8, 16], patch=2))
    x, t = torch.randn(5, 1, 28, 28), torch.rand(5) * 999
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(x, t), alone, rtol=1e-5, atol=1e-5)


def test_a_classified_image_does_not_depend_on_its_batch() -> None:
    classifier = Classifier().eval()
    images = torch.rand(5, 1, 28, 28)
    alone = torch.cat([classifier(images[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(classifier(images), alone, rtol=1e-5, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        UNet(1, [4, 4, 4])(torch.zeros(1, 1, 28, 30), torch.zeros(1))
    with pytest.raises(ValueError, match="divisible by 8"):
        NAFNet(1, [4, 4, 4])(torch.zeros(1, 1, 28, 32), torch.zeros(1))
    for build in (UNet, NAFNet):
        with pytest.raises(ValueError, match=r"channels=\(4, 0\)"):
            build(1, [4, 0])
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
        NAFNet(3, [4, 8], blocks=1, out_channels=6),
        Classifier(3, 7, size=8, width=4, hidden=5),
    ],
    ids=["ncsn", "variance", "energy", "naf_net", "classifier"],
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


def plain_naf_net(network: NAFNet, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The two-level network with one block a level, written out from the paper's figure 4c."""
    state = network.state_dict()

    def part(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[name + ".weight"], state[name + ".bias"]

    def conv(h: torch.Tensor, name: str, **options: int) -> torch.Tensor:
        return F.conv2d(h, *part(name), **options)

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = (p[:, None, None] for p in part(name))
        centred = h - h.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def halves(h: torch.Tensor) -> torch.Tensor:
        return h[:, : h.shape[1] // 2] * h[:, h.shape[1] // 2 :]

    def block(h: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = F.linear(time, *part(name + ".time"))[:, :, None, None].chunk(2, 1)
        g = conv(norm(h, name + ".norm1") * (1 + scale) + shift, name + ".expand1")
        g = halves(conv(g, name + ".depthwise", padding=1, groups=g.shape[1]))
        g = g * conv(g.mean((2, 3), keepdim=True), name + ".attention")
        h = h + conv(g, name + ".project1") * state[name + ".weight1"]
        g = halves(conv(norm(h, name + ".norm2"), name + ".expand2"))
        return h + conv(g, name + ".project2") * state[name + ".weight2"]

    time = time_embedding(t, network.time_features).to(x.dtype)
    time = F.silu(F.linear(F.silu(F.linear(time, *part("time_mlp.0"))), *part("time_mlp.2")))
    h = block(conv(F.pixel_unshuffle(x, 2), "stem", padding=1), "down.0.0")
    below = block(conv(h, "downsample.0", stride=2), "down.1.0")
    h = block(h + F.pixel_shuffle(conv(below, "upsample.0"), 2), "up.0.0")
    return F.pixel_shuffle(conv(norm(h, "norm"), "head", padding=1), 2)


def test_naf_net_is_the_papers() -> None:
    torch.manual_seed(0)
    network = randomised(NAFNet(3, [8, 12], blocks=1)).double()
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([5.0, 700.0])
    torch.testing.assert_close(network(x, t), plain_naf_net(network, x, t), rtol=1e-10, atol=1e-10)


def test_a_new_naf_block_is_the_identity() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(NAFBlock(8, 0)(x, None), x)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 2e-1), (torch.float32, 1e-5)]
)
def test_naf_net_in_other_dtypes_and_layouts(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    network = randomised(NAFNet(3, [8, 8])).double()
    x, t = torch.randn(2, 3, 8, 8, dtype=dtype), torch.rand(2) * 200
    expected = network(x.double(), t).float()
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(dtype, memory_format=layout)  # type: ignore[call-overload]
        for entry in (torch.contiguous_format, torch.channels_last):
            out = network(x.contiguous(memory_format=entry), t)
            assert out.dtype == dtype
            assert out.shape == x.shape
            distance = (out.float() - expected).norm() / expected.norm()
            assert distance < tolerance


def test_naf_net_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    network = randomised(NAFNet(1, [4, 4], blocks=1)).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([50.0])
    assert torch.autograd.gradcheck(lambda x: network(x, t), x)
    assert torch.autograd.gradgradcheck(lambda x: network(x, t), x)
