"""Networks of every kind on Gaussian data, where ε, score, v and velocity are known exactly.

A mixture's exact noise estimate is written as each kind of network would predict it, with the
formulas of the papers; every kind has to purify to the same image and give the same gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coup_fast import Purifier, ScoreModel, methods
from coup_fast.models.analytic import GaussianMixture, MixtureClassifier, MixtureNetwork
from coup_fast.schedules import FlowSchedule, VPSchedule

VP = VPSchedule()
CHAIN = VP.discrete()
FLOWS = [
    FlowSchedule(),
    FlowSchedule(data_at=0),
    FlowSchedule("noised"),
    FlowSchedule("noised", data_at=0),
]
CONTINUOUS: dict[str, dict[str, Any]] = {
    "diffpure": {"num_steps": 7},  # off the grid of the indices
    "coup": {"num_steps": 7},
    "coup-short": {"clip_denoised": True},
    "vp-ode": {"num_steps": 7},
    "ldsde": {},
    "one-shot": {},
    "consistency": {},
    "flowpure": {},
}
DISCRETE: dict[str, dict[str, Any]] = {
    "ddpm": {"t_star": 0.1, "num_steps": 5, "clip_denoised": True},
    "ddim": {"num_steps": 5},
    "gdmp": {"rounds": 1, "t_star": 0.005, "image_shape": (1, 4, 4)},
    "gradual": {"rounds": (5, 10)},
}


def mixture(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    return GaussianMixture(means.to(dtype), torch.tensor(0.2, dtype=dtype))


class Predicting(nn.Module):
    """The mixture's exact ε and x̂0 at a state a x + b z, as (a, b, t) -> what the kind means."""

    def __init__(self, kind: str, schedule, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.kind, self.schedule, self.mixture = kind, schedule, mixture(dtype)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        if isinstance(self.schedule, FlowSchedule):
            along = t if self.schedule.data_at == 1 else 1 - t
            if self.schedule.source == "noise":
                return along, 1 - along
            return torch.ones_like(along), 0.6 * (1 - along)
        alpha_bar = MixtureNetwork(self.mixture, "eps", self.schedule).alpha_bar(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        a, b = (level.reshape(-1, 1, 1, 1).to(y.dtype) for level in self.levels(t))
        length = (a * a + b * b).sqrt()
        score = self.mixture.score(y / length, (a / length).square().flatten().double())
        eps = -b / length * score
        x0 = (y - b * eps) / a
        if self.kind == "v":
            return a * eps - b * x0
        if self.kind == "velocity":  # dx_t/dt
            along = x0 - eps if self.schedule.source == "noise" else -0.6 * eps
            return along if self.schedule.data_at == 1 else -along
        return {"eps": eps, "x0": x0}[self.kind]


def purified(kind: str, schedule, method: str, options, u: Tensor) -> tuple[Tensor, Tensor]:
    """The purified images, and the gradient of a weighted sum of them."""
    model = ScoreModel(Predicting(kind, schedule, u.dtype), kind, schedule, time_scale=1.0)
    purifier = Purifier(model, MixtureClassifier(mixture(u.dtype)), method=method, **options)
    leaf = u.clone().requires_grad_()
    out = purifier(leaf, sample_ids=range(len(u)))
    (out * torch.linspace(-1, 1, out.numel(), dtype=u.dtype).reshape(out.shape)).sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


KINDS = [("v", VP), *(("velocity", flow) for flow in FLOWS), ("eps", FLOWS[0]), ("x0", FLOWS[3])]


@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [
        *((method, torch.float64, 1e-12) for method in (CONTINUOUS | DISCRETE)),
        *((method, torch.float32, 1e-4) for method in ("diffpure", "ddim", "flowpure")),
    ],
)
@pytest.mark.parametrize(("kind", "schedule"), KINDS, ids=str)
def test_every_kind_purifies_as_eps_does(
    kind: str, schedule, method: str, dtype: torch.dtype, tolerance: float
) -> None:
    options = (CONTINUOUS | DISCRETE)[method] | {"guidance_scale": 0.5}
    u = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Flows are asked at the level of index i itself, as a network of the discrete chain is.
    told: Any = CHAIN if method in DISCRETE and isinstance(schedule, FlowSchedule) else VP
    expected = purified("eps", told, method, options, u)
    got = purified(kind, schedule, method, options, u.to(dtype))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [*CONTINUOUS, *DISCRETE])
