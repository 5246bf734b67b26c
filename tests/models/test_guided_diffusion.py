"""Guided-diffusion checkpoints: names, shapes, counts, values of the released code, methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.filling import fill, sample, scatter
from torch import Tensor, nn

import coup_fast
from coup_fast.models.guided_diffusion import (
    CONFIGS,
    build_guided_diffusion,
    guided_diffusion_flags,
    load_guided_diffusion,
)
from coup_fast.models.guided_diffusion_net import GuidedDiffusionUNet

ADM = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 16,
    "learn_sigma": True,
    "resblock_updown": True,
}
NEW_ORDER = ADM | {
    "use_new_attention_order": True,
    "num_head_channels": -1,
    "num_heads": 2,
    "num_heads_upsample": 4,
}
IMPROVED = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "use_scale_shift_norm": False,
}

# Outputs of openai/guided-diffusion 22e0df8 (the first two) and openai/improved-diffusion 1bc7bbb
# for the weights of `fill`, at x = scatter(2, 3, side, side), t = 3 and 749.
KNOWN = {
    "adm": (
        ADM,
        0.443407923,
        (0.286309, -0.293315, -0.06718, 0.327984, -0.172168, -1.553566, 0.05694, 1.069128),
    ),
    "new order": (
        NEW_ORDER,
        0.44807896,
        (0.148943, -0.042486, 0.045048, 0.38933, -0.227723, -1.01663, 0.115894, 0.55022),
    ),
    "improved": (
        IMPROVED,
        0.512317479,
        (0.246814, 0.423981, -0.384973, -0.373303, 0.0342, -0.74883, 0.170633, -0.964227),
    ),
}


def saved(path: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", KNOWN)
def test_outputs_are_those_of_the_released_code(tmp_path: Path, name: str) -> None:
    flags, mean, values = KNOWN[name]
    network = fill(build_guided_diffusion(flags))
    model = load_guided_diffusion(saved(tmp_path / "model.pt", network), flags)
    side = flags["image_size"]
    with torch.no_grad():
        out = model(scatter(2, 3, side, side), torch.tensor([3, 749], dtype=torch.float64) / 1000)
    assert out.shape == (2, 6 if flags.get("learn_sigma") else 3, side, side)
    assert sample(out)[:8] == pytest.approx(list(values), abs=1e-5)
    assert out.abs().mean().item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "entries", "parameters"),
    [
        ("imagenet256", 566, 552_814_086),
        ("cifar10", 446, 52_546_438),
        ("imagenet64", 450, 121_063_942),
    ],
)
def test_published_networks_have_their_parameters(
    config: str, entries: int, parameters: int
) -> None:
    with torch.device("meta"):
        network = build_guided_diffusion(config)
    state = network.state_dict()
    assert len(state) == entries
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert list(state)[:3] == ["time_embed.0.weight", "time_embed.0.bias", "time_embed.2.weight"]
    assert list(state)[-1] == "out.2.bias"


def test_names_of_the_imagenet_network() -> None:
    """Entries of 256x256_diffusion_uncond.pt, one of each kind."""
    with torch.device("meta"):
        state = build_guided_diffusion("imagenet256").state_dict()
    expected = {
        "input_blocks.0.0.weight": [256, 3, 3, 3],
        "input_blocks.3.0.in_layers.2.weight": [256, 256, 3, 3],  # a residual block that halves
        "input_blocks.7.0.skip_connection.weight": [512, 256, 1, 1],
        "input_blocks.10.1.qkv.weight": [1536, 512, 1],
        "input_blocks.10.1.proj_out.bias": [512],
        "middle_block.1.norm.weight": [1024],
        "output_blocks.0.0.in_layers.0.weight": [2048],
        "output_blocks.2.2.emb_layers.1.weight": [2048, 1024],
        "output_blocks.17.0.out_layers.3.bias": [256],
        "out.2.weight": [6, 256, 3, 3],
    }
    assert {name: list(state[name].shape) for name in expected} == expected


def test_schedules_and_times(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", fill(build_guided_diffusion(ADM)))
    linear = load_guided_diffusion(path, ADM)
    assert linear.schedule == coup_fast.DiscreteSchedule()
    assert (linear.kind, linear.time_scale, linear.in_channels) == ("eps", 1000.0, 3)
    improved = {"diffusion_steps": 4000, "noise_schedule": "cosine", "rescale_timesteps": True}
    cosine = load_guided_diffusion(path, ADM | improved, predict_xstart=True)
    assert cosine.schedule == coup_fast.DiscreteSchedule.cosine(4000)
    assert (cosine.kind, cosine.time_scale) == ("x0", 1000.0)
    seen: list[float] = []
    cosine.network.time_embed.register_forward_pre_hook(
        lambda _, args: seen.append(float(args[0][0, 0]))
    )
    with torch.no_grad():
        cosine(scatter(1, 3, 16, 16), torch.from_numpy(cosine.schedule.index_time([2])))
    assert seen == pytest.approx([np.cos(0.5)])  # index 2 of 4000 is told as 0.5
    long = load_guided_diffusion(path, ADM, diffusion_steps=4000)
    assert long.schedule.betas[0] == 0.1 / 4000
    assert long.time_scale == 4000.0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("diffpure-imagenet", {"num_steps": 2}),
        ("ddpm", {"num_steps": 2, "variance": "learned"}),
        ("gdmp", {"rounds": 1, "t_star": 0.002, "variance": "learned"}),
    ],
)
def test_methods_run_on_a_loaded_network(tmp_path: Path, method: str, options: dict) -> None:
    path = saved(tmp_path / "model.pt", fill(build_guided_diffusion(ADM)))
    model = load_guided_diffusion(path, ADM)
    images = 0.5 + 0.4 * scatter(2, 3, 16, 16)
    images.requires_grad_()
    purified = coup_fast.Purifier(model, method=method, **options)(images)
    assert purified.shape == images.shape
    (gradient,) = torch.autograd.grad(purified.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_learned_variance_reaches_the_step(tmp_path: Path) -> None:
    """One ancestral step, in the formula of Nichol & Dhariwal (eq. 15), against the method's."""
    model = load_guided_diffusion(saved(tmp_path / "m.pt", fill(build_guided_diffusion(ADM))), ADM)
    images, noise = 0.5 + 0.3 * scatter(1, 3, 16, 16), scatter(2, 1, 3, 16, 16, salt=1)
    options = {"t_star": 0.5, "num_steps": 2, "variance": "learned", "forward_noise": False}
    with torch.no_grad():
        done = coup_fast.Purifier(model, method="ddpm", **options)(images, noise=noise)
        x = 2 * images - 1
        for index, after, z in ((499, 249, noise[0]), (249, -1, None)):
            x = _ancestral(model, x, index, after, z)
    torch.testing.assert_close(done, (x + 1) / 2, rtol=0, atol=2e-5)


