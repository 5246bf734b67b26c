"""DDPM checkpoints in PyTorch: values of the released code, names, counts, every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.filling import fill, sample, scatter
from torch import nn

import coup_fast
from coup_fast.models.ddpm import load_ddpm
from coup_fast.models.ddpm_net import DDPMConfig, DDPMUNet

TWO = DDPMConfig(channels=32, widths=(32, 64), num_blocks=1, attention=(False, True))
THREE = DDPMConfig(channels=32, widths=(32, 32, 64), attention=(True, False, True))
GREY = DDPMConfig(1, 1, 32, (64, 32), 1, (False, True), learned_resampling=False)

# Outputs of ermongroup/ddim e8df66c (and of pesser/pytorch_diffusion, which are the same bits) for
# the weights of `fill`, at x = scatter(2, C, 16, 16), t = 3 and 749.
KNOWN = {
    "two levels": (
        TWO,
        0.44582808,
        (-0.112003, -0.308417, -0.377436, 0.286123, 0.491995, -0.623037, 0.171331, 0.188938),
    ),
    "three levels": (
        THREE,
        0.43534097,
        (0.312269, -0.347966, -0.003649, -0.140038, 0.460837, -0.078298, -0.38996, 0.175552),
    ),
    "grey, not resampled by convolutions": (
        GREY,
        0.44728503,
        (-0.436804, -0.163954, -0.217342, 1.025105, 0.037354, 0.201472, -0.80993, 0.349014),
    ),
}


def saved(path: Path, network: nn.Module, prefix: str = "") -> Path:
    """A bare state dict, as pesser's files are."""
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", KNOWN)
def test_outputs_are_those_of_the_released_code(tmp_path: Path, name: str) -> None:
    config, mean, values = KNOWN[name]
    model = load_ddpm(saved(tmp_path / "model.ckpt", fill(DDPMUNet(config))))
    assert model.network.config == config  # read from the file
    with torch.no_grad():
        x = scatter(2, config.in_channels, 16, 16)
        out = model(x, torch.tensor([3, 749], dtype=torch.float64) / 1000)
    assert sample(out)[:8] == pytest.approx(list(values), abs=1e-5)
    assert out.abs().mean().item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("widths", "attention", "entries", "parameters"),
    [
        ((1, 2, 2, 2), (1,), 328, 35_746_307),  # cifar10.yml
        ((1, 2, 2, 2, 4), (2,), 390, 78_700_803),  # celeba.yml
        ((1, 1, 2, 2, 4, 4), (4,), 450, 113_673_219),  # church.yml, bedroom.yml; CelebA-HQ
    ],
)
def test_published_networks_have_their_parameters(
    widths: tuple[int, ...], attention: tuple[int, ...], entries: int, parameters: int
) -> None:
    config = DDPMConfig(
        widths=tuple(128 * width for width in widths),
        attention=tuple(level in attention for level in range(len(widths))),
    )
    with torch.device("meta"):
        network = DDPMUNet(config)
    state = network.state_dict()
    assert len(state) == entries
    assert sum(p.numel() for p in network.parameters()) == parameters
    expected = {
        "temb.dense.1.weight": [512, 512],
        "down.2.block.0.temb_proj.weight": [128 * widths[2], 512],
        "down.0.downsample.conv.weight": [128, 128, 3, 3],
        f"down.{attention[0]}.attn.1.proj_out.bias": [128 * widths[attention[0]]],
        "mid.attn_1.q.weight": [128 * widths[-1]] * 2 + [1, 1],
        f"up.{attention[0]}.attn.2.k.bias": [128 * widths[attention[0]]],
        "up.1.upsample.conv.bias": [128 * widths[1]],
        "norm_out.weight": [128],
    }
    assert {name: list(state[name].shape) for name in expected} == expected


def training(path: Path, network: nn.Module, average: nn.Module | None) -> Path:
    """`ckpt.pth` of ermongroup/ddim: the DataParallel's state dict, Adam, epoch, step, EMA."""
    optimizer = torch.optim.Adam(network.parameters())
    states = [nn.DataParallel(network).state_dict(), optimizer.state_dict(), 3, 1200]
    if average is not None:
        states.append({name: p.data for name, p in average.named_parameters()})
    torch.save(states, path)
    return path


def test_training_checkpoints_hold_an_average(tmp_path: Path) -> None:
    raw, average = fill(DDPMUNet(TWO)), DDPMUNet(TWO).eval()
    path = training(tmp_path / "ckpt.pth", raw, average)
    x, t = scatter(1, 3, 16, 16), torch.tensor([0.3])
    with torch.no_grad():
        for ema, network in ((None, average), (True, average), (False, raw)):
            assert torch.equal(load_ddpm(path, ema=ema)(x, t), network(x, 1000 * t))
        path = training(tmp_path / "old.pth", raw, None)
        assert torch.equal(load_ddpm(path)(x, t), raw(x, 1000 * t))
    with pytest.raises(ValueError, match=r"old\.pth holds no EMA .* a list of 4 entries"):
        load_ddpm(path, ema=True)
    with pytest.raises(ValueError, match="bare state dict"):
        load_ddpm(saved(tmp_path / "bare.ckpt", raw), ema=True)


def test_methods_run_on_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.ckpt", fill(DDPMUNet(TWO)), prefix="module.")
    model = load_ddpm(path)
    assert (model.kind, model.time_scale, model.in_channels) == ("eps", 1000.0, 3)
    assert model.schedule == coup_fast.DiscreteSchedule()
    assert load_ddpm(path, schedule=coup_fast.DiscreteSchedule.cosine(500)).time_scale == 500
    images = (0.5 + 0.4 * scatter(1, 3, 16, 16)).requires_grad_()
    for method, options in (("diffpure", {"num_steps": 2}), ("gdmp", {"t_star": 0.002})):
        purified = coup_fast.Purifier(model, method=method, **options)(images)
        (gradient,) = torch.autograd.grad(purified.sum(), images)
        assert gradient.isfinite().all()
        assert gradient.any()


def test_files_that_do_not_fit_say_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"a list of 2 entries \(int 1, int 2\)"):
        load_ddpm(path)
    torch.save({"conv_in.weight": torch.zeros(32, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"no DDPM checkpoint.* lacks 'conv_out\.weight'"):
        load_ddpm(path)
    state = dict(DDPMUNet(TWO).state_dict())
    torch.save(state | {"logvar": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match="1 unexpected: logvar"):
        load_ddpm(path)
    del state["down.1.attn.0.v.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing: down\.1\.attn\.0\.v\.bias"):
        load_ddpm(path)
    states = torch.load(training(path, DDPMUNet(TWO), DDPMUNet(TWO)), weights_only=True)
    del states[4]["conv_out.bias"]
    torch.save(states, path)
    with pytest.raises(ValueError, match=r"EMA .*conv_out\.bias"):
        load_ddpm(path)
    with pytest.raises(TypeError, match=r"schedule .*DiscreteSchedule, got VPSchedule"):
        load_ddpm(path, schedule=coup_fast.VPSchedule())
    with pytest.raises(ValueError, match=r"divisible by 2, got \[1, 3, 15, 16\]"):
        DDPMUNet(TWO)(torch.zeros(1, 3, 15, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        DDPMUNet(DDPMConfig(channels=48))
