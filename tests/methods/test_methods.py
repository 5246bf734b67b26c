"""The published methods: their numbers, their options, and their algorithms transcribed."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from helpers import interpreter
from helpers.tiny import SHORT

from coup_fast import methods, plan
from coup_fast.plan import X0_HI, X0_LO, AdaptivePlan, C, D, E, Plan, U, V, W
from coup_fast.schedules import DiscreteSchedule, EDMSchedule, VPSchedule

VP = VPSchedule()


def build(name: str, schedule=VP, kind: str | None = None, **options) -> Plan:
    kind = (SHORT[name][0] if name in SHORT else "eps") if kind is None else kind
    return methods.plan(name, schedule, kind, **options)


def row_at(made: Plan, t: float) -> np.ndarray:
    return made.coeffs[int(np.argmin(np.abs(made.times - t)))]


# --- docs/methods.md, "Numbers to check an implementation by" and "Published settings" ----------


@pytest.mark.parametrize(
    ("t", "a", "b", "c", "d"),
    [
        (0.150, "1.00154250", "-0.00669251", "0.00308500", "0.05554278"),
        (0.100, "1.00104500", "-0.00648962", "0.00209000", "0.04571652"),
        (0.075, "1.00079625", "-0.00642176", "0.00159250", "0.03990614"),
        (0.050, "1.00054750", "-0.00638257", "0.00109500", "0.03309078"),
    ],
)
def test_euler_maruyama_rows(t: float, a: str, b: str, c: str, d: str) -> None:
    for name, scale in (("coup", 1.0), ("diffpure", 0.0)):
        row = row_at(build(name, t_star=0.15), t)
        assert [f"{row[k]:.8f}" for k in (V, W, D)] == [a, b, d]
        assert f"{row[C]:.8f}" == (c if scale else "0.00000000")
        assert row[[U, E]].tolist() == [0.0, 0.0]
    ode = row_at(build("vp-ode", t_star=0.15), t)
    assert [f"{ode[V]:.8f}", ode[D]] == [a, 0.0]
    assert ode[W] == pytest.approx(float(b) / 2, abs=5e-9)


def test_euler_maruyama_row_of_a_full_step_at_t_0_001() -> None:
    """docs/methods.md lists h = 1e-3 here; the last real step is 0.99e-3."""
    row = methods.coup(VP, step_size=1e-3, t_star=0.00101).coeffs[0]
    h = 0.001  # from 0.00101 to T_END in one step
    beta = 0.1 + 19.9 * 0.00101
    assert row[V] == pytest.approx(1 + 0.5 * beta * h, rel=1e-12)
    a, b, d = (1 + 0.5 * 0.1199 * h, -0.1199 * h / VP.sigma(0.001), math.sqrt(0.1199 * h))
    assert [f"{a:.8f}", f"{b:.8f}", f"{d:.8f}"] == ["1.00005995", "-0.01143493", "0.01094989"]
    last = build("coup").coeffs[-1]
    assert last[V] == pytest.approx(1 + 0.99 * (a - 1), rel=1e-12)
    assert last[W] == pytest.approx(0.99 * b, rel=1e-9)
    assert last[D] == pytest.approx(math.sqrt(0.99) * d, rel=1e-9)


@pytest.mark.parametrize(("t_star", "steps"), [(0.075, 75), (0.1, 100), (0.125, 125), (0.15, 150)])
def test_grid(t_star: float, steps: int) -> None:
    for options in ({}, {"num_steps": steps}, {"step_size": 1e-3}):
        made = build("coup", t_star=t_star, **options)
        assert made.num_steps == steps
        np.testing.assert_allclose(made.times, np.arange(steps, 0, -1) * 1e-3, rtol=1e-9)
        lengths = (made.coeffs[:, V] - 1) / (0.5 * VP.beta(made.times))
        np.testing.assert_allclose(lengths[:-1], 1e-3, rtol=1e-9)
        assert lengths[-1] == pytest.approx(0.99e-3, rel=1e-9)
    # the loop that the grid stands for, with its floating-point drift
    t, count = 1 - t_star, 0
    while t < 1 - 1e-5:
        t, count = min(t + 1e-3, 1 - 1e-5), count + 1
    assert count == steps


def test_forward_diffusion_is_discrete() -> None:
    start = build("diffpure").start
    assert f"{start[0] / 2:.8f} {start[2]:.8f}" == "0.94711042 0.32090786"
    assert start[1] == -start[0] / 2
    assert build("diffpure", t_star=0.0755).start[2] > build("diffpure", t_star=0.075).start[2]


@pytest.mark.parametrize("name", ["coup", "diffpure"])
def test_short_chains_are_ten_exponential_steps(name: str) -> None:
    made = build(f"{name}-short")
    expected = build(name, num_steps=10, solver="exponential")
    np.testing.assert_array_equal(made.coeffs, expected.coeffs)
    np.testing.assert_array_equal(made.start, expected.start)


def test_published_defaults() -> None:
    """docs/methods.md, Published settings: steps, noise tensors, guidance, clamps."""
    expected = {
        "coup": (100, 100, True, True),
        "coup-l2": (75, 75, True, True),
        "coup-short": (10, 10, True, True),
        "diffpure": (100, 101, False, False),
        "diffpure-l2": (75, 76, False, False),
        "diffpure-short": (10, 11, False, False),
        "diffpure-imagenet": (150, 151, False, False),
        "vp-ode": (100, 1, False, False),
        "ldsde": (10, 10, False, False),
        "ddpm": (500, 500, False, False),
        "ddim": (100, 1, False, False),
        "gdmp": (4 * 36 + 3, 4 * 36 + 4, False, True),
        "gradual": (4 * 30 + 2 * 50 + 2 * 125 + 7, 4 * 29 + 2 * 49 + 2 * 124 + 8, False, False),
        "one-shot": (1, 1, False, True),
        "consistency": (2, 2, False, True),
        "flowpure": (9, 1, False, False),
        "langevin": (1500, 1500, False, False),
    }
    assert set(expected) | {"adp"} == set(methods.METHODS)
    for name, numbers in expected.items():
        made = build(name)
        clamped = bool(np.isfinite(made.coeffs[-1, [plan.OUT_LO, plan.OUT_HI]]).all())
        assert (made.num_steps, made.num_noise, bool(made.guided.any()), clamped) == numbers, name
        assert made.method == name
        assert made.coeffs[-1, [plan.OUT_SCALE, plan.OUT_BIAS]].tolist() == [0.5, 0.5]
        assert made.uses_attacked == (name in ("ldsde", "gdmp"))
    coup = build("coup").start
    assert coup.tolist() == [2.0, -1.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0.0]


def test_adp_defaults() -> None:
    made = build("adp")
    assert isinstance(made, AdaptivePlan)
    assert (made.num_steps, made.num_noise, made.num_network_calls, made.delta) == (10, 1, 20, 1e-3)
    np.testing.assert_allclose(made.start, [1, 0, 0.25, 0, 0, 1, 255 / 256, 1 / 512])
    row = [5e-5, 1e-5, 0.1, 1e-3, 256 / 255, -1 / 510, 0, 1]
    np.testing.assert_allclose(made.coeffs, np.tile(row, (10, 1)))
    binary = build("adp", noise_variant="binary").start
    assert binary[2:4].tolist() == [0.0, pytest.approx(0.25 * math.sqrt(2 / math.pi))]
    once = build("adp", pixel_map_every_step=False).coeffs
    assert once[0, 4] == 256 / 255
    assert once[1:, 4:6].tolist() == [[1.0, 0.0]] * 9


def test_the_contrast_drift_of_adp_under_a_zero_step() -> None:
    """docs/methods.md, ADP: T⁻¹ ten times takes a pixel from 0.8984 to 0.9143.

    A run applies T once at the start and T⁻¹ ten times: nine maps too many.
    """
    made = build("adp", sigma=0.0)
    x = interpreter.start(made.start, torch.tensor([[0.8984]], dtype=torch.float64), None)
    for row in made.coeffs:
        x = row[4] * x + row[5]
    assert float(x) == pytest.approx(0.8984 + 9 * (0.8984 - 0.5) / 255, abs=5e-4)
    x = torch.tensor([[0.8984]], dtype=torch.float64)
    for row in made.coeffs:
        x = row[4] * x + row[5]
    assert float(x) == pytest.approx(0.9143, abs=5e-5)


def test_ldsde_row() -> None:
    row = build("ldsde").coeffs[0]
    h, sigma2, rate, eta = 1e-2, 1e-3, 1e-2, 5.0
    assert row[V] == pytest.approx(1 - h * rate / (2 * sigma2))
    assert row[W] == pytest.approx(-h * rate / (2 * VP.sigma(0.01)))
    assert row[E] == pytest.approx(h * rate / (2 * sigma2))
    assert row[D] == pytest.approx(eta * math.sqrt(rate * h))
    assert np.unique(build("ldsde").times).tolist() == [0.01]


def test_ddpm_rows() -> None:
    schedule = DiscreteSchedule()
    made = build("ddpm", schedule, t_star=0.1)
    for k, i in ((0, 99), (50, 49), (99, 0)):
        beta, alpha_bar = schedule.betas[i], float(schedule.alpha_bar(i))
        previous = float(schedule.alpha_bar(i - 1))
        row, alpha = made.coeffs[k], 1 - beta
        assert made.times[k] * 1000 == pytest.approx(i)
        assert row[V] == pytest.approx(1 / math.sqrt(alpha), rel=1e-12)
        assert row[W] == pytest.approx(-beta / math.sqrt(alpha * (1 - alpha_bar)), rel=1e-9)
        small = beta * (1 - previous) / (1 - alpha_bar)
        assert row[D] == pytest.approx(math.sqrt(small) if i else 0.0, rel=1e-9)
        clipped = build("ddpm", schedule, t_star=0.1, clip_denoised=True).coeffs[k]
        assert clipped[U] == pytest.approx(math.sqrt(previous) * beta / (1 - alpha_bar), rel=1e-9)
        assert clipped[V] == pytest.approx(
            math.sqrt(alpha) * (1 - previous) / (1 - alpha_bar), rel=1e-9, abs=1e-15
        )
        assert clipped[[X0_LO, X0_HI]].tolist() == [-1.0, 1.0]
    large = build("ddpm", schedule, t_star=0.1, variance="fixed-large").coeffs
    assert large[0, D] == pytest.approx(math.sqrt(schedule.betas[99]))


@pytest.mark.parametrize("count", [1, 2, 36])
def test_index_0_has_the_posterior_variance_of_index_1(count: int) -> None:
    """logvar[0] = log(posterior_variance[1]) in released code, however short the run."""
    schedule = DiscreteSchedule()
    now, then = (float(schedule.alpha_bar(i)) for i in (1, 0))
    floor = schedule.betas[1] * (1 - then) / (1 - now)
    large = build("ddpm", schedule, t_star=count / 1000, variance="fixed-large", guidance_scale=2.0)
    assert large.coeffs[-1, C] == pytest.approx(2 * floor, rel=1e-9)
    learned = build("ddpm", schedule, t_star=count / 1000, variance="learned").coeffs[-1]
    assert learned[plan.LOG_VAR_LO] == pytest.approx(math.log(floor), rel=1e-9)
    kappa = 2 * floor * 3 * 60000 * 255 / 16 / 307200 * math.sqrt((1 - then) / then)
    drawn = build("gdmp", schedule, t_star=count / 1000, rounds=1).coeffs[-1]
    assert drawn[E] == pytest.approx(kappa * math.sqrt(then), rel=1e-9)


def test_ddim_row() -> None:
    schedule, eta = DiscreteSchedule(), 0.6
    row = build("ddim", schedule, eta=eta).coeffs[40]
    now, then = (float(schedule.alpha_bar(i)) for i in (59, 58))
    c1 = eta * math.sqrt((1 - now / then) * (1 - then) / (1 - now))
    assert row[D] == pytest.approx(c1, rel=1e-12)
    assert row[V] == pytest.approx(math.sqrt(then / now), rel=1e-12)
    b = math.sqrt(1 - then - c1**2) - math.sqrt(then * (1 - now) / now)
    assert row[W] == pytest.approx(b, rel=1e-9)


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_signature_docstring_and_options(name: str) -> None:
    function = methods.METHODS[name]
    assert function is getattr(methods, name.replace("-", "_"))
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.name for p in parameters[:2]] == ["schedule", "kind"]
    assert {p.name: p.default for p in parameters[2:]} == methods.options(name)
    doc = inspect.getdoc(function)
    assert "20" in doc  # a year, so a source
    relatives = (methods.coup, methods.ddpm, methods.ddim)  # whose options others refer to
    mentioned = doc + "".join(inspect.getdoc(relative) for relative in relatives)
    for option in methods.options(name):
        assert option in mentioned, option
    assert function(VP, SHORT[name][0]).method == name


@pytest.mark.parametrize("name", [n for n in methods.METHODS if n != "adp"])
def test_guidance_is_offered_everywhere(name: str) -> None:
    kind, short = SHORT[name]
    made = build(name, kind=kind, **short | {"guidance_scale": 2.0})
    assert made.guided.sum() >= 1
    twice = build(name, kind=kind, **short | {"guidance_scale": 4.0})
    np.testing.assert_allclose(twice.coeffs[:, C], 2 * made.coeffs[:, C])
    off = build(name, kind=kind, **short | {"guidance_scale": 0.0})
    assert not off.guided.any()
    same = [k for k in range(plan.NUM_COLUMNS) if k != C]
    np.testing.assert_array_equal(off.coeffs[:, same], made.coeffs[:, same])
    clipped = build(
        name, **short, guidance_scale=1.0, guidance_norm="clipped", guidance_max_norm=0.5
    )
    assert clipped.guidance_norm == "clipped"
    assert (clipped.coeffs[:, plan.G_MAX] == 0.5).all()
    stable = build(name, kind=kind, **short | {"guidance_scale": 2.0, "guidance_solver": "stable"})
    assert stable.guidance_norm == "stable"
    np.testing.assert_array_equal(stable.coeffs, made.coeffs)


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'coop'.* coup, coup-l2"):
        build("coop")
    with pytest.raises(ValueError, match=r"'coup' .*'lambda_'.* t_star"):
        build("coup", lambda_=1.0)
    with pytest.raises(ValueError, match=r"'adp' .*'t_star'"):
        build("adp", t_star=0.1)
    with pytest.raises(TypeError):
        methods.coup_l2(VP, "eps", lambda_=1.0)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("coup", {"t_star": 0.0}, ValueError, r"t_star .*\(1e-05, 1\], got 0\.0"),
        ("coup", {"t_star": 1.5}, ValueError, "t_star"),
        ("coup", {"t_star": float("nan")}, ValueError, "t_star"),
        ("coup", {"t_star": "0.1"}, TypeError, "t_star .*'0.1'"),
        ("coup", {"t_star": True}, TypeError, "t_star"),
        ("coup", {"num_steps": 0}, ValueError, "num_steps .* 0"),
        ("coup", {"num_steps": 10.0}, TypeError, "num_steps"),
        ("coup", {"num_steps": 20_000}, ValueError, "num_steps"),
        ("coup", {"num_steps": 10, "step_size": 0.01}, ValueError, "num_steps.*step_size=0.01"),
        ("coup", {"step_size": 0.0}, ValueError, "step_size"),
        ("coup", {"guidance_scale": -1.0}, ValueError, "guidance_scale"),
        ("coup", {"guidance_scale": float("inf")}, ValueError, "guidance_scale"),
        ("coup", {"guidance_norm": "l2"}, ValueError, "guidance_norm .*clipped, got 'l2'"),
        ("coup", {"guidance_norm": "clipped"}, ValueError, "guidance_max_norm"),
        ("coup", {"guidance_max_norm": 1.0}, ValueError, "clipped"),
        ("coup", {"guidance_solver": "implicit"}, ValueError, "guidance_solver .*got 'implicit'"),
        (
            *("coup", {"guidance_solver": "stable", "guidance_norm": "normalised"}, ValueError),
            "guidance_solver=.stable. .*got guidance_norm='normalised'",
        ),
        (
            *("ddpm", {"guidance_solver": "stable", "variance": "learned"}, ValueError),
            "guidance_solver=.stable. .*variance=.learned.",
        ),
        (
            *("gdmp", {"guidance_solver": "stable", "variance": "learned"}, ValueError),
            "guidance_solver=.stable. .*variance=.learned.",
        ),
        ("coup", {"solver": "heun"}, ValueError, "solver .*got 'heun'"),
        ("coup", {"forward_noise": 1}, TypeError, "forward_noise .* 1"),
        ("vp-ode", {"clip_denoised": None}, TypeError, "clip_denoised"),
        ("ldsde", {"sigma2": 0.0}, ValueError, "sigma2"),
        ("ddpm", {"variance": "small"}, ValueError, "variance .*learned, got 'small'"),
        ("ddpm", {"t_star": 0.0004}, ValueError, "t_star"),
        ("ddpm", {"num_steps": 501}, ValueError, "num_steps"),
        ("ddim", {"eta": 1.5}, ValueError, "eta"),
        ("gradual", {"rounds": ()}, TypeError, "rounds"),
        ("gradual", {"rounds": (30, 0)}, ValueError, "rounds"),
        ("gradual", {"stride": 31}, ValueError, "stride"),
        ("gdmp", {"rounds": 0}, ValueError, "rounds"),
        ("gdmp", {"image_shape": 3}, TypeError, "image_shape"),
        ("gdmp", {"ptb": 0}, ValueError, "ptb"),
        ("adp", {"sigma": -0.1}, ValueError, "sigma"),
        ("adp", {"noise_variant": "uniform"}, ValueError, "noise_variant .*got 'uniform'"),
        ("adp", {"alpha_max": 1e-6}, ValueError, "alpha_max"),
        ("one-shot", {"sigma": 0.1, "t_star": 0.1}, ValueError, "sigma.*t_star"),
        ("one-shot", {"sigma": 1e4}, ValueError, "sigma=10000 "),
        ("consistency", {"sigmas": 0.25}, TypeError, "sigmas .*numbers, got 0.25"),
        ("consistency", {"sigmas": ()}, TypeError, "sigmas"),
        ("consistency", {"sigmas": (0.2, 0.0)}, ValueError, "each of sigmas .*got 0.0"),
        ("consistency", {"sigmas": (0.1, 0.2)}, ValueError, r"sigmas must fall.*\[0.1, 0.2\]"),
        ("consistency", {"sigmas": (1e4, 0.1)}, ValueError, "sigma=10000 "),
        ("flowpure", {"t_start": 1.0}, ValueError, r"t_start .*\[0, 1\), got 1.0"),
        ("flowpure", {"sigma": 0.0}, ValueError, "sigma"),
        ("flowpure", {"sigma": 1e4}, ValueError, "sigma=5000 "),
        ("flowpure", {"num_steps": 0}, ValueError, "num_steps"),
        ("langevin", {"gradient_scale": 0.0}, ValueError, "gradient_scale"),
        ("langevin", {"eta": -1.0}, ValueError, "eta"),
    ],
)
def test_bad_options(name: str, options: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build(name, **options)


def test_methods_and_networks_must_fit() -> None:
    with pytest.raises(ValueError, match=r"coup .*eps, score, x0, v, velocity, got kind 'ncsn'"):
        build("coup", kind="ncsn")
    with pytest.raises(ValueError, match=r"adp .*ncsn.* 'eps'"):
        build("adp", kind="eps")
    with pytest.raises(ValueError, match=r"coup .*VPSchedule.* EDMSchedule"):
        build("coup", EDMSchedule())
    with pytest.raises(ValueError, match="linear"):
        build("diffpure", DiscreteSchedule.cosine())
    with pytest.raises(ValueError, match=r"EDMSchedule .*x0.* 'eps'"):
        build("one-shot", EDMSchedule())
    build("ddim", DiscreteSchedule.cosine())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 36, 125])
def test_respaced_chains(count: int) -> None:
    for steps in range(1, count + 1):
        made = build("ddim", DiscreteSchedule(), t_star=count / 1000, num_steps=steps)
        used = np.round(made.times * 1000).astype(int).tolist()
        assert used[0] == count - 1
        assert len(set(used)) == steps
        assert used == sorted(used, reverse=True)
        assert used[-1] >= 0


def test_gradual_with_a_stride() -> None:
    made = build("gradual", DiscreteSchedule(), stride=5)
    assert made.num_network_calls == 4 * 6 + 2 * 10 + 2 * 25
    first = np.round(made.times[:6] * 1000).tolist()
    assert first == [29, 24, 19, 14, 9, 4]