def _ancestral(model: coup_fast.ScoreModel, x: Tensor, index: int, after: int, z: Tensor | None):
    level, low = (float(v) for v in model.schedule.alpha_bar([index, after]))
    eps, v = model(x, torch.tensor([index / 1000], dtype=torch.float64)).chunk(2, dim=1)
    beta = 1 - level / low
    clean = (x - (1 - level) ** 0.5 * eps) / level**0.5
    mean = (low**0.5 * beta * clean + (1 - beta) ** 0.5 * (1 - low) * x) / (1 - level)
    if z is None:
        return mean
    small, fraction = beta * (1 - low) / (1 - level), ((v + 1) / 2).clamp(0, 1)
    return mean + (0.5 * (fraction * np.log(beta) + (1 - fraction) * np.log(small))).exp() * z


def test_a_half_precision_torso_stays_near_the_full_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", fill(build_guided_diffusion(ADM)).half())
    full = load_guided_diffusion(path, ADM)
    half = load_guided_diffusion(path, ADM | {"use_fp16": True})
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert half.network.input_blocks[1][0].in_layers[2].weight.dtype == torch.float16
    assert half.network.input_blocks[1][0].in_layers[0].weight.dtype == torch.float32
    assert half.network.out[2].weight.dtype == torch.float32
    brain = load_guided_diffusion(path, ADM, torso=torch.bfloat16)
    x, t = scatter(1, 3, 16, 16), torch.tensor([0.1])
    with torch.no_grad():
        exact = full(x, t)
        for model, bound in ((half, 5e-3), (brain, 5e-2)):
            out = model(x, t)
            assert out.dtype == torch.float32
            assert 0 < (out - exact).abs().max() < bound * exact.abs().max()


