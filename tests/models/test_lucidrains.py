"""Checkpoints of denoising-diffusion-pytorch: values of its code, betas, objective, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.filling import fill, sample, scatter
from torch import Tensor

import coup_fast
from coup_fast.models.lucidrains import load_lucidrains
from coup_fast.models.lucidrains_net import AttentionConfig, LucidrainsConfig, LucidrainsUNet

LINEAR, FULL = AttentionConfig(False, 4, 32), AttentionConfig(True, 4, 32)
THIN, THIN_FULL = AttentionConfig(False, 2, 8), AttentionConfig(True, 2, 8)
CHAIN = coup_fast.DiscreteSchedule.cosine(1000)


def config(**changed: Any) -> LucidrainsConfig:
    """`Unet(dim=16, dim_mults=(1, 2))` of the package."""
    usual = {
        "in_channels": 3,
        "out_channels": 3,
        "self_condition": False,
        "channels": 16,
        "init_channels": 16,
        "widths": (16, 32),
        "down": (LINEAR, FULL),
        "mid": FULL,
        "up": (FULL, LINEAR),
    }
    return LucidrainsConfig(**(usual | changed))


# Outputs of lucidrains/denoising-diffusion-pytorch faed4db (2.3.1) for the weights of `fill`, at
# x = scatter(2, C, 16, 16), t = 3 and 749.
KNOWN = {
    "plain": (
        config(),
        0.466941446,
        (-0.310495, 1.597948, 0.009559, -0.159892, -0.064863, 1.095691, 0.301008, 0.493892),
    ),
    # Unet(dim=16, init_dim=24, dim_mults=(1, 2, 3), full_attn=(False, True, False), attn_heads=2,
    # attn_dim_head=8, channels=1)
    "own attention": (
        config(
            in_channels=1,
            out_channels=1,
            init_channels=24,
            widths=(16, 32, 48),
            down=(THIN, THIN_FULL, THIN),
            mid=THIN_FULL,
            up=(THIN, THIN_FULL, THIN),
        ),
        0.504827976,
        (-0.47843, 0.688646, -0.357326, -0.264062, -0.450723, -0.596222, -0.847912, -0.244069),
    ),
    "learned variance": (
        config(out_channels=6),
        0.409577936,
        (-0.310495, 0.009559, -0.064863, 0.867989, 0.233433, 0.301008, 0.491282, 0.334833),
    ),
    "self-conditioned": (
        config(self_condition=True),
        0.411612421,
        (0.086637, 0.636264, 0.26522, 0.225277, 0.513896, 1.093044, 0.202018, 0.540207),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_outputs_are_those_of_the_package(tmp_path: Path, name: str) -> None:
    shape, mean, values = KNOWN[name]
    torch.save(fill(LucidrainsUNet(shape)).state_dict(), tmp_path / "unet.pt")
    model = load_lucidrains(tmp_path / "unet.pt", objective="pred_noise", schedule=CHAIN)
    assert model.network.config == shape  # read from the file
    with torch.no_grad():
        x = scatter(2, shape.in_channels, 16, 16)
        out = model(x, torch.tensor([3, 749], dtype=torch.float64) / 1000)
    assert sample(out)[:8] == pytest.approx(list(values), abs=1e-5)
    assert out.abs().mean().item() == pytest.approx(mean, rel=1e-5)


def test_the_usual_network_has_its_parameters() -> None:
    """`Unet(dim=64, dim_mults=(1, 2, 4, 8))` of the package's README."""
    shape = config(
        channels=64,
        init_channels=64,
        widths=(64, 128, 256, 512),
        down=(LINEAR, LINEAR, LINEAR, FULL),
        up=(FULL, LINEAR, LINEAR, LINEAR),
    )
    with torch.device("meta"):
        network = LucidrainsUNet(shape)
    state = network.state_dict()
    assert len(state) == 245
    assert sum(p.numel() for p in network.parameters()) == 35_711_491
    expected = {
        "init_conv.weight": [64, 3, 7, 7],
        "time_mlp.3.bias": [256],
        "downs.0.2.mem_kv": [2, 4, 32, 4],
        "downs.0.2.to_out.1.g": [1, 64, 1, 1],
        "downs.0.3.1.weight": [64, 256, 1, 1],
        "downs.3.2.mem_kv": [2, 4, 4, 32],
        "downs.3.3.weight": [512, 256, 3, 3],
        "mid_attn.to_qkv.weight": [384, 512, 1, 1],
        "ups.0.0.res_conv.weight": [512, 768, 1, 1],
        "ups.1.3.1.weight": [128, 256, 3, 3],
        "ups.3.3.weight": [64, 64, 3, 3],
        "final_res_block.mlp.1.weight": [128, 256],
        "final_conv.weight": [3, 64, 1, 1],
    }
    assert {name: list(state[name].shape) for name in expected} == expected


