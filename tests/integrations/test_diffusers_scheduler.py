"""`CoupScheduler` in loops and pipelines of the real diffusers, beside the `Purifier`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, images
from torch import Tensor

import coup_fast

diffusers = pytest.importorskip("diffusers")
from coup_fast.integrations.diffusers import CoupScheduler  # noqa: E402

METHODS = [name for name in SHORT if name != "adp"]
OPTIONS: dict[str, dict[str, Any]] = {name: dict(SHORT[name][1]) for name in METHODS}


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return network.eval().requires_grad_(False)


def call(unet: Any, x: Tensor, t: Tensor) -> Tensor:
    """The network in one layout: torch's convolutions differ in the last bits between layouts."""
    return unet(x.contiguous(), t).sample


def run(scheduler: CoupScheduler, unet: Any, u: Tensor, **source: Any) -> Tensor:
    """A pipeline's loop, with the guidance that COUP adds to it."""
    classifier = TinyClassifier().requires_grad_(False)
    with torch.no_grad():
        x = scheduler.start(u, **source)
        for t in scheduler.timesteps:
            out = call(unet, scheduler.scale_model_input(x, t), t)
            guidance = scheduler.confidence_gradient(classifier, x)
            step = scheduler.step(out, t, x, guidance=guidance, reference=2 * u - 1, **source)
            x = step.prev_sample
    return x / 2 + 0.5