def test_double_precision_is_double_throughout(tmp_path: Path) -> None:
    model = load_guided_diffusion(saved(tmp_path / "m.pt", fill(build_guided_diffusion(ADM))), ADM)
    x, t = scatter(1, 3, 16, 16), torch.tensor([0.1])
    with torch.no_grad():
        single, double = model(x, t), model.double()(x.double(), t)
        finer = model(x.double() + 1e-9, t) - double
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=0, atol=2e-5)
    assert 0 < finer.abs().max() < 1e-6  # lost wherever a layer went through float32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"class_cond": True}, "class_cond=True"),
        ({"noise_schedule": "sqrt"}, "noise_schedule .*linear, cosine, got 'sqrt'"),
        ({"timestep_respacing": "250"}, "timestep_respacing='250' .* num_steps"),
        ({"num_chanels": 3}, "num_chanels.* num_channels"),
        ({"image_size": 96}, "image_size 96 .*channel_mult"),
        ({"num_channels": 48}, "multiple of 32, got 48"),
        ({"num_head_channels": 48}, "num_heads=2, num_head_channels=48"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags: dict, words: str) -> None:
    plain = {"image_size": 64, "num_channels": 32, "timestep_respacing": "1000"}
    with pytest.raises(ValueError, match=words):
        build_guided_diffusion(plain | {"use_checkpoint": True} | flags)