def diffusion(
    network: LucidrainsUNet, objective: str, gamma: float | None = None, steps: int = 200
) -> dict[str, Tensor]:
    """The state dict of a `GaussianDiffusion` with the package's sigmoid schedule, in float32."""
    level = 1 / (1 + np.exp(6 * np.linspace(0, 1, steps + 1) - 3))
    level = (level - level[-1]) / (level[0] - level[-1])
    betas = np.clip(1 - level[1:] / level[:-1], 0, 0.999)
    alpha_bar = np.cumprod(1 - betas)
    ratio = alpha_bar / (1 - alpha_bar)
    clipped = ratio if gamma is None else np.minimum(ratio, gamma)
    weight = {"pred_noise": clipped / ratio, "pred_x0": clipped, "pred_v": clipped / (ratio + 1)}
    buffers = {"betas": betas, "alphas_cumprod": alpha_bar, "loss_weight": weight[objective]}
    state = {name: torch.from_numpy(value).float() for name, value in buffers.items()}
    return state | {f"model.{name}": value for name, value in network.state_dict().items()}


def training(path: Path, raw: dict[str, Tensor], average: dict[str, Tensor] | None) -> Path:
    """`model-N.pt` of the package's Trainer."""
    kept: dict[str, Any] = {"step": 7, "model": raw, "opt": {}, "scaler": None, "version": "2.3.1"}
    if average is not None:
        counters = {"initted": torch.tensor([True]), "step": torch.tensor([7])}
        online = {f"online_model.{name}": value for name, value in raw.items()}
        ema = {f"ema_model.{name}": value for name, value in average.items()}
        kept["ema"] = online | ema | counters
    torch.save(kept, path)
    return path


