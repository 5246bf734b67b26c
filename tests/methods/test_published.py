"""Every method against its transcription (helpers/published.py), under options drawn by a seed.

In float64, with the same noise: values, and what the network was told at each call.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import published
from helpers.tiny import TinyClassifier, TinyNetwork
from torch import Tensor

from coup_fast import Purifier, ScoreModel, methods
from coup_fast.schedules import DiscreteSchedule, VPSchedule

SEEDS = range(6)
SDE = [name for name in methods.METHODS if "t_star" in methods.options(name)]
SDE = [name for name in SDE if "solver" in methods.options(name)]


@dataclass
class Case:
    """Models, images and the draws of one seed."""

    pick: random.Random
    model: published.Model
    score_model: ScoreModel
    u: Tensor
    common: dict[str, Any]

    def check(self, name: str, options: dict[str, Any], want: Any) -> None:
        """want: (noise) -> pixels, by hand."""
        clean = Purifier(
            self.score_model, self.model.classifier, method=name, check_values=False, **options
        )
        generator = torch.Generator().manual_seed(7)
        shape = (clean.num_noise, *self.u.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        told: list[float] = []
        hook = self.score_model.network.register_forward_pre_hook(
            lambda _, arguments: told.append(float(arguments[1][0]))
        )
        with torch.no_grad():
            got = clean(self.u, noise=noise)
        hook.remove()
        with torch.enable_grad():
            expected = want(noise).detach()
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(told, self.model.told, rtol=1e-9, atol=1e-6)


def case(seed: int, learned: bool = False) -> Case:
    pick = random.Random(seed)
    channels, size = pick.choice([1, 3]), pick.choice([4, 6])
    kind, indexed = ("eps", "score", "x0")[seed % 3], bool(seed % 2)
    schedule = pick.choice(
        [DiscreteSchedule(), DiscreteSchedule.linear(2e-4, 0.05, 400)]
        if indexed
        else [VPSchedule(), VPSchedule(0.2, 12.0)]
    )
    if isinstance(schedule, VPSchedule):
        beta = schedule.beta_min, schedule.beta_max
        betas = np.linspace(beta[0] / 1000, beta[1] / 1000, 1000)
    else:
        betas = np.array(schedule.betas)
        beta = len(betas) * betas[0], len(betas) * betas[-1]
    network = TinyNetwork(channels, 2 * channels if learned else channels, seed).double()
    classifier = TinyClassifier(channels, size=size, seed=seed).double()
    u = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(seed)).double()
    model = published.Model(network, classifier, kind, beta, betas, indexed)
    time_scale = float(len(betas)) if indexed else 999.0
    norm = ("none", "normalised", "clipped")[seed // 2 % 3]
    common = {
        "guidance_scale": pick.choice([0.0, 1.0, 4.0]),
        "guidance_norm": norm,
        "guidance_max_norm": 0.3 if norm == "clipped" else None,
    }
    return Case(pick, model, ScoreModel(network, kind, schedule, time_scale), u, common)


def flags(pick: random.Random, *names: str) -> dict[str, bool]:
    return {name: pick.random() < 0.5 for name in names}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SDE)
def test_reverse_sde(name: str, seed: int) -> None:
    c = case(SDE.index(name) + 5 * seed)
    o = c.common | flags(c.pick, "forward_noise", "clip_denoised", "clamp_output")
    o["solver"] = c.pick.choice(["euler", "exponential"])
    o["t_star"], steps = c.pick.choice([(0.1, 10), (0.9, 3), (1.0, 1), (0.0137, None), (2e-5, 1)])
    if steps is None:
        o |= {"num_steps": None, "step_size": 1e-3}
        by_hand = o
    else:
        o["num_steps"] = steps
        by_hand = o | {"step_size": o["t_star"] / steps}
    ode = name == "vp-ode"
    c.check(name, o, lambda z: published.reverse_sde(c.u, z, c.model, by_hand, ode))


@pytest.mark.parametrize("seed", SEEDS)
def test_ldsde(seed: int) -> None:
    c = case(seed)
    o = c.common | flags(c.pick, "clamp_output")
    o |= {
        "t_star": c.pick.choice([0.1, 0.037]),
        "step_size": 1e-2,
        "eta": c.pick.choice([5.0, 0.3]),
    }
    o |= {"sigma2": c.pick.choice([1e-3, 0.5])}
    o["lambda_ld"] = c.pick.choice([1e-2, 0.1])
    c.check("ldsde", o, lambda z: published.ldsde(c.u, z, c.model, o))


def spaced(count: int, steps: int) -> list[int]:
    return [round(count * (k + 1) / steps) - 1 for k in range(steps)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["ddpm-fixed-small", "ddpm-fixed-large", "ddpm-learned", "ddim"])
def test_sampling(name: str, seed: int) -> None:
    c = case(seed, learned=name == "ddpm-learned")
    method, _, variance = name.partition("-")
    o = c.common | flags(c.pick, "forward_noise", "clip_denoised", "clamp_output")
    o |= {"variance": variance} if variance else {"eta": c.pick.choice([0.0, 0.4, 1.0])}
    count, steps = c.pick.choice([(2, 2), (12, 12), (40, 7), (40, 2)])
    o |= {"t_star": count / len(c.model.betas), "num_steps": steps}
    level = count - 1 if o["forward_noise"] else None
    used = spaced(count, steps)
    c.check(method, o, lambda z: published.rounds(c.u, z, c.model, o, [level], [used]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variance", ["fixed-large", "fixed-small", "learned"])
def test_gdmp(variance: str, seed: int) -> None:
    c = case(seed, learned=variance == "learned")
    o = c.common | flags(c.pick, "clip_denoised", "clamp_output") | {"variance": variance}
    count, repeats = c.pick.choice([(2, 1), (9, 2), (9, 4)])
    o |= {"t_star": count / len(c.model.betas), "rounds": repeats}
    o |= {"ptb": c.pick.choice([8.0, 2.0]), "mse_scale": c.pick.choice([6e4, 1e3])}
    o["image_shape"] = c.pick.choice([(3, 32, 32), tuple(c.u.shape[1:])])
    levels, used = [count] * repeats, [list(range(count))] * repeats
    c.check("gdmp", o, lambda z: published.rounds(c.u, z, c.model, o, levels, used, True))


@pytest.mark.parametrize("seed", SEEDS)
def test_gradual(seed: int) -> None:
    c = case(seed)
    o = c.common | flags(c.pick, "clip_denoised", "clamp_output")
    o |= {"rounds": c.pick.choice([(6, 6, 10), (2,), (12, 4)]), "stride": c.pick.choice([1, 2])}
    o["eta"] = c.pick.choice([1.0, 0.0, 0.7])
    levels: list[int | None] = [count - 1 for count in o["rounds"]]
    used = [list(range(o["stride"] - 1, count, o["stride"])) for count in o["rounds"]]
    c.check("gradual", o, lambda z: published.rounds(c.u, z, c.model, o, levels, used))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_shot(seed: int) -> None:
    c = case(seed)
    o = c.common | flags(c.pick, "clip_denoised") | {"sigma": c.pick.choice([0.1, 0.25, 1.0])}
    c.check("one-shot", o, lambda z: published.one_shot(c.u, z, c.model, o))
