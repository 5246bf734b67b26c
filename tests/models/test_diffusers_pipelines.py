"""Pipelines of the real diffusers package: schedules, kinds, whole chains beside its schedulers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.filling import fill, scatter
from torch import Tensor, nn

import coup_fast
from coup_fast.models.at_vp_times import AtVPTimes
from coup_fast.models.diffusers_pipelines import (
    DISCRETE,
    NoiseOfScore,
    discrete_schedule,
    load_diffusers,
)

diffusers = pytest.importorskip("diffusers", reason="needs the diffusers package")

STEPS = 50


def unet(**options) -> nn.Module:
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return fill(diffusers.UNet2DModel(**settings | options))


def scheduler(name: str = "DDPMScheduler", **options):
    return getattr(diffusers, name)(num_train_timesteps=STEPS, **options)


def saved(folder: Path, network: nn.Module, noise) -> Path:
    kind = "ScoreSdeVePipeline" if "Ve" in type(noise).__name__ else "DDPMPipeline"
    getattr(diffusers, kind)(unet=network, scheduler=noise).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("variance", "clip"), [("fixed_small", False), ("fixed_large", True)], ids=["small", "large"]
)
def test_a_ddpm_chain_is_that_of_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str, variance: str, clip: bool
) -> None:
    options = {"prediction_type": prediction, "variance_type": variance, "clip_sample": clip}
    theirs = scheduler(beta_schedule="squaredcos_cap_v2", **options)
    network = unet()
    model = load_diffusers(saved(tmp_path / "pipeline", network, theirs))
    count, images = 20, 0.5 + 0.4 * scatter(2, 3, 8, 8)
    noise = torch.stack([scatter(2, 3, 8, 8, salt=k + 1) * 3**0.5 for k in range(count)])
    purifier = coup_fast.Purifier(
        model,
        method="ddpm",
        t_star=count / STEPS,
        variance=variance.replace("_", "-"),
        clip_denoised=clip,
    )
    with torch.no_grad():
        ours = purifier(images, noise=noise)
        x = theirs.add_noise(2 * images - 1, noise[0], torch.tensor([count - 1]))
        for k, index in enumerate(reversed(range(count))):
            given = noise[k + 1] if index else None
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=given, **__: z
            )
            x = theirs.step(network(x, index).sample, index, x).prev_sample
    torch.testing.assert_close(ours, (x + 1) / 2, rtol=1e-5, atol=1e-5)


def test_a_ddim_chain_is_that_of_diffusers(tmp_path: Path) -> None:
    theirs = scheduler("DDIMScheduler", clip_sample=False)
    network = unet()
    model = load_diffusers(saved(tmp_path / "pipeline", network, theirs))
    theirs.set_timesteps(STEPS)
    images, noise = 0.5 + 0.4 * scatter(2, 3, 8, 8), scatter(1, 2, 3, 8, 8, salt=1)
    with torch.no_grad():
        ours = coup_fast.Purifier(model, method="ddim", t_star=0.3)(images, noise=noise)
        x = theirs.add_noise(2 * images - 1, noise[0], torch.tensor([14]))
        for index in reversed(range(15)):
            x = theirs.step(network(x, index).sample, index, x).prev_sample
    torch.testing.assert_close(ours, (x + 1) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"beta_start": 1e-3, "beta_end": 0.05}),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear"}),
        ("PNDMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDPMScheduler", {"trained_betas": np.geomspace(1e-4, 0.3, STEPS).tolist()}),
    ],
)
def test_betas_are_those_of_the_scheduler(name: str, options: dict) -> None:
    theirs = scheduler(name, **options)
    pipeline = diffusers.DDPMPipeline(unet=unet(), scheduler=theirs)
    pipeline.register_modules(scheduler=theirs)
    model = load_diffusers(pipeline)
    assert model.time_scale == STEPS
    assert model.in_channels == 3
    np.testing.assert_allclose(model.schedule.betas, theirs.betas.numpy(), rtol=3e-6)
    levels = model.schedule.alpha_bar(np.arange(STEPS))
    np.testing.assert_allclose(levels, theirs.alphas_cumprod.numpy(), rtol=1e-4)


def test_networks_with_linear_betas_run_the_continuous_methods(tmp_path: Path) -> None:
    folder = saved(tmp_path / "pipeline", unet(), diffusers.DDPMScheduler())
    model = load_diffusers(folder)
    assert model.schedule == coup_fast.DiscreteSchedule()
    images = (0.5 + 0.4 * scatter(1, 3, 8, 8)).requires_grad_()
    purified = coup_fast.Purifier(model, method="diffpure", num_steps=2)(images)
    (gradient,) = torch.autograd.grad(purified.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_a_learned_variance_is_used_or_left_out(tmp_path: Path) -> None:
    network, theirs = unet(out_channels=6), scheduler(variance_type="learned_range")
    model = load_diffusers(saved(tmp_path / "pipeline", network, theirs))
    images, noise = 0.5 + 0.4 * scatter(1, 3, 8, 8), scatter(3, 1, 3, 8, 8, salt=1)
    done = [
        coup_fast.Purifier(model, method="ddpm", t_star=0.04, variance=variance)(
            images, noise=noise
        )
        for variance in ("learned", "fixed-small")
    ]
    assert not torch.allclose(*done, atol=1e-4)
    fixed = scheduler(prediction_type="v_prediction", variance_type="learned_range")
    velocity = load_diffusers(diffusers.DDPMPipeline(unet=network, scheduler=fixed))
    learned = coup_fast.Purifier(velocity, method="ddpm", t_star=0.04, variance="learned")
    assert learned(images, noise=noise).isfinite().all()


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_runs_the_steps_of_its_scheduler(tmp_path: Path, invert: bool, shift: float) -> None:
    """Where diffusers is given the levels of our run, its Euler steps end at the same image."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=invert)
    network = unet()
    model = load_diffusers(saved(tmp_path / "pipeline", network, theirs))
    assert model.schedule == coup_fast.FlowSchedule(data_at=1 if invert else 0)
    purifier = coup_fast.Purifier(model, method="ddim", num_steps=5)
    images, noise = 0.5 + 0.4 * scatter(2, 3, 8, 8), scatter(1, 2, 3, 8, 8, salt=1)
    share = 1 - purifier.plan.times if invert else purifier.plan.times  # of noise
    theirs.set_timesteps(sigmas=(share / (shift - (shift - 1) * share)).tolist())  # shift undone
    with torch.no_grad():
        ours = purifier(images, noise=noise)
        x = share[0] * noise[0] + (1 - share[0]) * (2 * images - 1)
        for t in theirs.timesteps:
            x = theirs.step(network(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(theirs.timesteps.double(), 1000 * torch.tensor(purifier.plan.times))
    torch.testing.assert_close(ours, (x.float() + 1) / 2, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(purifier(images.requires_grad_()).sum(), images)[0]
    assert gradient.isfinite().all()


class Gaussian(nn.Module):
    """Score network of pixels N(mean, spread²) under noise σ, in the manner of a UNet2DModel."""

    config: dict = {"in_channels": 3, "out_channels": 3}  # noqa: RUF012

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread

    def forward(self, y: Tensor, sigma: Tensor):
        variance = self.spread**2 + sigma.reshape(-1, 1, 1, 1) ** 2
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=(self.mean - y) / variance)


def test_an_exploding_score_becomes_the_noise_of_a_vp_process() -> None:
    """Pixels N(m, s²) are N(√ᾱ(2m - 1), 4 ᾱ s² + σ²) in the VP process; its score is known."""
    mean, spread, schedule = 0.6, 0.3, coup_fast.VPSchedule()
    network = AtVPTimes(NoiseOfScore(Gaussian(mean, spread), 1e-6, 1e3), schedule)
    x = 2 * scatter(3, 3, 8, 8).double()
    t = torch.tensor([0.01, 0.1, 0.7], dtype=torch.float64)
    alpha_bar = torch.from_numpy(schedule.alpha_bar(t.numpy())).reshape(3, 1, 1, 1)
    variance = 4 * alpha_bar * spread**2 + 1 - alpha_bar
    score = (alpha_bar.sqrt() * (2 * mean - 1) - x) / variance
    torch.testing.assert_close(network(x, t), -(1 - alpha_bar).sqrt() * score)


def test_an_exploding_pipeline_is_asked_at_its_own_noise(tmp_path: Path) -> None:
    theirs = diffusers.ScoreSdeVeScheduler(sigma_min=0.05, sigma_max=2.0)
    network = unet(time_embedding_type="fourier")
    model = load_diffusers(saved(tmp_path / "pipeline", network, theirs))
    assert (model.kind, model.schedule) == ("eps", coup_fast.VPSchedule())
    asked: list[float] = []
    model.network.network.network.register_forward_pre_hook(
        lambda _, args: asked.extend(args[1].tolist())
    )
    clean, z, sigma = 0.5 + 0.4 * scatter(2, 3, 8, 8), scatter(2, 3, 8, 8, salt=1), 0.2
    t = coup_fast.VPSchedule().time_of(1 / (1 + 4 * sigma**2))
    signal = (1 + 4 * sigma**2) ** -0.5
    x = signal * (2 * clean - 1) + (1 - signal**2) ** 0.5 * z
    with torch.no_grad():
        out = model(x, torch.tensor([t, t], dtype=torch.float64))
        score = network(clean + sigma * z, torch.tensor([sigma, sigma])).sample
        model(x, torch.tensor([1e-5, 1.0]))
    torch.testing.assert_close(out, -sigma * score, rtol=0, atol=1e-4)
    assert asked == pytest.approx([0.2, 0.2, 0.05, 2.0])  # outside of its range: the nearest
    done = coup_fast.Purifier(model, method="diffpure", num_steps=2)(clean)
    assert done.isfinite().all()


@pytest.mark.parametrize(
    ("network", "noise", "words"),
    [
        ({}, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({}, {"beta_schedule": "laplace"}, "beta_schedule .*'laplace'"),
        ({}, {"prediction_type": "flow"}, "flow matching .*prediction_type='flow'"),
        ({}, {"prediction_type": "score"}, "prediction_type .*'score'"),
        ({"num_class_embeds": 10}, {}, "num_class_embeds=10"),
        ({"class_embed_type": "timestep"}, {}, "class_embed_type='timestep'"),
        ({"out_channels": 6}, {"variance_type": "learned"}, "out_channels=6 .*'learned'"),
        ({"out_channels": 6}, {}, "out_channels=6 .*'fixed_small'"),
        ({"out_channels": 4}, {}, "out_channels=4 .*in_channels=3"),
        ({}, {"trained_betas": [0.1, 0.2]}, r"trained_betas .*\[2\].* 50"),
    ],
)
def test_fields_that_are_not_supported_are_named(network: dict, noise: dict, words: str) -> None:
    pipeline = diffusers.DDPMPipeline(unet=unet(**network), scheduler=scheduler(**noise))
    with pytest.raises(ValueError, match=words):
        load_diffusers(pipeline)


def test_other_pipelines_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "pipeline", unet(), scheduler())
    index = json.loads((folder / "model_index.json").read_text())
    latent = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index | latent))
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline .*AutoencoderKL.* supported"):
        load_diffusers(folder)
    consistency = index | {"scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(consistency))
    with pytest.raises(ValueError, match=r"CMStochasticIterativeScheduler.* supported"):
        load_diffusers(folder)
    own = index | {"unet": ["my_code", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match=r"my_code\.UNet2DModel.* supported"):
        load_diffusers(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load_diffusers(folder)
    with pytest.raises(FileNotFoundError, match="absent "):
        load_diffusers(tmp_path / "absent", local_files_only=True)
    with pytest.raises(ValueError, match=r"source .*int"):
        load_diffusers(3)
    with pytest.raises(ValueError, match=r"unet .*UNet2DModel, got Linear"):
        load_diffusers(_Parts(nn.Linear(1, 1), scheduler()))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("CMStochasticIterativeScheduler", {}, "^scheduler CMStochastic.* is not supported"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "UniPC.* is set to flow matching"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ("UniPCMultistepScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_schedulers_of_other_networks_are_refused(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_diffusers(_Parts(unet(), scheduler(name, **options)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", DISCRETE)
def test_a_swapped_scheduler_holds_the_chain(tmp_path: Path, name: str) -> None:
    """DDPM's betas survive `from_config`, in memory and on disk; unusual ones, to tell them."""
    network = unet()
    first = scheduler(beta_start=2e-4, beta_end=0.03, prediction_type="v_prediction")
    pipeline = diffusers.DDPMPipeline(unet=network, scheduler=first)
    wanted = load_diffusers(pipeline)
    pipeline.register_modules(scheduler=getattr(diffusers, name).from_config(first.config))
    pipeline.save_pretrained(tmp_path / "swapped")
    x, t = scatter(2, 3, 8, 8), torch.tensor([0.2, 0.6])
    for source in (pipeline, tmp_path / "swapped"):
        found = load_diffusers(source)
        assert found.schedule == wanted.schedule
        with torch.no_grad():
            assert torch.equal(found(x, t), wanted(x, t))
    betas = pipeline.scheduler.betas.numpy()
    np.testing.assert_allclose(found.schedule.betas, betas, rtol=3e-6)


def test_an_euler_chain_of_diffusers_is_ddim(tmp_path: Path) -> None:
    """Euler's step on x/√ᾱ along σ is DDIM's, so a swapped scheduler can be compared as it runs."""
    network, theirs = unet(), scheduler("EulerDiscreteScheduler", timestep_spacing="leading")
    model = load_diffusers(saved(tmp_path / "pipeline", network, theirs))
    theirs.set_timesteps(STEPS)
    images, noise = 0.5 + 0.4 * scatter(2, 3, 8, 8), scatter(1, 2, 3, 8, 8, salt=1)
    with torch.no_grad():
        ours = coup_fast.Purifier(model, method="ddim", t_star=0.3)(images, noise=noise)
        x = theirs.add_noise(2 * images - 1, noise[0], torch.tensor([14.0, 14.0]))
        for index in reversed(range(15)):
            out = network(theirs.scale_model_input(x, index), index).sample
            x = theirs.step(out, torch.tensor(float(index)), x).prev_sample
    torch.testing.assert_close(ours, (x + 1) / 2, rtol=1e-5, atol=1e-5)


def test_bare_networks_with_their_scheduler(tmp_path: Path) -> None:
    network, noise = unet(), scheduler(beta_start=2e-4)
    wanted = load_diffusers(diffusers.DDPMPipeline(unet=network, scheduler=noise))
    network.save_pretrained(tmp_path / "unet")
    noise.save_pretrained(tmp_path / "noise")
    saved(tmp_path / "pipeline", network, noise)
    x, t = scatter(2, 3, 8, 8), torch.tensor([0.2, 0.6])
    for source in (network, tmp_path / "unet", str(tmp_path / "pipeline" / "unet")):
        for given in (noise, tmp_path / "noise", tmp_path / "pipeline"):
            found = load_diffusers(source, scheduler=given)
            assert found.schedule == wanted.schedule
            assert not found.network.training
            with torch.no_grad():
                assert torch.equal(found(x, t), wanted(x, t))
    other = load_diffusers(tmp_path / "pipeline", scheduler=scheduler(beta_start=3e-4))
    assert other.schedule.betas[0] == 3e-4
    with pytest.raises(ValueError, match=r"UNet2DModel does not say .*scheduler=DDPMScheduler\(\)"):
        load_diffusers(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"^scheduler must be .* got DiscreteSchedule"):
        load_diffusers(network, scheduler=coup_fast.DiscreteSchedule())
    with pytest.raises(FileNotFoundError, match=r"scheduler=.*unet.*scheduler_config\.json"):
        load_diffusers(network, scheduler=tmp_path / "unet")
    flow = load_diffusers(network, scheduler=diffusers.FlowMatchHeunDiscreteScheduler())
    assert (flow.kind, flow.schedule.data_at) == ("velocity", 0)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    config["_class_name"] = "UNet2DConditionModel"
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unet holds a UNet2DConditionModel; .*UNet2DModel"):
        load_diffusers(tmp_path / "unet", scheduler=noise)


class _Parts:
    def __init__(self, network: nn.Module, noise: object) -> None:
        self.unet, self.scheduler = network, noise


def test_half_precision_and_the_chain_of_a_config() -> None:
    pipeline = diffusers.DDPMPipeline(
        unet=unet(), scheduler=scheduler(prediction_type="v_prediction")
    )
    exact = load_diffusers(pipeline)(scatter(1, 3, 8, 8), torch.tensor([0.2]))
    half = load_diffusers(pipeline, dtype=torch.bfloat16)
    out = half(scatter(1, 3, 8, 8), torch.tensor([0.2]))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.1)
    assert discrete_schedule(pipeline.scheduler.config).num_steps == STEPS


def test_a_scheduler_in_place_of_a_schedule_names_the_loader() -> None:
    with pytest.raises(TypeError, match=r"^schedule .* got DDPMScheduler; use .*load_diffusers"):
        coup_fast.ScoreModel(unet(), schedule=scheduler())