def test_v_prediction_is_the_noise_of_the_package(tmp_path: Path) -> None:
    """ε = √ᾱ v + σ x is `model_predictions(x, t).pred_noise`, with the sigmoid schedule."""
    state = diffusion(fill(LucidrainsUNet(config())), "pred_v")
    model = load_lucidrains(training(tmp_path / "model-1.pt", state, state))
    assert (model.kind, model.time_scale, model.in_channels) == ("v", 200.0, 3)
    betas = [model.schedule.betas[index] for index in (0, 1, 100, 199)]
    assert betas == pytest.approx([0.00151781749, 0.00156183913, 0.0165706277, 0.999], rel=1e-5)
    with torch.no_grad():
        x = scatter(2, 3, 16, 16)
        out = model(x, torch.tensor([3, 149], dtype=torch.float64) / 200)
    alpha_bar = torch.from_numpy(model.schedule.alpha_bar([3, 149])).float().reshape(2, 1, 1, 1)
    out = alpha_bar.sqrt() * out + (1 - alpha_bar).sqrt() * x
    values = (-0.302162, 1.670801, -0.042733, -0.12694, -0.018801, -0.143554, 0.424921, -0.219946)
    assert sample(out)[:8] == pytest.approx(list(values), abs=1e-5)
    images = (0.5 + 0.4 * scatter(1, 3, 16, 16)).requires_grad_()
    purified = coup_fast.Purifier(model, method="ddim", t_star=0.02)(images)
    (gradient,) = torch.autograd.grad(purified.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("gamma", [None, 5.0, 1.0])
def test_the_objective_is_read_from_the_loss(
    tmp_path: Path, objective: str, gamma: float | None
) -> None:
    network = fill(LucidrainsUNet(config()))
    path = training(tmp_path / "model-1.pt", diffusion(network, objective, gamma), None)
    model = load_lucidrains(path)
    x, t = scatter(2, 3, 16, 16), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        raw, found = network(x, 200 * t), model(x, t)
    assert torch.equal(found, raw)
    assert model.kind == {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}[objective]
    assert torch.equal(load_lucidrains(path, objective=objective)(x, t), found)
    other = {"pred_noise": "pred_v"}.get(objective, "pred_noise")
    with pytest.raises(ValueError, match=f"objective='{other}', .* is of {objective}"):
        load_lucidrains(path, objective=other)


def test_the_average_is_taken_where_there_is_one(tmp_path: Path) -> None:
    raw, average = fill(LucidrainsUNet(config())), LucidrainsUNet(config()).eval()
    states = [diffusion(network, "pred_noise") for network in (raw, average)]
    path = training(tmp_path / "model-1.pt", *states)
    x, t = scatter(1, 3, 16, 16), torch.tensor([0.3])
    with torch.no_grad():
        for ema, network in ((None, average), (True, average), (False, raw)):
            assert torch.equal(load_lucidrains(path, ema=ema)(x, t), network(x, 200 * t))
        path = training(tmp_path / "model-2.pt", states[0], None)
        assert torch.equal(load_lucidrains(path)(x, t), raw(x, 200 * t))
        bare = {f"module.{name}": value for name, value in states[0].items()}
        torch.save(bare, tmp_path / "bare.pt")
        assert torch.equal(load_lucidrains(tmp_path / "bare.pt")(x, t), raw(x, 200 * t))
    for name in ("model-2.pt", "bare.pt"):
        with pytest.raises(ValueError, match=rf"{name} holds no EMA"):
            load_lucidrains(tmp_path / name, ema=True)


def test_what_a_file_leaves_open_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    network = LucidrainsUNet(config())
    state = network.state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match="no betas: give schedule="):
        load_lucidrains(path, objective="pred_v")
    with pytest.raises(ValueError, match=r"objective= \(pred_noise, pred_x0, pred_v\)"):
        load_lucidrains(path, schedule=CHAIN)
    with pytest.raises(ValueError, match=r"objective .*pred_noise, pred_x0, pred_v, got 'v'"):
        load_lucidrains(path, objective="v")
    whole = diffusion(network, "pred_v")
    torch.save(whole, path)
    with pytest.raises(ValueError, match="holds its betas: leave schedule out"):
        load_lucidrains(path, schedule=CHAIN)
    torch.save(whole | {"loss_weight": torch.linspace(1, 2, 200)}, path)
    with pytest.raises(ValueError, match=r"loss_weight .* of no objective: give objective="):
        load_lucidrains(path)


def test_files_that_do_not_fit_say_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = dict(LucidrainsUNet(config()).state_dict())
    options = {"objective": "pred_v", "schedule": CHAIN}
    torch.save(state | {"time_mlp.0.weights": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match=r"Fourier features .*time_mlp\.0\.weights"):
        load_lucidrains(path, **options)
    torch.save({"init_conv.weight": torch.zeros(16, 3, 7, 7), "a.b": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"no U-Net .* lacks 'final_conv\.weight'; .*init_conv"):
        load_lucidrains(path, **options)
    del state["ups.0.1.block1.norm.g"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing: ups\.0\.1\.block1\.norm\.g"):
        load_lucidrains(path, **options)
    torch.save({"model": state, "ema": {"shadow.a": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"'ema' of .*ema_model\."):
        load_lucidrains(path)
    torch.save({"model": 3}, path)
    with pytest.raises(ValueError, match=r"'model' of .* int 3"):
        load_lucidrains(path)
    with pytest.raises(ValueError, match=r"divisible by 2, got \[1, 3, 15, 16\]"):
        LucidrainsUNet(config())(torch.zeros(1, 3, 15, 16), torch.zeros(1))