def test_files_that_do_not_fit_say_what_was_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", build_guided_diffusion(ADM))
    with pytest.raises(ValueError, match=r"model\.pt .*num_channels=256, .* says 32; ") as caught:
        load_guided_diffusion(path)
    assert len(str(caught.value)) < 500
    state = build_guided_diffusion(ADM).state_dict()
    del state["middle_block.1.qkv.bias"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part\.pt .* 1 missing: middle_block\.1\.qkv\.bias"):
        load_guided_diffusion(tmp_path / "part.pt", ADM)
    torch.save({"state_dict": {}, "step": 3}, path)
    with pytest.raises(ValueError, match=r"\(state_dict, step\)"):
        load_guided_diffusion(path, ADM)
    with pytest.raises(ValueError, match=r"config .*imagenet256, cifar10.*'imagenet512'"):
        guided_diffusion_flags("imagenet512")
    with pytest.raises(ValueError, match=r"divisible by 2, got \[1, 3, 15, 16\]"):
        build_guided_diffusion(ADM)(torch.zeros(1, 3, 15, 16), torch.zeros(1))
    assert set(CONFIGS) == {"imagenet256", "cifar10", "imagenet64"}


# --- flags that the file answers

# What a state dict cannot say; the test gives all of it.
ASKED = {
    "num_head_channels": 16,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "predict_xstart": False,
}
# Networks of every shape that flags can make, small.
SHAPES = {
    "adm": ADM,
    "new order": NEW_ORDER,
    "improved": IMPROVED,
    "one level": ADM | {"channel_mult": "1", "attention_resolutions": "16"},
    "no attention": ADM | {"attention_resolutions": "", "num_res_blocks": 3},
    "attention everywhere": ADM | {"attention_resolutions": "16,8", "resblock_updown": False},
    "odd widths": ADM | {"channel_mult": "3,1,2", "attention_resolutions": "16,4"},
    "narrow": ADM | {"num_channels": 64, "channel_mult": "0.5,1", "learn_sigma": False},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_flags_are_read_from_the_file(tmp_path: Path, name: str, prefix: str) -> None:
    flags = SHAPES[name]
    network = fill(build_guided_diffusion(flags))
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    heads = ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order")
    model = load_guided_diffusion(
        tmp_path / "model.pt", None, **ASKED | {k: v for k, v in flags.items() if k in heads}
    )
    x, t = scatter(2, 3, 16, 16), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        assert torch.equal(model(x, t), network(x, 1000 * t))


def test_networks_of_grey_images_are_read(tmp_path: Path) -> None:
    network = fill(GuidedDiffusionUNet(in_channels=1, out_channels=2, model_channels=32,
                                       channel_mult=(1, 2), num_heads=2))  # fmt: skip
    path = saved(tmp_path / "model.pt", network)
    model = load_guided_diffusion(path, None, **ASKED | {"num_head_channels": -1, "num_heads": 2})
    with torch.no_grad():
        x, t = scatter(1, 1, 16, 16), torch.tensor([0.3])
        assert torch.equal(model(x, t), network(x, 1000 * t))
    assert model.in_channels == 1


@pytest.mark.parametrize("left_out", [*ASKED, "rescale_timesteps", "image_size", "everything"])
def test_what_the_file_cannot_say_is_asked_for(tmp_path: Path, left_out: str) -> None:
    path = saved(tmp_path / "model.pt", build_guided_diffusion(ADM))
    flags = ASKED | {"diffusion_steps": 4000, "rescale_timesteps": True}
    flags |= {"image_size": 16, "attention_resolutions": "8"}
    load_guided_diffusion(path, None, **flags)
    given = {} if left_out == "everything" else {k: v for k, v in flags.items() if k != left_out}
    if left_out == "diffusion_steps":
        del given["rescale_timesteps"]
    with pytest.raises(ValueError, match="give") as caught:
        load_guided_diffusion(path, None, **given)
    for name in [*ASKED] if left_out == "everything" else [left_out]:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_channels": 64}, "num_channels=64, where the file says 32"),
        ({"learn_sigma": False}, "learn_sigma=False, where the file says True"),
        ({"num_res_blocks": 2}, "num_res_blocks=2, where the file says 1"),
        ({"channel_mult": "1,2,2"}, "channel_mult='1,2,2', where the file says '1,2'"),
        ({"resblock_updown": False}, "resblock_updown=False, where the file says True"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm=False, where the file says True"),
        ({"attention_resolutions": "16,8"}, "attention_resolutions='16,8', .* says '8'"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, flags: dict, words: str) -> None:
    path = saved(tmp_path / "model.pt", build_guided_diffusion(ADM))
    with pytest.raises(ValueError, match=rf"model\.pt does not fit its flags: {words}\. config"):
        load_guided_diffusion(path, ADM | flags)
    given = {k: v for k, v in flags.items() if k != "attention_resolutions"}
    if given:
        with pytest.raises(ValueError, match=words):
            load_guided_diffusion(path, None, **ASKED, **given)


def test_networks_of_another_use_are_refused(tmp_path: Path) -> None:
    state = build_guided_diffusion(ADM).state_dict()
    for change, words in (
        ({"label_emb.weight": torch.zeros(10, 128)}, r"class_cond=True: it has label_emb"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "6 channels, .* upsamplers"),
        ({"output_blocks.4.0.x": torch.zeros(1)}, "no U-Net .*do not add up"),
    ):
        torch.save(state | change, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=rf"model\.pt .*{words}"):
            load_guided_diffusion(tmp_path / "model.pt", None)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model\.pt .*lacks 'time_embed\.0\.weight'.* conv\.weight"
    ):
        load_guided_diffusion(tmp_path / "model.pt")
