"""Losses against Gaussian data, where the best network is known; averaging; exact resumption."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scripts import environment
from torch import Tensor, nn

from coup_fast.training.batches import batches, generator_for
from coup_fast.training.checkpoint import read_checkpoint, write_checkpoint
from coup_fast.training.classifier import classifier_loss, count_correct, shifted
from coup_fast.training.dsm import NCSNNoise, VPNoise, ncsn_error, ncsn_loss, vp_error, vp_loss
from coup_fast.training.optimizers import build_optimizer, set_learning_rate
from coup_fast.training.trainer import Objective, TrainConfig, Trainer

MEAN, VARIANCE = 0.3, 0.04  # of the pixels of the Gaussian "images"


def gaussian_images(count: int) -> Tensor:
    noise = torch.randn((count, 1, 16, 16), generator=torch.Generator().manual_seed(1))
    return MEAN + VARIANCE**0.5 * noise


class GaussianEps(nn.Module):
    """E[z | x] for Gaussian pixels, exactly: sigma (x - signal m) / (alpha_bar v + sigma^2)."""

    def __init__(self, scale: float = 1.0, score: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.score = score

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = VPNoise().alpha_bar(t / 999.0).float().view(-1, 1, 1, 1)
        total = alpha_bar * 4 * VARIANCE + (1 - alpha_bar)
        score = -(x - alpha_bar.sqrt() * (2 * MEAN - 1)) / total
        return self.scale * (score if self.score else -(1 - alpha_bar).sqrt() * score)


@pytest.mark.parametrize("t", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["eps", "score"])
def test_vp_error_of_the_best_network_is_the_posterior_variance(t: float, kind: str) -> None:
    images = gaussian_images(400)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    times = torch.full((len(images),), t, dtype=torch.float64)
    errors = vp_error(GaussianEps(score=kind == "score"), images, times, z, VPNoise(), kind)
    signal_variance = 4 * VARIANCE * VPNoise().alpha_bar(torch.tensor(t)).item()
    noise_variance = 1 - VPNoise().alpha_bar(torch.tensor(t)).item()
    expected = signal_variance / (signal_variance + noise_variance)
    assert errors.shape == (400,)
    assert errors.mean().item() == pytest.approx(expected, rel=0.02)
    worse = vp_error(GaussianEps(0.9, score=kind == "score"), images, times, z, VPNoise(), kind)
    assert worse.mean() > errors.mean()


def test_vp_loss_is_the_average_of_the_error_over_the_times_drawn() -> None:
    images = gaussian_images(512)
    noise = VPNoise()
    t = noise.sample_times(512, torch.Generator().manual_seed(3))
    signal_variance = 4 * VARIANCE * noise.alpha_bar(t)
    expected = (signal_variance / (signal_variance + 1 - noise.alpha_bar(t))).mean().item()
    loss = vp_loss(GaussianEps(), images, torch.Generator().manual_seed(3), noise)
    assert loss.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("last", [1.0, 0.8])
def test_times_follow_the_stated_density(last: float) -> None:
    noise = VPNoise(t_min=0.0, t_focus=0.6, t_last=last, focus_share=0.75)
    t = noise.sample_times(10_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= noise.t_max == last
    for limit in (0.1, 0.3, 0.6, 0.7, 0.75):
        share = 0.75 * min(limit / 0.6, 1.0) + 0.25 * limit / last
        assert (t <= limit).double().mean().item() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_ncsn_error_of_the_best_network_is_the_posterior_variance(sigma: float) -> None:
    images = gaussian_images(400)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))

    def best(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (400,)
        assert not t.any()
        return -sigma * (x - MEAN) / (VARIANCE + sigma**2)

    errors = ncsn_error(best, images, torch.full((400,), sigma, dtype=torch.float64), z)
    assert errors.mean().item() == pytest.approx(VARIANCE / (VARIANCE + sigma**2), rel=0.02)


def test_ncsn_levels_and_loss() -> None:
    levels = NCSNNoise().levels()
    assert len(levels) == 232
    assert levels[0].item() == pytest.approx(50.0)
    assert levels[-1].item() == pytest.approx(0.01)
    ratios = levels[1:] / levels[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    silent = nn.Module()
    silent.forward = lambda x, t: torch.zeros_like(x)  # type: ignore[method-assign]
    loss = ncsn_loss(silent, gaussian_images(64), torch.Generator().manual_seed(0), NCSNNoise())
    assert loss.item() == pytest.approx(0.5, rel=0.05)  # half the variance of z


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


def tiny_data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 4, 4), generator=rng).to(torch.uint8)
    return images, torch.randint(0, 3, (40,), generator=rng)


def tiny_objective(
    network: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator
) -> Tensor:
    return classifier_loss(network, images, labels, rng, reach=1)


def tiny_trainer(
    checkpoint: Path | None, steps: int = 30, cooldown: float | None = None
) -> Trainer:
    config = TrainConfig(
        steps, batch_size=8, learning_rate=1e-2, warmup=3, ema=0.9, seed=5, cooldown=cooldown
    )
    return Trainer(
        tiny_network(),
        tiny_objective,
        *tiny_data(),
        config,
        checkpoint=checkpoint,
        save_every=0.0,
        log_every=5,
        progress=False,
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import test_training as here
calls = 0
def deadly(network, images, labels, rng):
    global calls
    calls += 1
    if calls == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    return here.classifier_loss(network, images, labels, rng, reach=1)
here.tiny_objective = deadly
here.tiny_trainer(Path(sys.argv[1])).run()
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint)],
        env=environment(Path(__file__).parent),
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed = tiny_trainer(checkpoint)
    assert resumed.state.step == 17
    resumed.run()
    whole = tiny_trainer(None)
    whole.run()
    assert resumed.state.history == whole.state.history
    for network in ("network", "average"):
        ours, theirs = getattr(resumed, network), getattr(whole, network)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    again = tiny_trainer(checkpoint)  # a finished run has nothing left to do
    assert again.state.step == 30
    assert torch.equal(again.run()[1].weight, whole.average.module[1].weight)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "c", steps=5).run()
    with pytest.raises(ValueError, match=r"steps \(5, now 30\)"):
        tiny_trainer(tmp_path / "c")


def test_the_end_of_a_run_can_be_moved_until_its_rate_falls(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    running = tiny_trainer(checkpoint, steps=40, cooldown=0.5)
    running.objective = stopping_at(running, 18)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    with pytest.raises(ValueError, match=r"another run: steps \(40, now 26\)"):
        tiny_trainer(checkpoint, steps=26, cooldown=0.5)  # its rate falls from step 13
    moved = tiny_trainer(checkpoint, steps=36, cooldown=0.5)
    assert moved.state.step == 17
    moved.run()
    whole = tiny_trainer(None, steps=36, cooldown=0.5)
    whole.run()
    assert moved.state.history == whole.state.history
    for name, tensor in moved.average.state_dict().items():
        assert torch.equal(tensor, whole.average.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"another run: steps \(36, now 40\)"):
        tiny_trainer(checkpoint, steps=40, cooldown=0.5)


def stopping_at(trainer: Trainer, call: int) -> Objective:
    """The trainer's objective until its call of that number, where the user stops the run."""
    objective, calls = trainer.objective, 0

    def stopping(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return objective(*arguments)

    return stopping


def test_average_is_the_debiased_exponential_moving_average() -> None:
    trainer = tiny_trainer(None, steps=12)
    seen = []
    trainer.network[1].weight.register_post_accumulate_grad_hook(
        lambda _: seen.append(trainer.network[1].weight.detach().double().clone())
    )
    averaged = trainer.run()
    seen = [*seen[1:], trainer.network[1].weight.detach().double()]  # weights after each step
    shares = 0.9 ** torch.arange(11, -1, -1, dtype=torch.float64)
    expected = torch.einsum("k,kij->ij", shares / shares.sum(), torch.stack(seen))
    torch.testing.assert_close(averaged[1].weight.double(), expected, rtol=1e-6, atol=1e-7)


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    trainer = tiny_trainer(None, steps=2)
    torch.manual_seed(9)
    trainer.run()
    assert torch.equal(torch.rand(3), expected)


def test_each_epoch_is_a_permutation_and_a_function_of_the_seed() -> None:
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    labels = torch.arange(20)
    config = TrainConfig(8, batch_size=5, seed=1)
    rows = [b[2] for b in batches(images, labels, config, 0)]
    for epoch in (rows[:4], rows[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(20))
    assert not torch.equal(torch.cat(rows[:4]), torch.cat(rows[4:]))
    for first, second in zip(rows[3:], batches(images, labels, config, 3), strict=True):
        assert torch.equal(first, second[2])
    with pytest.raises(ValueError, match=r"20 images .* 21"):
        next(batches(images, labels, TrainConfig(1, batch_size=21), 0))


def test_a_flip_alternates_from_epoch_to_epoch() -> None:
    images, labels = torch.rand(40, 1, 2, 3), torch.arange(40)
    config = TrainConfig(20, batch_size=8, alternating_flip=True)
    seen = [torch.zeros_like(images) for _ in range(4)]
    for step, pixels, rows, _ in batches(images, labels, config, 0):
        seen[step // 5][rows] = pixels
    mirrored = (seen[0] == images.flip(3)).flatten(1).all(dim=1)
    assert 10 < int(mirrored.sum()) < 30
    assert torch.equal(seen[0][~mirrored], images[~mirrored])
    assert torch.equal(seen[1], seen[0].flip(3))
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(seen[3], seen[1])


def small_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_sgd_gives_the_biases_of_norms_their_learning_rate() -> None:
    network = small_classifier()
    nn.init.normal_(network.get_parameter("1.bias"))
    config = TrainConfig(1, momentum=0.5, weight_decay=0.1, norm_bias_rate=4.0)
    optimizer = build_optimizer(network, config)
    set_learning_rate(optimizer, 0.25)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for old, new, (name, _) in zip(
        before, network.parameters(), network.named_parameters(), strict=True
    ):
        rate, decay = (1.0, 0.025) if name == "1.bias" else (0.25, 0.1)
        # Nesterov's first step: the gradient and once more its share of momentum.
        torch.testing.assert_close(new.detach(), old - rate * 1.5 * (1.0 + decay * old))


def test_a_checkpoint_older_than_a_field_is_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    stopped = tiny_trainer(checkpoint)
    stopped.objective = stopping_at(stopped, 3)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    content = read_checkpoint(checkpoint, torch.device("cpu"))
    for name in ("momentum", "weight_decay", "norm_bias_rate", "alternating_flip"):
        del content["identity"][name]
    write_checkpoint(checkpoint, content)
    assert tiny_trainer(checkpoint).state.step == 2
    content["identity"]["momentum"] = 0.9
    write_checkpoint(checkpoint, content)
    with pytest.raises(ValueError, match=r"momentum \(0.9, now None\)"):
        tiny_trainer(checkpoint)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    trainer = tiny_trainer(None, steps=2)
    trainer.objective = lambda network, images, labels, rng: network(images).sum() * float("nan")
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.run()


def test_learning_rate_rises_and_falls_to_zero() -> None:
    config = TrainConfig(1000, learning_rate=1.0, warmup=10)
    assert config.learning_rate_at(0) == pytest.approx(0.1)
    assert config.learning_rate_at(500) == pytest.approx(0.5)
    assert config.learning_rate_at(999) < 1e-4


def test_learning_rate_with_a_cooldown_is_constant_then_linear() -> None:
    config = TrainConfig(1000, learning_rate=1.0, warmup=10, cooldown=0.2)
    rates = [config.learning_rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:801] == [1.0] * 792
    assert rates[900] == pytest.approx(0.5)
    assert rates[999] == pytest.approx(0.005)


def test_streams_of_a_seed_are_distinct() -> None:
    seeds = {generator_for(s, n, i).initial_seed() for s in (0, 1) for n in "ab" for i in range(9)}
    assert len(seeds) == 36


def test_shift_moves_whole_images() -> None:
    image = torch.zeros(64, 1, 5, 5)
    image[:, :, 2, 2] = 1.0
    moved = shifted(image, torch.Generator().manual_seed(0), 1, flip=True)
    assert moved.shape == image.shape
    assert torch.equal(moved.flatten(1).sum(1), torch.ones(64))
    assert len(torch.unique(moved.flatten(1).argmax(1))) == 9  # every shift occurs
    assert torch.equal(shifted(image, torch.Generator().manual_seed(0), 0, False), image)


def test_count_correct_takes_bytes_and_floats() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.eye(4))
    pixels = (255 * torch.eye(4)).to(torch.uint8).view(4, 1, 2, 2)
    labels = torch.tensor([0, 1, 2, 0])
    assert count_correct(network, pixels, labels, batch=3) == 3
    assert count_correct(network, pixels.float() / 255, labels) == 3
