"""The self-test of gradients, and torchsde's adjoint beside the exact gradient."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images, score_model

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, check_gradient
from coup_fast.gradient_check import GradientRow
from coup_fast.gradient_check import adjoint as adjoint_module
from coup_fast.gradient_check.adjoint import AdjointRun, why_not

ROWS = ["autograd", "exact", "stopped guidance", "bpda", "adjoint"]


def purifier(method: str = "coup", dtype=torch.float32, **options) -> Purifier:
    model, classifier = score_model(SHORT[method][0]).to(dtype), TinyClassifier().to(dtype)
    return Purifier(model, classifier, method=method, **options)


def defence(method: str = "coup", dtype=torch.float32, draws=1, vote="logits", **options):
    clean = purifier(method, dtype, **options)
    return PurifiedClassifier(clean, clean.classifier, draws, vote)


@pytest.mark.parametrize("method", sorted(SHORT))
def test_passes_for_every_method(method: str) -> None:
    check = check_gradient(defence(method), images(), steps=3)
    assert check.passed
    assert [row.name for row in check.rows] == ROWS
    assert check["autograd"].relative_error == 0.0
    assert check["exact"].relative_error <= 1e-4
    assert check["exact"].cosine == pytest.approx(1.0)
    assert check["exact"].sign_agreement > 0.999
    assert check["bpda"].relative_error > 1e-3
    guided = method.startswith("coup")
    assert (check["stopped guidance"].relative_error is not None) == guided
    assert (check["adjoint"].relative_error is not None) == (why_not(purifier(method)) is None)
    for row in check.rows:
        assert (row.relative_error is None) == row.note.startswith("not run: ")


def test_prints_a_table_with_reasons() -> None:
    text = str(check_gradient(defence("adp", draws=2), images(), torch.tensor([0, 1, 2])))
    lines = text.splitlines()
    assert lines[0] == "gradients of adp on 4 of 10 steps (longer steps), 3 images, 2 draws"
    assert lines[1].split() == ["error", "cosine", "signs", "seconds"]
    assert "not run: the method is not guided" in text
    assert "not run: adp is not an SDE" in text
    assert lines[-1] == "the exact gradient is plain autograd's, to a relative error of 1e-04"


def test_a_wrong_exact_gradient_fails_the_check() -> None:
    from dataclasses import replace

    check = check_gradient(defence(), images(), steps=2)
    rows = tuple(
        GradientRow("exact", 0.01, 1.0, 1.0, 0.0) if row.name == "exact" else row
        for row in check.rows
    )
    wrong = replace(check, rows=rows)
    assert not wrong.passed
    assert "IS NOT" in str(wrong)
    with pytest.raises(KeyError, match=r"'finite differences'.*autograd, exact"):
        check["finite differences"]


@pytest.mark.parametrize("chain", ["longer steps", "first steps"])
@pytest.mark.parametrize("vote", ["logits", "softmax", "majority"])
def test_float64_with_votes_on_both_chains(vote: str, chain: str) -> None:
    model = defence("coup", torch.float64, 3, vote)
    check = check_gradient(model, images(dtype=torch.float64), steps=5, chain=chain, draw=3)
    assert check.tolerance == 1e-10
    assert check.passed
    assert (check.steps, check.full_steps, check.draws) == (5, 100, 3)
    assert float(check["adjoint"].note.split()[-1]) < 1e-10  # the same computation forwards
    assert check["adjoint"].relative_error > 1e-6
    assert model.purifier.plan.num_steps == 100


def test_bad_arguments_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chain .*longer steps, first steps.*'all'"):
        check_gradient(defence(), images(), chain="all")
    with pytest.raises(ValueError, match=r"^steps .* 0"):
        check_gradient(defence(), images(), steps=0)
    model = defence()
    model.purifier.score_model.network.first = torch.nn.Sequential(
        torch.nn.Dropout(0.5), model.purifier.score_model.network.first
    )
    with pytest.raises(ValueError, match=r"Dropout, ScoreModel\.network\.first\.0"):
        check_gradient(model, images())


def test_a_missing_torchsde_is_said(monkeypatch) -> None:
    monkeypatch.setattr(adjoint_module.importlib.util, "find_spec", lambda name: None)
    check = check_gradient(defence(), images(), steps=2)
    assert check.passed
    assert "torchsde is not installed" in check["adjoint"].note


def test_short_chains_are_the_methods_own_steps() -> None:
    full = purifier("coup")
    short = full.with_plan(full.plan.first(3))
    u = images()
    states = dict(full.trajectory(u))
    torch.testing.assert_close(short(u), states[3].clamp(0, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(full.with_plan(full.plan.first(200))(u), full(u))
    longer = full.with_options(num_steps=4)
    assert torch.equal(longer(u), purifier("coup", num_steps=4)(u))
    assert full.plan.num_steps == 100


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("adp", {}, "adp is not an SDE"),
        ("vp-ode", {}, "Euler-Maruyama"),
        ("coup", {"solver": "exponential"}, "Euler-Maruyama"),
        ("coup", {"clip_denoised": True}, "Euler-Maruyama"),
        ("coup", {"guidance_norm": "normalised"}, "normalised per sample"),
        ("gradual", {}, "Euler-Maruyama"),
    ],
)
def test_where_the_adjoint_does_not_apply_it_says_why(method: str, options, reason: str) -> None:
    clean = purifier(method, **options)
    assert reason in (why_not(clean) or "")
    with pytest.raises(ValueError, match=reason):
        AdjointRun(clean, images())


def test_the_adjoint_needs_a_vp_network_of_eps_or_score() -> None:
    clean = Purifier(ScoreModel(TinyNetwork(), "x0"), TinyClassifier(), method="coup")
    assert "eps or score" in (why_not(clean) or "")
    assert why_not(Purifier(ScoreModel(TinyNetwork(), "score"), method="diffpure")) is None


@pytest.mark.parametrize("method", ["diffpure", "coup"])
def test_the_adjoint_approaches_the_exact_gradient_as_steps_get_shorter(method: str) -> None:
    u = images(1, dtype=torch.float64)
    cotangent = torch.linspace(-1, 1, u.numel(), dtype=u.dtype).view_as(u)
    errors = []
    for step_size in (4e-3, 2e-3, 1e-3):
        clean = purifier(method, torch.float64, step_size=step_size, t_star=0.05)
        run = AdjointRun(clean, u)
        purified, approximate = run.gradient(u, cotangent)
        leaf = u.clone().requires_grad_()
        out = clean(leaf, noise=run.noise)
        torch.testing.assert_close(purified, out.detach(), rtol=1e-9, atol=1e-9)
        (exact,) = torch.autograd.grad(out, leaf, cotangent)
        errors.append(float((approximate - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.4 * errors[0]
    frozen = run.gradient(u, cotangent)[1]
    trainable = AdjointRun(clean, u, trainable=True).gradient(u, cotangent)[1]
    torch.testing.assert_close(trainable, frozen)
    assert all(p.grad is None and p.requires_grad for p in clean.parameters())