def test_v_of_a_discrete_chain_is_that_of_the_index_the_network_is_told(method: str) -> None:
    """DiffPure tells such a network an index one above the state's; v has the told one's level."""
    options = (CONTINUOUS | DISCRETE)[method] | {"guidance_scale": 0.0}
    u = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = purified("eps", CHAIN, method, options, u)
    for one, other in zip(purified("v", CHAIN, method, options, u), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_a_flow_is_asked_at_the_same_noise_to_signal_ratio(flow: FlowSchedule) -> None:
    t = np.array([1e-5, 0.01, 0.1, 0.13])
    signal, noise = flow.signal_and_noise(flow.network_time(t))
    ratio = np.sqrt(1 / VP.alpha_bar(t) - 1)
    np.testing.assert_allclose(noise / signal, ratio, rtol=1e-9)
    np.testing.assert_allclose(flow.alpha_bar_told(flow.network_time(t)), VP.alpha_bar(t))
    signal, noise = flow.signal_and_noise(flow.index_time([0, 99]))
    np.testing.assert_allclose(noise / signal, np.sqrt(1 / CHAIN.alpha_bar([0, 99]) - 1), rtol=1e-9)


def test_the_network_of_a_flow_sees_its_own_state_and_time() -> None:
    """x = √ᾱ x₀ + σ z becomes t x₀ + (1 - t) z, at t in the network's units."""
    seen = {}

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen["x"], seen["t"] = x, t
        return x

    model = ScoreModel(network, "velocity", FlowSchedule(data_at=0), time_scale=1000.0)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x0, z = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    signal, noise = (1 - t).reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1)
    length = (signal**2 + noise**2).sqrt()
    model((signal * x0 + noise * z) / length, t)
    torch.testing.assert_close(seen["x"], signal * x0 + noise * z)
    torch.testing.assert_close(seen["t"], 1000 * t)


def test_defaults_of_a_velocity() -> None:
    model = ScoreModel(Predicting("velocity", FLOWS[0]), "velocity")
    assert (model.schedule, model.time_scale) == (FlowSchedule(), 1.0)
    assert ScoreModel(Predicting("v", VP), "v").time_scale == 999.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "velocity", "schedule": VP}, 'velocity" needs a FlowSchedule.*VPSchedule'),
        ({"kind": "score", "schedule": FlowSchedule()}, "velocity, eps, x0, got kind 'score'"),
        ({"kind": "velocity", "t_max": 0.5}, "t_max=0.5"),
    ],
)
def test_pairs_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreModel(lambda x, t: x, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("data",), ValueError, "source .*noise, noised, attacked, got 'data'"),
        (("noise", 2), ValueError, "data_at .*got 2"),
        (("noised", 1, 0.0), ValueError, "noise_std"),
    ],
)
def test_bad_flows(arguments: Any, error, message: str) -> None:
    with pytest.raises(error, match=message):
        FlowSchedule(*arguments)


def test_runs_that_a_flow_cannot_make() -> None:
    with pytest.raises(ValueError, match=r"noise_std=0\.6: use a smaller t_star"):
        methods.plan("ddpm", FlowSchedule("noised"), "velocity")
    with pytest.raises(ValueError, match="diffpure needs a path with noise levels"):
        methods.plan("diffpure", FlowSchedule("attacked"), "velocity")
    with pytest.raises(ValueError, match='velocity" needs a FlowSchedule'):
        methods.plan("diffpure", VP, "velocity")
