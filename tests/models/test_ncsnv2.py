"""NCSNv2 checkpoints: names, shapes, counts, values of the released code, ADP on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.filling import fill, sample, scatter
from torch import nn

import coup_fast
from coup_fast.models.ncsnv2 import load_ncsnv2
from coup_fast.models.ncsnv2_net import LAYOUTS, NCSNv2

# Outputs of ermongroup/ncsnv2 1bcea03 and of the copy in jmyoon1/adp 497e2d4 (which agree), times
# sigma where that code divides by it, for the weights of `fill` at x = 0.5 + 0.5 scatter(...).
KNOWN: dict[str, tuple[float, list[float]]] = {
    "ncsnv2": (
        0.439817697,
        [0.367485, 0.530547, -0.970076, -0.560796, -0.225842, 0.252785, -0.864704, -0.417101],
    ),
    "deepest": (
        0.468772769,
        [0.305117, -0.411108, 0.183141, -0.685903, -0.563286, 0.040326, 0.067569, -0.467987],
    ),
}


def checkpoint(path: Path, network: nn.Module, *, prefix: str = "module.", ema: bool = True):
    """A file as the released runner writes it, with random optimizer state of a plain kind."""
    with torch.no_grad():
        network.get_buffer("sigmas").copy_(torch.linspace(50, 0.01, len(network.sigmas)))
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4).state_dict()
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    states = [state, optimizer, 12, 3456]
    if ema:
        states.append({name: p.data + 1.0 for name, p in parameters.items()})
    torch.save(states, path)
    return path


def tiny(layout: str = "ncsnv2", channels: int = 2, ngf: int = 8) -> NCSNv2:
    return fill(NCSNv2(channels, ngf, 5, layout=layout))


@pytest.mark.parametrize("layout", KNOWN)
def test_outputs_are_those_of_the_released_code(tmp_path: Path, layout: str) -> None:
    mean, values = KNOWN[layout]
    model = load_ncsnv2(checkpoint(tmp_path / "checkpoint.pth", tiny(layout)))
    with torch.no_grad():
        out = model(0.5 + 0.5 * scatter(2, 2, 16, 16), torch.zeros(2))
    assert sample(out)[:8] == pytest.approx(values, abs=1e-5)
    assert out.abs().mean().item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "entries", "parameters"),
    [("ncsnv2", 154, 29_694_083), ("deeper", 192, 83_445_379), ("deepest", 230, 94_132_611)],
)
def test_published_networks_have_their_parameters(
    layout: str, entries: int, parameters: int
) -> None:
    with torch.device("meta"):
        network = NCSNv2(layout=layout)
    assert len(network.state_dict()) == entries
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_names_of_the_cifar_network() -> None:
    with torch.device("meta"):
        state = NCSNv2().state_dict()
    expected = {
        "sigmas": [232],
        "begin_conv.weight": [128, 3, 3, 3],
        "normalizer.alpha": [128],
        "res1.0.normalize2.gamma": [128],
        "res2.0.conv1.weight": [128, 128, 3, 3],
        "res2.0.conv2.conv.weight": [256, 128, 3, 3],
        "res2.0.shortcut.conv.weight": [256, 128, 1, 1],
        "res3.0.shortcut.weight": [256, 256, 3, 3],  # dilated, although the widths are equal
        "res4.1.conv2.bias": [256],
        "refine1.adapt_convs.0.2_2_conv.weight": [256, 256, 3, 3],
        "refine2.msf.convs.1.bias": [256],
        "refine4.crp.convs.1.weight": [128, 128, 3, 3],
        "refine4.output_convs.3_2_conv.weight": [128, 128, 3, 3],
    }
    assert {name: list(state[name].shape) for name in expected} == expected
    assert "res4.1.shortcut.weight" not in state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_says_what_the_network_is(tmp_path: Path, layout: str) -> None:
    network = tiny(layout, channels=1, ngf=4)
    path = checkpoint(tmp_path / "checkpoint.pth", network)
    model = load_ncsnv2(path)
    assert (model.kind, model.in_channels) == ("ncsn", 1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor)
    shadow = load_ncsnv2(path, ema=True).network
    assert torch.equal(shadow.end_conv.weight, network.end_conv.weight + 1.0)
    assert torch.equal(shadow.sigmas, network.sigmas)
    torch.save(network.state_dict(), path)
    assert torch.equal(load_ncsnv2(path).network.sigmas, network.sigmas)


def test_adp_runs_on_a_loaded_network(tmp_path: Path) -> None:
    model = load_ncsnv2(checkpoint(tmp_path / "checkpoint.pth", tiny()))
    images = 0.5 + 0.4 * scatter(2, 2, 16, 16)
    purified = coup_fast.Purifier(model, method="adp", num_steps=2)(images)
    noise = torch.zeros(1, 2, 2, 16, 16)
    options = {"num_steps": 1, "alpha_min": 0.01, "alpha_max": 0.01}
    one = coup_fast.Purifier(model, method="adp", **options)(images, noise=noise)
    start = (255 / 256) * images + 1 / 512
    with torch.no_grad():
        step = start + 0.01 * model(start, torch.zeros(2))
    torch.testing.assert_close(one, ((256 / 255) * step - 1 / 510).clamp(0, 1))
    assert purified.isfinite().all()


def test_the_same_network_as_a_noise_network(tmp_path: Path) -> None:
    """Both kinds see the same pixels; -z is what the undivided output estimates."""
    path = checkpoint(tmp_path / "checkpoint.pth", tiny())
    ncsn, eps = load_ncsnv2(path), load_ncsnv2(path, kind="eps")
    schedule = coup_fast.VPSchedule()
    clean, noise, t = 0.5 + 0.3 * scatter(1, 2, 16, 16), scatter(1, 2, 16, 16, salt=1), 0.1
    signal, std = float(schedule.alpha_bar(t)) ** 0.5, float(schedule.sigma(t))
    pixels = clean + 0.5 * std / signal * noise
    with torch.no_grad():
        wanted = -ncsn(pixels, torch.zeros(1))
        found = eps(signal * (2 * clean - 1) + std * noise, torch.tensor([t]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    images = 0.5 + 0.4 * scatter(1, 2, 16, 16)
    done = coup_fast.Purifier(eps, method="diffpure", num_steps=2)(images)
    assert done.isfinite().all()


def test_other_activations_and_centring(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint.pth", tiny())
    x, t = 0.5 + 0.5 * scatter(1, 2, 16, 16), torch.zeros(1)
    outs = [load_ncsnv2(path, activation=name)(x, t) for name in ("elu", "relu", "lrelu", "swish")]
    assert len({round(out.abs().sum().item(), 3) for out in outs}) == 4
    rescaled = load_ncsnv2(path, centre=False)
    torch.testing.assert_close(rescaled(2 * x - 1, t), outs[0])
    with pytest.raises(ValueError, match=r"activation .*elu, relu, lrelu, swish.*'gelu'"):
        load_ncsnv2(path, activation="gelu")
    with pytest.raises(ValueError, match=r"kind .*ncsn, eps, got 'score'"):
        load_ncsnv2(path, kind="score")


def test_files_that_do_not_fit_say_what_was_found(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c.pth", tiny(), ema=False)
    with pytest.raises(ValueError, match=r"EMA .* a list of 4 entries"):
        load_ncsnv2(path, ema=True)
    torch.save(tiny().state_dict(), path)
    with pytest.raises(ValueError, match=r"EMA .* a dict of 154 entries \(sigmas, "):
        load_ncsnv2(path, ema=True)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"a list of 2 entries \(int 1, int 2\)"):
        load_ncsnv2(path)
    torch.save({"begin_conv.weight": torch.zeros(8, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"lacks .* sigmas; .*begin_conv"):
        load_ncsnv2(path)
    state = dict(tiny().state_dict())
    del state["res3.0.shortcut.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing: res3\.0\.shortcut\.weight"):
        load_ncsnv2(path)
    states = torch.load(checkpoint(path, tiny()), weights_only=True)
    del states[4]["end_conv.bias"]
    torch.save(states, path)
    with pytest.raises(ValueError, match=r"EMA .*end_conv\.bias"):
        load_ncsnv2(path, ema=True)
