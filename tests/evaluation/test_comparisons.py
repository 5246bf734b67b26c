"""Two defences compared image by image: the statistics against others', and in reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import eval_models
from scipy.stats import binomtest, multinomial

from coup_fast.cli import main
from coup_fast.evaluation.config import from_dict, met, read_toml
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.paired import Paired, count_pairs, holm
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.state import StateError

LAMBDA_0 = "COUP without guidance (λ=0)"


@pytest.mark.parametrize(
    ("won", "lost"), [(0, 0), (1, 0), (0, 7), (5, 5), (9, 2), (25, 7), (400, 480), (3, 1500)]
)
def test_p_is_that_of_the_exact_sign_test(won: int, lost: int) -> None:
    want = binomtest(won, won + lost).pvalue if won + lost else 1.0
    got = Paired(3, won, lost, 4).p
    assert got == pytest.approx(want, rel=1e-9)
    assert got == Paired(4, lost, won, 3).p


# Fagerland, Lydersen, Laake, "Statistical Analysis of Contingency Tables" (2017), chapter 8:
# Newcombe's square-and-add interval for the data of Bentur et al. (2009) and Cavo et al. (2012), to
# as many digits as the book and its R package contingencytables print.
PUBLISHED = [
    ((1, 1, 7, 12), (-0.507, -0.026), 3),
    ((59, 6, 16, 80), (-0.1186, -0.0046), 4),
]


@pytest.mark.parametrize(("counts", "ends", "digits"), PUBLISHED)
def test_intervals_are_newcombes(
    counts: tuple[int, ...], ends: tuple[float, float], digits: int
) -> None:
    found = Paired(*counts).interval()
    assert tuple(round(end, digits) for end in found) == ends
    both, won, lost, neither = counts
    swapped = Paired(both, lost, won, neither).interval()
    assert swapped == pytest.approx((-found[1], -found[0]), abs=1e-15)


@pytest.mark.parametrize("truth", [(0.6, 0.15, 0.1, 0.15), (0.8, 0.03, 0.03, 0.14)])
def test_intervals_hold_the_difference_as_often_as_they_say(truth: tuple[float, ...]) -> None:
    samples = multinomial(120, truth, seed=3).rvs(2000)
    held = 0
    for counts in samples.tolist():
        low, high = Paired(*counts, confidence=0.9).interval()
        held += low <= truth[1] - truth[2] <= high
    assert 0.88 < held / len(samples) < 0.94


def test_extreme_counts_have_an_interval_within_bounds() -> None:
    one_cell = [(9, 0, 0, 0), (0, 9, 0, 0), (0, 0, 9, 0), (0, 0, 0, 9)]
    for counts in [*one_cell, (5, 4, 0, 0), (1, 0, 0, 0)]:
        one = Paired(*counts)
        low, high = one.interval()
        assert -1.0 <= low <= one.difference <= high <= 1.0
    nothing = Paired(0, 0, 0, 0)
    assert math.isnan(nothing.difference)
    assert nothing.interval() == (-1.0, 1.0)
    assert nothing.as_dict()["difference"] is None


def test_images_are_counted_in_pairs() -> None:
    found = count_pairs([True, True, False, False, True], [True, False, True, False, True])
    assert found == Paired(2, 1, 1, 1)
    assert (found.a.rate, found.b.rate) == (0.6, 0.6)
    with pytest.raises(ValueError, match="same images, got 2 and 1"):
        count_pairs([True, True], [True])
    with pytest.raises(ValueError, match="must not be negative"):
        Paired(1, -1, 0, 0)
    with pytest.raises(ValueError, match="confidence"):
        Paired(1, 1, 0, 0, confidence=1.0)


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        values = (torch.rand(7, generator=generator) ** 4).tolist()
        adjusted = holm(values)
        for alpha in (0.01, 0.05, 0.2):
            rejected: set[int] = set()  # as published: stop at the first that is too large
            for rank, i in enumerate(sorted(range(7), key=values.__getitem__)):
                if values[i] > alpha / (7 - rank):
                    break
                rejected.add(i)
            assert rejected == {i for i, p in enumerate(adjusted) if p <= alpha}


COMPARE = """
[[compare]]
a = "COUP"
b = "COUP without guidance (λ=0)"
[[compare]]
a = "COUP"
b = "undefended"
"""


def stated(tmp_path: Path, text: str = COMPARE) -> dict:
    path = tmp_path / "given.toml"
    path.write_text(text, encoding="utf-8")
    return {**eval_models.tables(), **read_toml(path)}


def run(tables: dict, out: Path) -> Report:
    data = eval_models.images(6)
    report = evaluate(from_dict(tables), out, models=eval_models.load, data=data)
    assert report is not None
    return report


def test_stated_comparisons_are_in_every_form_of_the_report(tmp_path: Path) -> None:
    report = run(stated(tmp_path), tmp_path)
    rows = report.config.rows
    right = {}
    for path in (tmp_path / "state").glob("batch-*.json"):
        unit = json.loads(path.read_text(encoding="utf-8"))
        row, result = rows[unit["row"]], unit["result"]
        for sample, draws, label in zip(
            result["sample_ids"], result["predictions"], result["labels"], strict=True
        ):
            right[row.defence.name, row.attack, sample] = draws[0] == label
    # Clean images, and the attack by the exact gradient, which a classifier meets without draws.
    attack = next(r.attack for r in rows if r.attack is not None and r.defence.name == "COUP")
    want = [
        ("COUP", LAMBDA_0, None, "none"),
        ("COUP", LAMBDA_0, attack, "PGD-2 ce, EOT 2, exact gradient, ℓ∞ 0.1"),
        ("COUP", "undefended", None, "none"),
        ("COUP", "undefended", attack, "PGD-2 ce, ℓ∞ 0.1"),
    ]
    assert [(c.a, c.b, c.attack) for c in report.comparisons] == [
        (a, b, label) for a, b, _, label in want
    ]
    for found, (a, b, under, _) in zip(report.comparisons, want, strict=True):
        other = under.replace(eot=1) if under is not None and b == "undefended" else under
        pairs = [(right[a, under, i], right[b, other, i]) for i in range(6)]
        assert found.counts.won == pairs.count((True, False))
        assert found.counts.lost == pairs.count((False, True))
        assert found.counts.both == pairs.count((True, True))
    assert [c.p_holm for c in report.comparisons] == holm([c.counts.p for c in report.comparisons])
    markdown = report.markdown()
    assert "won : lost, p" in markdown
    assert "Holm" in markdown
    as_json = report.as_dict()["comparisons"]
    assert as_json == [c.as_dict() for c in report.comparisons]
    assert json.loads(json.dumps(as_json))[0]["b"] == LAMBDA_0
    assert LAMBDA_0 in report._repr_html_()
    assert report.comparison_table() in report.tables()


def test_an_attack_is_compared_as_it_runs_on_each_defence(tmp_path: Path) -> None:
    """adaptive-guided takes fewer gradients without guidance, and fewer draws without noise."""
    attacks = [
        {"preset": "adaptive-guided", "steps": 1, "restarts": 1, "finish_steps": 0, "eps": 0.1},
        {"preset": "stopped", "steps": 1, "eot": 1, "eps": 0.1},
        {"preset": "classifier", "steps": 1, "eps": 0.1, "defences": ["COUP"]},
    ]
    text = COMPARE + f'[[compare]]\na = "{LAMBDA_0}"\nb = "undefended"\n'
    report = run({**stated(tmp_path, text), "attack": attacks}, tmp_path)
    found = [(c.a, c.b, c.attack) for c in report.comparisons]
    # COUP met three attacks, and its twin one: nothing is said of the worst.
    adaptive = "AdaptiveGuided-1 ce, ℓ∞ 0.1"
    pairs = [("COUP", LAMBDA_0), ("COUP", "undefended"), (LAMBDA_0, "undefended")]
    assert found == [(*pair, attack) for pair in pairs for attack in ("none", adaptive)]


def test_weak_parts_of_an_attack_need_a_purifier(tmp_path: Path) -> None:
    """On the bare classifier the honest parts run; a weak row says why, whatever follows it."""
    attack = {"preset": "adaptive-guided", "steps": 1, "restarts": 1, "finish_steps": 0, "eps": 0.1}
    attacks = [
        {**attack, "gradients": ["bpda", "exact"]},
        {**attack, "gradients": ["unguided", "stopped"], "noise": "fixed"},
    ]
    report = run({**stated(tmp_path, COMPARE), "attack": attacks}, tmp_path)
    met = {
        name: [
            line.row.attack.gradients
            for line in report.lines
            if line.row.defence.name == name and line.row.attack and not line.union
        ]
        for name in ("undefended", LAMBDA_0, "COUP")
    }
    assert met["undefended"] == [("exact",), ("exact",)]
    assert met[LAMBDA_0] == [("bpda", "exact"), ("exact",)]
    assert met["COUP"] == [("bpda", "exact"), ("unguided", "stopped")]
    notes = "\n".join(report.notes())
    assert "weak (unguided): the attack leaves the guidance out" in notes
    assert "weak (bpda)" not in notes
    assert "Rows of fixed noise are another case" in notes


def test_labels_tell_attacks_apart_by_the_options_that_differ(tmp_path: Path) -> None:
    adaptive = {"preset": "adaptive-guided", "steps": 1, "restarts": 1, "finish_steps": 0}
    pgd = {"preset": "pgd40", "steps": 1, "eot": 1}
    more = [
        adaptive,
        {**adaptive, "normalise_draws": False},
        {**adaptive, "low_frequency": 0.25},
        {**pgd, "step_size": 0.1},
        {**pgd, "step_size": 0.2},
    ]
    attacks = [{**attack, "eps": 0.3, "defences": ["COUP", LAMBDA_0]} for attack in more]
    report = run({**stated(tmp_path, COMPARE), "attack": attacks}, tmp_path)
    labels = [
        line.attack_label
        for line in report.lines
        if line.row.defence.name == "COUP" and line.row.attack and not line.union
    ]
    assert len(set(labels)) == len(labels) == 5
    compared = [one.attack for one in report.comparisons if one.b == LAMBDA_0]
    assert len(set(compared)) == len(compared) == 7  # clean images and the worst on each beside
    assert labels[1].endswith(" (normalise_draws=False), ℓ∞ 0.3")
    assert "low_frequency" not in labels[2]  # the kind of the attack says it
    assert labels[3:] == [
        f"PGD-1 ce, EOT 1, exact gradient (step_size={s}), ℓ∞ 0.3" for s in (0.1, 0.2)
    ]
    assert all(label in report.csv() for label in labels[:2])


@pytest.mark.parametrize("more", [[], ["stopped"]])  # which only a guided defence meets
def test_defences_are_compared_under_the_worst_of_their_attacks(
    more: list[str], tmp_path: Path
) -> None:
    attacks = [
        {"preset": "pgd40", "steps": 1, "eot": 1, "eps": 0.3},
        {"preset": "square", "steps": 3, "eot": 1, "eps": 0.3},
        {"preset": "pgd40", "steps": 1, "eot": 1, "eps": 0.1},
        *({"preset": name, "steps": 1, "eot": 1, "eps": 0.3} for name in more),
    ]
    text = f'[[compare]]\na = "COUP"\nb = "{LAMBDA_0}"\n'
    report = run({**stated(tmp_path, text), "attack": attacks}, tmp_path)
    *rest, last = report.comparisons
    unlike = ", of 3 and 2 attacks" if more else ""
    assert last.attack == f"the worst on each image{unlike}, ℓ∞ 0.3"
    assert not any("worst" in comparison.attack for comparison in rest)
    unions = {line.row.defence.name: line for line in report.lines if line.union}
    for name, found in (("COUP", last.counts.a), (LAMBDA_0, last.counts.b)):
        assert unions[name].attacked is not None
        assert found == unions[name].attacked.one_draw


def test_the_attack_on_a_classifier_is_what_the_bare_classifier_meets() -> None:
    same = {"steps": 2, "eps": 0.1, "step_size": 0.02}
    attacks = [{"preset": name, **same} for name in ("pgd40", "stopped", "classifier")]
    rows = from_dict({**eval_models.tables(), "attack": attacks}).rows
    (bare,) = (row for row in rows if row.defence.name == "undefended" and row.attack is not None)
    met_too = [row.attack.gradient for row in rows if row.defence.name == "COUP" and met(bare, row)]
    assert met_too == ["exact", "classifier"]


def test_a_report_without_comparisons_says_nothing_about_them(tmp_path: Path) -> None:
    report = run(eval_models.tables(), tmp_path)
    assert report.comparisons == report.as_dict()["comparisons"] == []
    assert report.tables() == report.table()
    assert "Holm" not in report.markdown()
    assert "compare" not in report.identity["config"]


def test_comparisons_belong_to_the_run_that_they_were_stated_for(tmp_path: Path) -> None:
    run(eval_models.tables(), tmp_path)
    with pytest.raises(StateError, match=r"holds another evaluation: config\.compare"):
        run(stated(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ([{"a": "COUP", "b": "COOP"}], r"b of \[\[compare\]\] .*'COOP'.*did you mean 'COUP'"),
        ([{"a": "COUP"}], r"\[\[compare\]\] needs two names"),
        ([{"a": "COUP", "b": "COUP"}], "'COUP' twice"),
        (
            [{"a": "COUP", "b": "undefended"}, {"a": "undefended", "b": "COUP"}],
            "'undefended' and 'COUP' twice",
        ),
        ([{"a": "COUP", "b": "undefended", "c": 1}], r"\[\[compare\]\] has no 'c'"),
        ([{"a": 1, "b": "COUP"}], r"a of \[\[compare\]\] .*got 1"),
        ("COUP", r"each under \[\[compare\]\]"),
    ],
)
def test_wrong_comparisons_are_refused(compare: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        from_dict({**eval_models.tables(), "compare": compare})


def test_the_command_prints_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    import numpy as np

    images, labels = eval_models.images(6)
    np.savez("images.npz", images=images.numpy(), labels=labels.numpy())
    config = tmp_path / "config.toml"
    config.write_text(eval_models.TOML.format(images=4) + COMPARE, encoding="utf-8")
    assert main(["eval", str(config), "--out", "out", "--no-progress"]) == 0
    assert "won : lost, p" in capsys.readouterr().out
    report = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    assert len(report["comparisons"]) >= 2