@pytest.mark.parametrize("time_scale", [None, 999.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_gives_the_purifiers_bits(method: str, time_scale: float | None, unet: Any) -> None:
    options = OPTIONS[method]
    u = images(2)
    kind = SHORT[method][0]
    scheduler = CoupScheduler(
        method=method,
        options=options,
        time_scale=time_scale,
        prediction_type={"eps": "epsilon", "score": "score"}[kind],
    )
    result = run(scheduler, unet, u, keys=scheduler.noise_keys(u, seed=3, draw=1))
    schedule = coup_fast.DiscreteSchedule() if time_scale is None else coup_fast.VPSchedule()
    network = partial(call, unet)
    model = coup_fast.ScoreModel(network, kind, schedule, time_scale=time_scale or 1000)
    purifier = coup_fast.Purifier(model, TinyClassifier(), method=method, seed=3, **options)
    assert torch.equal(result, purifier(u, draw=1))


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("method", ["coup", "ddim", "flowpure"])
def test_velocities_give_the_purifiers_bits(method: str, prediction: str, unet: Any) -> None:
    options = OPTIONS[method]
    u = images(2)
    scheduler = CoupScheduler(method=method, options=options, prediction_type=prediction)
    result = run(scheduler, unet, u, keys=scheduler.noise_keys(u))
    flow = prediction == "flow_prediction"
    kind, schedule = (
        ("velocity", coup_fast.FlowSchedule(data_at=0))
        if flow
        else ("v", coup_fast.DiscreteSchedule())
    )
    model = coup_fast.ScoreModel(partial(call, unet), kind, schedule, time_scale=1000)
    purifier = coup_fast.Purifier(model, TinyClassifier(), method=method, **options)
    assert torch.equal(result, purifier(u))
    if flow:  # the state of the same image and noise, on the path and in the scheduler
        z = torch.randn_like(u)
        t = torch.tensor([100.0, 700.0])
        share = (t / 1000).reshape(2, 1, 1, 1)
        state = scheduler.scale_model_input(scheduler.add_noise(u, z, t), t)
        torch.testing.assert_close(state, (1 - share) * u + share * z)


def test_the_published_defaults_are_the_methods() -> None:
    scheduler = CoupScheduler(time_scale=999.0)
    assert len(scheduler.timesteps) == 100
    assert scheduler.timesteps[0].item() == pytest.approx(99.9)
    assert scheduler.guided
    by_index = CoupScheduler(method="ddpm")
    assert by_index.timesteps.tolist() == list(range(499, -1, -1))
    by_index.set_timesteps(10)
    assert len(by_index.timesteps) == by_index.num_inference_steps == 10


def test_it_lives_in_a_pipeline(unet: Any, tmp_path: Path) -> None:
    """diffusers' own DDPMPipeline draws samples with it, saves it and loads it."""
    scheduler = CoupScheduler.from_config(
        diffusers.DDPMScheduler().config, method="diffpure", options={"t_star": 1.0}
    )
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(pipe: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        return pipe(2, generator, num_inference_steps=4, output_type="np").images

    first = sample(pipeline)
    assert first.shape == (2, 8, 8, 3)
    pipeline.save_pretrained(tmp_path)
    loaded = CoupScheduler.from_pretrained(tmp_path / "scheduler")
    assert loaded.config.method == "diffpure"
    assert loaded.config.options == {"t_star": 1.0}
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, CoupScheduler)
    again.set_progress_bar_config(disable=True)
    assert sample(again) == pytest.approx(first, abs=1e-4)


def test_it_is_as_good_a_sampler_as_diffusers_own(unet: Any) -> None:
    """Over the whole time, method ddpm is DDPMScheduler's ancestral sampling, noise for noise."""
    theirs = diffusers.DDPMScheduler(clip_sample=False)
    ours = CoupScheduler.from_config(theirs.config, method="ddpm", options={"t_star": 0.02})
    x = y = torch.randn(2, 3, 8, 8)
    a, b = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in ours.timesteps:
            x = theirs.step(unet(x, t).sample, t, x, generator=a).prev_sample
            y = ours.step(unet(y, t).sample, t, y, generator=b).prev_sample
    assert torch.allclose(x, y, atol=1e-4)


def test_it_is_differentiable(unet: Any) -> None:
    scheduler = CoupScheduler(method="diffpure", options={"num_steps": 2})
    u = images(1).requires_grad_()
    keys = scheduler.noise_keys(u)
    x = scheduler.start(u, keys=keys)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, keys=keys).prev_sample
    (slope,) = torch.autograd.grad((x / 2 + 0.5).sum(), u)
    model = coup_fast.ScoreModel(unet, schedule=coup_fast.DiscreteSchedule(), time_scale=1000)
    purifier = coup_fast.Purifier(model, method="diffpure", num_steps=2, gradient="autograd")
    (expected,) = torch.autograd.grad(purifier(u).sum(), u)
    assert torch.allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_forward_diffusion_is_diffusers(unet: Any) -> None:
    x, noise, t = images(3), torch.randn(3, 3, 8, 8), torch.tensor([0, 99, 999])
    ours = CoupScheduler().add_noise(x, noise, t)
    assert torch.allclose(ours, diffusers.DDPMScheduler().add_noise(x, noise, t), atol=1e-6)
    level = torch.as_tensor(coup_fast.VPSchedule().alpha_bar(0.5)).float()
    later = CoupScheduler(time_scale=999.0).add_noise(x, noise, torch.full((3,), 499.5))
    assert torch.allclose(later, level.sqrt() * x + (1 - level).sqrt() * noise, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_noise_schedules_are_read_as_diffusers_reads_them(name: str) -> None:
    betas = diffusers.DDPMScheduler(beta_schedule=name).betas
    for options in ({"beta_schedule": name}, {"trained_betas": betas.tolist()}):
        ours = CoupScheduler(method="ddim", **options)
        assert torch.allclose(torch.tensor(ours.schedule.betas), betas, rtol=1e-4)


def test_half_precision_samples_keep_their_type() -> None:
    scheduler = CoupScheduler(method="diffpure", options={"num_steps": 2})
    x = torch.randn(1, 3, 8, 8).half()
    t = scheduler.timesteps[0]
    (result,) = scheduler.step(x, t, x, noise=torch.zeros(1, 3, 8, 8), return_dict=False)
    assert result.dtype == torch.float16
    scheduler.set_timesteps(2)
    wide = scheduler.step(x, t, x.float(), noise=torch.zeros(1, 3, 8, 8)).prev_sample
    assert torch.equal(result, wide.half())


def test_what_cannot_be_stepped_is_refused() -> None:
    with pytest.raises(ValueError, match=r"coup_fast\.Purifier"):
        CoupScheduler(method="adp")
    with pytest.raises(ValueError, match=r"prediction_type .*'noise'"):
        CoupScheduler(prediction_type="noise")
    with pytest.raises(ValueError, match=r"beta_schedule .*'cosine'"):
        CoupScheduler(beta_schedule="cosine")
    with pytest.raises(ValueError, match=r"'t_stra'.* t_star"):
        CoupScheduler(options={"t_stra": 1})
    scheduler = CoupScheduler(options={"num_steps": 2})
    x, (first, second) = torch.zeros(1, 3, 8, 8), scheduler.timesteps
    with pytest.raises(ValueError, match="guidance="):
        scheduler.step(x, first, x)
    with pytest.raises(ValueError, match="timestep 100, got 50"):
        scheduler.step(x, second, x, guidance=x)
    with pytest.raises(ValueError, match=r"generator, keys .*noise"):
        scheduler.step(x, first, x, guidance=x, generator=torch.Generator(), noise=x)
    scheduler.step(x, first, x, guidance=x)
    scheduler.step(x, second, x, guidance=x)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, second, x, guidance=x)
    looking_back = CoupScheduler(method="ldsde")
    with pytest.raises(ValueError, match="reference="):
        looking_back.step(x, looking_back.timesteps[0], x)
