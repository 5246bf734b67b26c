"""DiffPure's runners by name, called as its evaluation scripts call them.

The originals' licence does not let their code stand here: what they compute is written out with
torchsde from the papers' formulas, and the scripts' model class from its interface.
"""

from __future__ import annotations

import itertools
import math
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

import coup_fast
from coup_fast.integrations import diffpure, diffpure_files
from coup_fast.models import ddpm_net, guided_diffusion, score_sde

RUNNERS = {
    "ddpm": diffpure.GuidedDiffusion,
    "sde": diffpure.RevGuidedDiffusion,
    "ode": diffpure.OdeGuidedDiffusion,
    "ldsde": diffpure.LDGuidedDiffusion,
    "celebahq-ddpm": diffpure.Diffusion,
}


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    """What the scripts' parser gives, with a short run."""
    return Namespace(
        t=5,
        sample_step=1,
        rand_t=False,
        t_delta=15,
        use_bm=False,
        score_type="score_sde",
        log_dir=str(tmp_path),
        seed=1234,
        sigma2=1e-3,
        lambda_ld=1e-2,
        eta=5.0,
        step_size=1e-3,
    )


@pytest.fixture
def config() -> Namespace:
    model = Namespace(learn_sigma=True, timestep_respacing="1000", var_type="fixedsmall")
    return Namespace(data=Namespace(dataset="CIFAR10"), model=model, device=torch.device("cpu"))


def discrete(out: int = 3) -> coup_fast.ScoreModel:
    schedule = coup_fast.DiscreteSchedule()
    return coup_fast.ScoreModel(TinyNetwork(out=out), schedule=schedule, time_scale=1000)


def model_for(name: str) -> coup_fast.ScoreModel:
    if name == "ddpm":
        return discrete(out=6)
    return discrete() if name == "celebahq-ddpm" else coup_fast.ScoreModel(TinyNetwork())


class SdeAdvModel(nn.Module):
    """The model of the evaluation scripts: [-1, 1] for the runner, a counter for its batches."""

    def __init__(self, args: Namespace, config: Namespace, name: str, **options: Any) -> None:
        super().__init__()
        self.classifier = TinyClassifier().to(config.device)
        options = {"score_model": model_for(name)} | options
        self.runner = RUNNERS[name](args, config, device=config.device, **options)
        self.register_buffer("counter", torch.zeros(1, device=config.device))
        self.tag: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        counter = self.counter.item()
        cleaned = self.runner.image_editing_sample((x - 0.5) * 2, bs_id=counter, tag=self.tag)
        self.counter += 1
        return self.classifier((cleaned + 1) * 0.5)


METHODS = {
    "ddpm": ("ddpm", {"variance": "learned", "clip_denoised": True}),
    "sde": ("diffpure", {}),
    "ode": ("vp-ode", {}),
    "ldsde": ("ldsde", {}),
    "celebahq-ddpm": ("ddpm", {}),
}


@pytest.mark.parametrize("name", RUNNERS)
def test_the_scripts_model_runs(
    name: str, args: Namespace, config: Namespace, tmp_path: Path
) -> None:
    """Its logits are those of our own purifier, and the first two batches leave their files."""
    if name == "ldsde":
        args.t = 50
    model = SdeAdvModel(args, config, name, fresh_draws=False).eval()
    model.tag = "run"
    x = images(3)
    with torch.no_grad():
        logits = [model(x) for _ in range(3)]
        method, options = METHODS[name]
        clean = coup_fast.purify(
            x, model_for(name), method=method, t_star=args.t / 1000, seed=1234, **options
        )
        expected = model.classifier(clean)
    for row in logits:
        assert torch.allclose(row, expected, atol=1e-4)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["bs0.0_run", "bs1.0_run"]
    files = sorted(path.name for path in (tmp_path / "bs0.0_run").iterdir())
    assert files == ["init_0.png", "original_input.png", "samples_0.png", "samples_0.pth"]
    saved = torch.load(tmp_path / "bs1.0_run" / "samples_0.pth", weights_only=True)
    assert torch.allclose(saved, 2 * clean - 1, atol=1e-5)


