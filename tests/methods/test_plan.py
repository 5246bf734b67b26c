"""The algebra of plans: predictions to rows, for each kind of network, and finished plans."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from helpers import interpreter
from helpers.scripts import ROOT

from coup_fast import VPSchedule, methods, plan
from coup_fast.plan import (
    DIFFUSION_KINDS,
    ROW_COLUMNS,
    Prediction,
    Rows,
    blank_row,
    ddim,
    diffusion_row,
    joined,
    make_plan,
    network_row,
    posterior,
    start_row,
)

ALPHA_BAR = 0.7


def outputs(x, eps, alpha_bar: float = ALPHA_BAR):
    """What networks of each kind say where the noise in x is eps."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x0 = (x - noise * eps) / signal
    velocities = {"v": signal * eps - noise * x0, "velocity": x0 - eps}
    return {"eps": eps, "score": -eps / noise, "x0": x0} | velocities


def eps_of(kind: str, alpha_bar: float = ALPHA_BAR) -> tuple[float, float] | None:
    """(A, B) with ε = A x + B m of the velocities above, from x = √ᾱ x0 + σ ε."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    total = signal + noise
    return {"v": (noise, signal), "velocity": (1 / total, -signal / total)}.get(kind)


def random_state():
    return torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2).double()


def test_columns_have_the_contract_order() -> None:
    assert (
        *("p", "q", "x0_lo", "x0_hi", "u", "v", "w", "c", "e", "d", "out_lo", "out_hi"),
        *("out_scale", "out_bias", "g_max", "log_var_lo", "log_var_hi", "x_var", "z_var"),
    ) == ROW_COLUMNS
    for number, name in enumerate(ROW_COLUMNS):
        assert getattr(plan, name.upper()) == number


@pytest.mark.parametrize(
    ("header", "struct", "columns"),
    [
        ("reverse_step.h", "StepRow", ROW_COLUMNS),
        ("perturb.h", "PerturbRow", plan.START_COLUMNS),
        ("adaptive_step.h", "AdaptiveRow", plan.ADAPTIVE_COLUMNS),
    ],
)
def test_kernels_have_the_same_columns(header: str, struct: str, columns) -> None:
    """The structs that the kernels read rows as."""
    text = (ROOT / "csrc" / "math" / header).read_text()
    body = re.search(rf"struct {struct} {{(.*?)}};", text, re.S).group(1)
    fields = re.findall(r"\w+", ", ".join(re.findall(r"float ([^;]*);", body)))
    assert fields == list(columns)


@pytest.mark.parametrize("kind", DIFFUSION_KINDS)
@pytest.mark.parametrize("step", [(0.0, 0.9, -0.3), (0.8, 0.0, 0.4), (0.5, 0.6, 0.0), (1, 2, 3)])
def test_kinds_give_the_same_step(kind: str, step) -> None:
    x, eps = random_state()
    out = outputs(x, eps)
    expected = step[0] * out["x0"] + step[1] * x + step[2] * eps
    row = network_row(Prediction(*step), ALPHA_BAR, kind, eps_of(kind))
    torch.testing.assert_close(interpreter.step(row, x, out[kind]), expected)


@pytest.mark.parametrize("kind", DIFFUSION_KINDS)
def test_kinds_give_the_same_clipped_step(kind: str) -> None:
    x, eps = random_state()
    out = outputs(x, eps)
    assert (out["x0"].abs() > 1).any()
    expected = 0.5 * out["x0"].clamp(-1, 1) + 0.6 * x + 0.1 * eps
    row = network_row(Prediction(0.5, 0.6, 0.1), ALPHA_BAR, kind, eps_of(kind), clip_denoised=True)
    torch.testing.assert_close(interpreter.step(row, x, out[kind]), expected)


def test_a_velocity_needs_its_mixture() -> None:
    with pytest.raises(ValueError, match=r"'v'.*eps_of"):
        network_row(Prediction(x0=1.0), ALPHA_BAR, "v")


def test_clipping_needs_a_denoised_image() -> None:
    with pytest.raises(ValueError, match="denoised"):
        network_row(Prediction(x=1.0, eps=1.0), ALPHA_BAR, "eps", clip_denoised=True)


def test_score_coefficient_is_the_response_to_a_changed_score() -> None:
    """Adding δ to the score moves the step by score() δ, whatever it is written in."""
    x, eps = random_state()
    for step in (Prediction(0.4, 0.5, 0.6), Prediction(eps=-0.2, x=1.0), Prediction(x0=1.0)):
        row = network_row(step, ALPHA_BAR, "score")
        s = outputs(x, eps)["score"]
        moved = interpreter.step(row, x, s + 1.0) - interpreter.step(row, x, s)
        torch.testing.assert_close(moved, torch.full_like(x, step.score(ALPHA_BAR)))


def test_posterior_is_bayes_rule() -> None:
    """q(x' | x, x̂0) from the joint Gaussian of x' and x given x̂0."""
    now, then = 0.5, 0.8
    alpha = now / then
    step, variance = posterior(now, then)
    gain = np.sqrt(alpha) * (1 - then) / (1 - now)  # Cov(x', x) / Var(x)
    assert step.x == pytest.approx(gain)
    assert step.x0 == pytest.approx(np.sqrt(then) - gain * np.sqrt(now))
    assert variance == pytest.approx((1 - then) - gain**2 * (1 - now))
    last, nothing = posterior(0.99, 1.0)
    assert (last.x0, last.x, nothing) == (pytest.approx(1.0), 0.0, 0.0)


def test_ddim_eta_1_is_the_posterior() -> None:
    """In mean, where x̂0 and ε say the same of x, and in variance."""
    now, then = 0.5, 0.8
    step, std = ddim(now, then, 1.0)
    mean, variance = posterior(now, then)
    assert std**2 == pytest.approx(variance)
    rows = [network_row(s, now, "eps") for s in (step, mean)]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-12)
    # η = 0 keeps signal and noise apart: x̂0 and ε give √ᾱ' x̂0 + √(1-ᾱ') ε
    step, std = ddim(now, then, 0.0)
    assert (step.x0, step.x, std) == (pytest.approx(then**0.5), 0.0, 0.0)
    assert step.eps == pytest.approx((1 - then) ** 0.5)


def test_start_rows() -> None:
    u, z = torch.rand(1, 3, 2, 2).double(), torch.randn(1, 3, 2, 2).double()
    x = 2 * u - 1
    torch.testing.assert_close(interpreter.start(start_row(), u, None), x)
    noised = interpreter.start(start_row(0.7), u, z)
    torch.testing.assert_close(noised, 0.7**0.5 * x + 0.3**0.5 * z)
    clamped = interpreter.start(start_row(clamp=True), 2 * u - 0.5, None)
    torch.testing.assert_close(clamped, (4 * u - 2).clamp(-1, 1))
    assert not np.isfinite(start_row(0.7, clamp=True)[4:6]).any()
    torch.testing.assert_close(interpreter.step(diffusion_row(0.7), x, z=z), noised)


def two_rows() -> Rows:
    rows = np.stack([blank_row(), blank_row()])
    rows[0, [plan.V, plan.D, plan.E]] = 0.5, 0.1, 0.2
    rows[1, [plan.V, plan.C]] = 0.5, 0.3
    return Rows(rows, np.array([0.2, 0.1]))


def test_finished_plans() -> None:
    made = make_plan("m", start_row(0.7), two_rows(), clamp_output=True)
    assert (made.num_steps, made.num_noise, made.num_network_calls) == (2, 2, 2)
    assert made.start_noisy
    assert made.guided.tolist() == [False, True]
    assert made.noisy.tolist() == [True, False]
    assert made.uses_attacked
    assert made.coeffs[:, plan.OUT_SCALE].tolist() == [1.0, 0.5]
    assert made.coeffs[:, plan.OUT_BIAS].tolist() == [0.0, 0.5]
    assert made.coeffs[1, [plan.OUT_LO, plan.OUT_HI]].tolist() == [-1.0, 1.0]
    assert np.isinf(made.coeffs[0, [plan.OUT_LO, plan.OUT_HI]]).all()
    assert made.coeffs.dtype == np.float64
    free = make_plan(
        "m", start_row(), two_rows(), clamp_output=False, guidance_norm="clipped",
        guidance_max_norm=2.0,
    )  # fmt: skip
    assert not free.start_noisy
    assert np.isinf(free.coeffs[:, [plan.OUT_LO, plan.OUT_HI]]).all()
    assert free.coeffs[:, plan.G_MAX].tolist() == [2.0, 2.0]


def test_joined_rounds() -> None:
    between = Rows(diffusion_row(0.7)[None], np.array([np.nan]))
    made = make_plan(
        "m", start_row(0.7), joined([two_rows(), between, two_rows()]), clamp_output=False
    )
    assert (made.num_steps, made.num_network_calls, made.num_noise) == (5, 4, 4)
    assert made.coeffs[:, plan.OUT_SCALE].tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_plans_describe_themselves() -> None:
    text = make_plan("name", start_row(0.7), two_rows(), clamp_output=True).table()
    lines = text.splitlines()
    assert lines[0] == "name: 2 rows, 2 noise tensors"
    assert "std=0.54772256" in lines[1]
    assert lines[2].split() == ["0", "t=0.2", "v=0.5", "e=0.2", "d=0.1"]
    assert "out_bias=0.5" in lines[3]


def test_plans_that_act_differently_have_other_digests() -> None:
    """The same coefficients under another norm, or ADP's γ measured at another distance."""

    def digest(method: str, kind: str = "eps", **options: object) -> str:
        return methods.plan(method, VPSchedule(), kind, num_steps=2, **options).digest

    coup = [
        digest("coup"),
        digest("coup", guidance_norm="normalised"),
        digest("coup", guidance_solver="stable"),
    ]
    ddpm = [digest("ddpm"), digest("ddpm", variance="learned")]
    adp = [digest("adp", "ncsn"), digest("adp", "ncsn", delta=2e-3, step_lambda=0.025)]
    for digests in (coup, ddpm, adp):
        assert len(set(digests)) == len(digests)
    assert digest("coup") == digest("coup", guidance_norm="none")
