"""COUP's runner by name, called as its released script calls it (ZhangMingKun1/COUP, 88fa31b).

The released runner stands on DiffPure's, whose licence does not let its code stand here: its loop
is written out in float64 from its arithmetic.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

import coup_fast
from coup_fast.integrations.diffpure import CoupDiffusion as RevGuidedDiffusion


def make_args(**changed: object) -> Namespace:
    """What the released parser gives, with a short run."""
    usual = {
        "t": 20,
        "sample_step": 1,
        "rand_t": False,
        "t_delta": 15,
        "use_bm": False,
        "seed": 1234,
    }
    usual |= {"score_type": "score_sde", "Guide": True, "lmd_guide": 1.0, "mode": "sde"}
    return Namespace(**(usual | changed))


CONFIG = Namespace(data=Namespace(dataset="CIFAR10"), device=torch.device("cpu"))
NETWORK, CLASSIFIER = TinyNetwork(), TinyClassifier()


def make_runner(args: Namespace, **options: object) -> RevGuidedDiffusion:
    model = coup_fast.ScoreModel(NETWORK)
    return RevGuidedDiffusion(args, CONFIG, device=CONFIG.device, score_model=model, **options)


def confidence_gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        confidence = CLASSIFIER(((point + 1) * 0.5).float()).softmax(1).max(1).values
        (gradient,) = torch.autograd.grad(confidence.log().sum(), point)
    return gradient


def released(
    img: Tensor, args: Namespace, mode: str, noise: list[Tensor], noised: int | None = None
) -> Tensor:
    """The runner's loop: the input clamped once, the output once, λ g beside the score."""
    noised = noised or args.t
    x, rounds = img.double().clamp(-1, 1), []
    for steps in noise:
        steps = list(steps.double())
        if mode == "diffPure":
            level = float(np.cumprod(1 - np.linspace(0.1, 20, 1000) / 1000)[noised - 1])
            x = math.sqrt(level) * x + math.sqrt(1 - level) * steps.pop(0)
        grid = [args.t / 1000 - k / 1000 for k in range(args.t)] + [1e-5]
        for (t, after), z in zip(itertools.pairwise(grid), steps, strict=True):
            h, beta = t - after, 0.1 + 19.9 * t
            sigma = math.sqrt(1 - math.exp(-9.95 * t * t - 0.1 * t))
            times = torch.full((len(x),), 999 * t)
            score = -NETWORK(x.float(), times).double() / sigma
            if args.Guide:
                score = score + args.lmd_guide * confidence_gradient(x)
            x = x + beta * h * (0.5 * x + score) + math.sqrt(beta * h) * z
        rounds.append(x)
    return torch.cat(rounds).clamp(-1, 1).float()