def test_pictures_show_the_images(args: Namespace, config: Namespace, tmp_path: Path) -> None:
    from PIL import Image

    x = 2 * images(9) - 1
    runner = diffpure.RevGuidedDiffusion(args, config, "cpu", score_model=model_for("sde"))
    runner.image_editing_sample(x, bs_id=0, tag="a")
    with Image.open(tmp_path / "bs0_a" / "original_input.png") as image:
        picture = np.asarray(image)
    assert picture.shape == (2 * 10 + 2, 8 * 10 + 2, 3)
    ninth = ((x[8] + 1) / 2 * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(picture[12:20, 2:10].astype(int) - ninth).max() <= 1
    assert picture[12:, 12:].max() == 0
    runner.image_editing_sample(x, bs_id=2, tag="a")
    quiet = diffpure.RevGuidedDiffusion(
        args, config, "cpu", score_model=model_for("sde"), pictures=False
    )
    quiet.image_editing_sample(x, bs_id=0, tag="b")
    assert [path.name for path in tmp_path.iterdir()] == ["bs0_a"]
    random.seed(3)
    runner.image_editing_sample(x, bs_id=1)
    random.seed(3)
    assert (tmp_path / f"bs1_rnd{random.randint(0, 10000)}").is_dir()


# --- the numbers, beside torchsde


class ReverseVp(nn.Module):
    """dx = (½βx + β s) dτ + √β dw with τ = 1 - t: the reverse VP-SDE as torchsde wants it."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def f(self, tau: Tensor, flat: Tensor) -> Tensor:
        t = 1 - float(tau)
        x = flat.reshape(self.shape)
        beta, sigma = 0.1 + 19.9 * t, math.sqrt(1 - math.exp(-9.95 * t * t - 0.1 * t))
        noise = self.network(x, torch.full((len(x),), 999 * t))
        return (0.5 * beta * x - beta * noise / sigma).flatten(1)

    def g(self, tau: Tensor, flat: Tensor) -> Tensor:
        return torch.full_like(flat, math.sqrt(0.1 + 19.9 * (1 - float(tau))))


def test_rounds_agree_with_torchsde(args: Namespace, config: Namespace) -> None:
    """Two rounds, each from the other's result, on torchsde's own Brownian motion."""
    torchsde = pytest.importorskip("torchsde")
    args.t, args.sample_step = 20, 2
    x = 2 * images(2) - 1
    network = TinyNetwork()
    betas = np.linspace(0.1, 20, 1000) / 1000
    level = float(np.cumprod(1 - betas)[args.t - 1])
    t0, t1 = 1 - args.t / 1000, 1 - 1e-5
    state, expected, noise = x, [], []
    for entropy in (1, 2):
        forward = torch.randn(x.shape, generator=torch.Generator().manual_seed(entropy))
        start = math.sqrt(level) * state + math.sqrt(1 - level) * forward
        motion = torchsde.BrownianInterval(t0, t1, size=(2, x[0].numel()), entropy=entropy)
        times = torch.tensor([t0, t1], dtype=torch.float64)
        with torch.no_grad():
            path = torchsde.sdeint(
                ReverseVp(network, x.shape), start.flatten(1), times, bm=motion, dt=1e-3,
                method="euler",
            )  # fmt: skip
        state = path[-1].reshape(x.shape)
        expected.append(state)
        grid = [t0 + 1e-3 * k for k in range(args.t)] + [t1]
        steps = [
            motion(a, b).reshape(x.shape) / math.sqrt(b - a) for a, b in itertools.pairwise(grid)
        ]
        noise.append(torch.stack([forward, *steps]))
    runner = diffpure.RevGuidedDiffusion(
        args, config, "cpu", score_model=coup_fast.ScoreModel(network)
    )
    result = runner.image_editing_sample(x, bs_id=2, noise=noise)
    assert result.shape == (4, 3, 8, 8)
    assert torch.allclose(result, torch.cat(expected), atol=2e-5)


def test_a_random_level_changes_the_forward_noise_alone(
    args: Namespace, config: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    args.t, args.rand_t, args.t_delta = 20, True, 5
    monkeypatch.setattr(np.random, "randint", lambda low, high: {(-5, 5): -4}[low, high])
    x = 2 * images(2) - 1
    noise = torch.randn(21, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    runner = diffpure.RevGuidedDiffusion(args, config, "cpu", score_model=model_for("sde"))
    result = runner.image_editing_sample(x, bs_id=2, noise=[noise])
    level = float(np.cumprod(1 - np.linspace(0.1, 20, 1000) / 1000)[15])
    start = math.sqrt(level) * x + math.sqrt(1 - level) * noise[0]
    rest = coup_fast.Purifier(
        model_for("sde"), t_star=0.02, guidance_scale=0.0, clamp_output=False, check_values=False
    )
    rest.plan.start[[4, 5]] = -np.inf, np.inf  # COUP clamps what it starts from
    assert torch.allclose(result, 2 * rest((start + 1) / 2, noise=noise[1:]) - 1, atol=1e-5)
    args.t = 3
    with pytest.raises(ValueError, match=r"args\.t=3 .*args\.t_delta=5"):
        runner.image_editing_sample(x, bs_id=2)


def test_ode_with_fixed_noise_gives_all_images_the_same(args: Namespace, config: Namespace) -> None:
    args.fix_rand = True
    x = (2 * images(1) - 1).expand(3, -1, -1, -1)
    runner = diffpure.OdeGuidedDiffusion(args, config, "cpu", score_model=model_for("ode"))
    result = runner.image_editing_sample(x, bs_id=2)
    assert torch.allclose(result[0], result[2], atol=1e-6)
    torch.manual_seed(args.seed)
    first = torch.FloatTensor(1, 3, 8, 8).normal_()
    by_hand = runner.image_editing_sample(x, bs_id=2, noise=[first.expand(3, -1, -1, -1)[None]])
    assert torch.equal(result, by_hand)
    args.step_size = 2.5e-3
    assert not torch.allclose(runner.image_editing_sample(x, bs_id=2), result, atol=1e-5)
    assert runner.purifier is not None
    assert runner.purifier.plan.num_steps == 2


# --- noise and gradients


def test_torchs_seed_decides_the_noise(args: Namespace, config: Namespace) -> None:
    model = SdeAdvModel(args, config, "sde", pictures=False)
    x = images(2)
    torch.manual_seed(0)
    first, second = model(x), model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), first)
    assert not torch.allclose(first, second, atol=1e-4)


def test_the_gradient_is_the_runs_own(args: Namespace, config: Namespace) -> None:
    gradients = []
    for gradient in ("exact", "autograd"):
        model = SdeAdvModel(
            args, config, "sde", pictures=False, fresh_draws=False, gradient=gradient
        )
        x = images(2).requires_grad_()
        (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
        gradients.append(slope)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3
    for name in ("ddpm", "celebahq-ddpm"):
        runner = SdeAdvModel(args, config, name, pictures=False).runner
        assert not runner.image_editing_sample(images(2).requires_grad_()).requires_grad


# --- checkpoints and refusals


@pytest.mark.parametrize(
    ("dataset", "kind", "loader"),
    [
        ("CIFAR10", "score_sde", score_sde),
        ("ImageNet", "guided_diffusion", guided_diffusion),
    ],
)
def test_checkpoints_are_read_from_the_scripts_places(
    dataset: str,
    kind: str,
    loader: Any,
    args: Namespace,
    config: Namespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config.data.dataset, args.score_type = dataset, kind
    path = diffpure_files.CHECKPOINTS[kind]
    with pytest.raises(FileNotFoundError, match=str(path)):
        diffpure.RevGuidedDiffusion(args, config, "cpu")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    seen = []

    def load(given: Path, *_: Any, **__: Any) -> coup_fast.ScoreModel:
        seen.append(given)
        return model_for("sde")

    monkeypatch.setattr(loader, f"load_{kind}", load)
    runner = diffpure.RevGuidedDiffusion(args, config, "cpu")
    assert seen == [path]
    assert isinstance(runner.model, TinyNetwork)
    assert runner.betas[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])


def test_the_flags_of_the_configuration_build_the_imagenet_network(
    args: Namespace, config: Namespace, tmp_path: Path
) -> None:
    """A checkpoint of guided diffusion, small, with flags as in the scripts' imagenet.yml."""
    flags = {
        "image_size": 32,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1",
        "attention_resolutions": "8",
        "num_head_channels": 32,
        "learn_sigma": True,
        "resblock_updown": True,
        "rescale_timesteps": True,
        "timestep_respacing": "1000",
        "use_scale_shift_norm": True,
    }
    network = guided_diffusion.build_guided_diffusion(flags)
    torch.save(network.state_dict(), tmp_path / "256x256_diffusion_uncond.pt")
    config.data.dataset, args.score_type, args.t = "ImageNet", "guided_diffusion", 2
    config.model = Namespace(**flags)
    runner = diffpure.GuidedDiffusion(args, config, "cpu", model_dir=tmp_path)
    assert runner.image_editing_sample(images(1), bs_id=2).isfinite().all()
    for a, b in zip(runner.model.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_celebahq_network_is_read_from_the_folder_of_torch_hub(
    args: Namespace, config: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint as SDEdit's `celeba_hq.ckpt`, small; the betas are the configuration's."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    shape = ddpm_net.DDPMConfig(channels=32, widths=(32, 64), attention=(False, True))
    network = ddpm_net.DDPMUNet(shape)
    config.data.dataset, args.t = "CelebA_HQ", 2
    config.diffusion = Namespace(beta_start=1e-4, beta_end=0.03, num_diffusion_timesteps=1000)
    with pytest.raises(FileNotFoundError, match=r"celeba_hq\.ckpt"):
        diffpure.Diffusion(args, config, "cpu")
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "celeba_hq.ckpt")
    runner = diffpure.Diffusion(args, config, "cpu")
    assert runner.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.03])
    assert runner.image_editing_sample(images(1), bs_id=2).isfinite().all()
    for a, b in zip(runner.model.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_run_is_refused(args: Namespace, config: Namespace) -> None:
    x = images(1)

    def runner(name: str) -> nn.Module:
        return RUNNERS[name](args, config, "cpu", score_model=model_for(name))

    with pytest.raises(ValueError, match=r"'CIFAR10' \(CelebA_HQ has one"):
        diffpure.Diffusion(args, config, "cpu")
    args.score_type = "guided_diffusion"
    with pytest.raises(ValueError, match="score_sde"):
        diffpure.RevGuidedDiffusion(args, config, "cpu")
    config.data.dataset = "CelebA_HQ"
    with pytest.raises(ValueError, match="CIFAR10, ImageNet"):
        diffpure.RevGuidedDiffusion(args, config, "cpu")
    args.sample_step = 2
    with pytest.raises(ValueError, match=r"args\.sample_step is 2"):
        runner("ldsde").image_editing_sample(x, bs_id=2)
    config.model.timestep_respacing = "250"
    with pytest.raises(ValueError, match=r"timestep_respacing .*'250'"):
        runner("ddpm").image_editing_sample(x, bs_id=2)
    config.model.var_type = "learned"
    with pytest.raises(ValueError, match=r"var_type .*fixedsmall, fixedlarge.*'learned'"):
        runner("celebahq-ddpm").image_editing_sample(x, bs_id=2)
    with pytest.raises(TypeError, match=r"\[B, C, H, W\]"):
        runner("sde").image_editing_sample(x[0])
    with pytest.raises(FloatingPointError, match="check_values"):
        runner("sde").image_editing_sample(x * float("nan"), bs_id=2)
