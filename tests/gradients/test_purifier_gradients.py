"""Gradients through purification against float64 autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import SHORT, gradient_of, images
from helpers.tiny import short_purifier as purifier

from coup_fast import EnergyModel, Purifier, ScoreModel, _extension, reference

METHODS = sorted(SHORT)
GUIDED = ["coup", "coup-l2", "coup-short"]
needs_compiled = pytest.mark.skipif(not _extension.available(), reason="needs the extension")
BACKENDS = [pytest.param("compiled", marks=needs_compiled), "reference"]


@pytest.mark.parametrize("gradient", ["autograd", "exact"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_float32_gradient_agrees_with_float64_autograd(method: str, backend, gradient) -> None:
    u = images(2)
    weight = torch.randn_like(u)
    exact = purifier(method, double=True, gradient="autograd")
    want = gradient_of(exact, u.double(), weight.double())
    got = gradient_of(purifier(method, backend=backend, gradient=gradient), u, weight)
    assert got.dtype == torch.float32
    scale = want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * scale)


NORMS = [
    {"guidance_scale": 3.0},
    {"guidance_scale": 3.0, "guidance_norm": "normalised"},
    {"guidance_scale": 3.0, "guidance_solver": "stable"},
    {"guidance_scale": 3.0, "guidance_norm": "clipped", "guidance_max_norm": 0.1},
]


@pytest.mark.parametrize(
    ("method", "options"),
    [*(("coup", norm) for norm in NORMS), *((m, {}) for m in METHODS if m not in GUIDED)],
)
def test_float64_gradient_is_the_numerical_one(method: str, options) -> None:
    clean = purifier(method, double=True, gradient="autograd", **options)
    u = 0.2 + 0.6 * images(1, dtype=torch.float64)
    weight, direction = torch.randn_like(u), torch.randn_like(u)
    got = (gradient_of(clean, u, weight) * direction).sum()
    h = 1e-6
    change = clean(u + h * direction) - clean(u - h * direction)
    want = (weight * change).sum() / (2 * h)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_stopped_guidance_gradient_treats_the_guidance_as_constant() -> None:
    options = {"double": True, "guidance_scale": 20.0, "num_steps": 2}
    full, stopped = (
        purifier("coup", guidance_gradient=kind, **options) for kind in ("full", "stopped")
    )
    u, weight = images(2, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(full(u), stopped(u))
    # The chain with its guidance tensors recorded and put back as constants.
    run = stopped.prepare(u)
    leaf = u.clone().requires_grad_()
    state = run.start(leaf)
    for k in range(run.num_steps):
        x = state[0]
        out, guidance, _ = run.evaluate(k, x)
        keys, noise = run.noise.at(run.noise_index[k])
        row = run.tables.rows[k]
        state = (reference.reverse_step(x, out, row, keys, guidance.detach(), None, noise),)
    (want,) = torch.autograd.grad((state[0] * weight).sum(), leaf)
    torch.testing.assert_close(gradient_of(stopped, u, weight), want, rtol=1e-10, atol=1e-12)
    assert (gradient_of(full, u, weight) - want).norm() > 0.01 * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_energy_model_purifies_and_is_differentiable(backend) -> None:
    def energy(x, t):
        return 0.5 * ((x - 0.5) ** 2 / 0.3**2).flatten(1).sum(1)

    clean = Purifier(
        ScoreModel(EnergyModel(energy), kind="ncsn"), method="adp", num_steps=3, backend=backend
    )
    direct = Purifier(
        ScoreModel(lambda x, t: (0.5 - x) / 0.3**2, kind="ncsn"),
        method="adp",
        num_steps=3,
        backend=backend,
    )
    u, weight = images(), torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(clean(u), direct(u), rtol=1e-4, atol=1e-5)
    got, want = gradient_of(clean, u, weight), gradient_of(direct, u, weight)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