@pytest.mark.parametrize("mode", ["sde", "de", "diffPure"])
@pytest.mark.parametrize(("guide", "scale"), [(True, 1.0), (True, 5.0), (False, 5.0)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_arithmetic_is_the_released_one(
    mode: str, guide: bool, scale: float, rounds: int
) -> None:
    args = make_args(Guide=guide, lmd_guide=scale, sample_step=rounds, mode=mode)
    x = 1.2 * (2 * images(2) - 1)  # some of it beyond [-1, 1]
    generator = torch.Generator().manual_seed(0)
    count = args.t + (mode == "diffPure")
    noise = [torch.randn(count, *x.shape, generator=generator) for _ in range(rounds)]
    with torch.no_grad():
        wanted = released(x, args, mode, noise)
    found = make_runner(args).image_editing_sample(
        x, bs_id=0, tag=None, mode=args.mode, cls=CLASSIFIER, noise=noise
    )
    assert found.shape == (2 * rounds, 3, 8, 8)
    assert found.abs().max() == 1
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=0)


class SdeAdvModel(nn.Module):
    """The model of the released script: its classifier goes into every call."""

    def __init__(self, args: Namespace, **options: object) -> None:
        super().__init__()
        self.args, self.classifier = args, CLASSIFIER
        self.runner = make_runner(args, **options)
        self.register_buffer("counter", torch.zeros(1))
        self.tag = None

    def forward(self, x: Tensor) -> Tensor:
        counter = self.counter.item()
        cleaned = self.runner.image_editing_sample(
            (x.float() - 0.5) * 2, bs_id=counter, tag=self.tag, mode=self.args.mode,
            cls=self.classifier,
        )  # fmt: skip
        self.counter += 1
        return self.classifier((cleaned + 1) * 0.5)


def test_the_scripts_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = images(3)
    for guide, scale in ((True, 2.0), (False, 0.0)):
        args = make_args(Guide=guide, lmd_guide=2.0)
        model = SdeAdvModel(args, fresh_draws=False).eval()
        own = coup_fast.purify(
            x, coup_fast.ScoreModel(NETWORK), CLASSIFIER, t_star=0.02, seed=1234,
            guidance_scale=scale,
        )  # fmt: skip
        assert torch.allclose(model(x), CLASSIFIER(own), atol=1e-4)
    assert not list(tmp_path.iterdir())  # the released runner writes no pictures
    leaf = x.requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    assert slope.abs().max() > 1e-3


def test_the_classifier_and_the_flags_are_read_at_every_call() -> None:
    args, x = make_args(), 2 * images(2) - 1
    runner = make_runner(args, classifier=CLASSIFIER, fresh_draws=False)
    guided = runner.image_editing_sample(x)
    assert torch.equal(runner.image_editing_sample(x, cls=CLASSIFIER), guided)
    other = runner.image_editing_sample(x, cls=TinyClassifier(seed=3))
    assert not torch.allclose(other, guided, atol=1e-5)
    noisy = runner.image_editing_sample(x, mode="diffPure")
    assert not torch.allclose(noisy, guided, atol=1e-2)
    args.Guide = False
    plain = runner.image_editing_sample(x)
    assert not torch.allclose(plain, guided, atol=1e-5)
    args.Guide, args.lmd_guide = True, 0.0
    assert torch.equal(runner.image_editing_sample(x), plain)
    del args.Guide, args.lmd_guide  # scripts of ours from before
    assert torch.equal(runner.image_editing_sample(x), guided)
    args.guidance_scale = 0.0
    assert torch.equal(runner.image_editing_sample(x), plain)


def test_a_random_level_varies_the_forward_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    args, x = make_args(rand_t=True, t_delta=5, Guide=False), 2 * images(2) - 1
    monkeypatch.setattr(np.random, "randint", lambda low, high: {(-5, 5): -4}[low, high])
    noise = torch.randn(21, *x.shape, generator=torch.Generator().manual_seed(0))
    found = make_runner(args).image_editing_sample(x, mode="diffPure", noise=[noise])
    with torch.no_grad():
        wanted = released(x, args, "diffPure", [noise], noised=16)
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=0)
    with pytest.raises(ValueError, match=r"mode 'sde' .*args\.rand_t"):
        make_runner(args).image_editing_sample(x)


@pytest.mark.parametrize(
    ("changed", "keywords", "call", "words"),
    [
        ({}, {}, {"mode": "ga"}, r"mode must be one of 'sde', 'de', 'diffPure', got 'ga'"),
        ({}, {}, {}, r"args\.Guide is on .*cls=classifier"),
        ({"guidance_scale": 2.0}, {}, {"cls": CLASSIFIER}, r"lmd_guide and args\.guidance_scale"),
        ({"sample_step": 0}, {}, {"cls": CLASSIFIER}, r"args\.sample_step .* at least 1"),
        ({"Guide": False}, {"guidance_scale": 2.0}, {}, r"args\.Guide is off.*guidance_scale="),
    ],
)
def test_contradictions_are_refused(changed: dict, keywords: dict, call: dict, words: str) -> None:
    runner = make_runner(make_args(**changed), **keywords)
    with pytest.raises(ValueError, match=words):
        runner.image_editing_sample(2 * images(1) - 1, **call)
