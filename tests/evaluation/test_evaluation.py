"""Proportions, tables, reports, measured defences and whole evaluations, against known values."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import eval_models, tiny
from torch import nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel
from coup_fast.attacks.pgd import PGD
from coup_fast.cli.demo_measures import measure_defence, operator_share, score
from coup_fast.cli.demo_pictures import GridRow, chosen_steps, image_grid
from coup_fast.evaluation import Proportion, accuracy, environment, render_table, write_json
from coup_fast.evaluation.config import from_dict, read_toml
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.intervals import Average
from coup_fast.evaluation.metrics import numbers, worst_curve
from coup_fast.evaluation.plots import AXES, series
from coup_fast.evaluation.report import Report
from coup_fast.run.aside import counts as is_counted
from coup_fast.stiffness import stiffness

NAMES = ("COUP", "again")


def check_wilson(share: Proportion | Average, rate: float) -> None:
    """Its ends are the rates p that a score test of the observed rate at 5 % just accepts."""
    z = 1.959963984540054
    low, high = share.interval()
    assert low <= share.rate == rate <= high
    for p in (low, high):
        assert (rate - p) ** 2 == pytest.approx(z * z * p * (1 - p) / share.total, abs=1e-14)
    assert (low == 0) == (rate == 0)
    assert (high == 1) == (rate == 1)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (3, 200), (190, 200), (7, 7), (1, 1)])
def test_intervals_are_wilsons(successes: int, total: int) -> None:
    check_wilson(Proportion(successes, total), successes / total)


def test_nothing_observed_is_nothing_known() -> None:
    empty = Proportion(0, 0)
    assert math.isnan(empty.rate)
    assert empty.interval() == (0.0, 1.0)
    assert empty.as_dict()["rate"] is None


@pytest.mark.parametrize(("successes", "total"), [(-1, 3), (4, 3)])
def test_impossible_proportions_are_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="is not a proportion"):
        Proportion(successes, total)


def test_accuracy_of_logits_and_of_labels() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    labels = torch.tensor([1, 0, 0])
    assert accuracy(logits, labels) == Proportion(2, 3)
    assert accuracy(logits.argmax(1), labels) == Proportion(2, 3)
    with pytest.raises(ValueError, match="do not fit"):
        accuracy(logits, labels[:2])


def test_tables_print_cells_as_they_are() -> None:
    text = render_table(["name", "n"], [["a", "1.50"], ["bb", None]], "markdown")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["name", "n"]
    assert lines[2:] == [["a", "1.50"], ["bb", ""]]
    with pytest.raises(ValueError, match="2 cells"):
        render_table(["name", "n"], [["a"]])


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_environment_is_json_and_names_what_ran() -> None:
    about = environment()
    assert json.loads(json.dumps(about)) == about
    assert about["versions"]["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("method", ["coup", "diffpure", "adp"])
def test_the_clocked_run_is_the_purifiers_run(method: str) -> None:
    model, images = tiny.defended(method), tiny.images(3)
    seen: list[torch.Tensor] = []
    network = model.purifier.score_model
    hook = network.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model.purifier(images)
    plain = list(seen)
    seen.clear()
    share = operator_share(model.purifier, images)
    hook.remove()
    warm_up = len(seen) - len(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen[warm_up:], strict=True))
    assert 0 < share.operator_seconds < share.total_seconds
    assert share.calls >= model.purifier.plan.num_steps
    assert share.images == 3


def test_scores_do_not_depend_on_the_batch_size() -> None:
    model, images = tiny.defended("coup"), tiny.images(5)
    labels = torch.tensor([0, 1, 2, 3, 0])
    whole, split = (score(model, images, labels, size, True).accuracy for size in (5, 2))
    assert whole == split


def test_a_measured_defence_is_json() -> None:
    images, labels = tiny.images(4), torch.tensor([0, 1, 2, 3])
    result = measure_defence("coup", tiny.defended("coup"), images, images, labels, 2, 2)
    assert result.clean.accuracy == result.attacked.accuracy
    assert result.images_per_second > 0
    data = json.loads(json.dumps(result.as_dict()))
    assert data["operators"]["images"] == 2


def test_chosen_steps_hold_both_ends() -> None:
    assert chosen_steps(100, 5) == [0, 25, 50, 75, 100]
    assert chosen_steps(3, 8) == [0, 1, 2, 3]
    assert chosen_steps(10, 8)[0] == 0
    assert chosen_steps(10, 8)[-1] == 10


def test_image_grid_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    rows = [
        GridRow("grey", torch.rand(2, 1, 8, 8), ["1", "2"], [True, False]),
        GridRow("colour", torch.rand(2, 3, 8, 8), ["a", "b"]),
    ]
    image_grid(rows, tmp_path / "grid.png", "title")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 400
        assert image.height > 300


def test_average_intervals_are_wilsons() -> None:
    average = Average(570, 3, 200)
    assert average.rate == pytest.approx(0.95)
    check_wilson(average, 0.95)
    check_wilson(Average(571, 3, 200), 571 / 600)
    assert average.percent() == Proportion(190, 200).percent()
    assert Average(0, 3, 0).interval() == (0.0, 1.0)


def test_numbers_of_three_draws() -> None:
    predictions = [[1, 1, 1], [2, 0, 2], [0, 2, 1], [3, 1, 3]]
    found = numbers(predictions, [1, 2, 0, 1])
    curve = worst_curve(predictions, [1, 2, 0, 1])
    assert curve == [Proportion(3, 4), Proportion(1, 4), Proportion(1, 4)]
    assert found.one_draw == Proportion(3, 4)
    assert found.average == Average(3 + 2 + 1 + 1, 3, 4)
    assert found.worst == Proportion(1, 4)
    assert found.majority == Proportion(2, 4)  # [0, 2, 1] is a tie, which is lost


def test_controls_are_added_and_sweeps_expanded() -> None:
    tables = eval_models.tables(
        defence=[
            {"method": "coup", "options": {"num_steps": 2, "t_star": [0.05, 0.1]}},
            {"method": "diffpure", "name": "DiffPure", "options": {"num_steps": 2}},
        ],
        attack=[
            {"preset": "pgd40", "eps": [0.1, 0.2], "eot": [1, 2]},
            {"preset": "stopped", "eps": 0.1},
            {"preset": "classifier", "eps": 0.1},
        ],
    )
    config = from_dict(tables)
    clean = [row.defence.name for row in config.rows if row.attack is None]
    assert clean == [
        "undefended",
        "coup t*=0.05",
        "coup t*=0.05 without guidance (λ=0)",
        "coup t*=0.1",
        "coup t*=0.1 without guidance (λ=0)",
        "DiffPure",
    ]
    attacks = {name: [] for name in clean}
    for row in config.rows:
        if row.attack is not None:
            attacks[row.defence.name].append((row.attack.gradient, row.attack.eps, row.attack.eot))
    honest = [("exact", eps, eot) for eps in (0.1, 0.2) for eot in (1, 2)]
    assert attacks["undefended"] == [("exact", 0.1, 1), ("exact", 0.2, 1)]
    assert attacks["DiffPure"] == [*honest, ("classifier", 0.1, 1)]
    assert attacks["coup t*=0.1"] == [*honest, ("stopped", 0.1, 20), ("classifier", 0.1, 1)]
    assert attacks["coup t*=0.1 without guidance (λ=0)"] == attacks["DiffPure"]
    without = from_dict(tables | {"controls": False})
    assert {row.defence.base for row in without.rows} == {"coup", "DiffPure"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilons": 1}, "has no 'epsilons'"),
        ({"data": {"image": 3}}, r"\[data\] has no 'image'"),
        ({"draws": 0}, "^draws .* 0"),
        ({"defence": []}, "no \\[\\[defence\\]\\]"),
        ({"defence": [{"method": "coop"}]}, "'coop'"),
        ({"defence": [{"method": "coup", "vote": "all"}]}, "vote .*'all'"),
        ({"defence": [{"method": "coup"}, {"method": "coup"}]}, "two defences .*coup"),
        ({"attack": [{"eps": 0.1}]}, r"\[\[attack\]\] .*preset"),
        ({"attack": [{"preset": "pgd"}]}, r"preset of \[\[attack\]\] .*'pgd'"),
        ({"attack": [{"preset": "pgd40", "defences": ["adp"]}]}, "'adp'"),
        ({"attack": [{"preset": "pgd40", "eps": []}]}, "eps .*empty"),
        ({"attack": [{"preset": "pgd40", "epz": 1}]}, r"\[\[attack\]\] has no 'epz'"),
        ({"defence": [{"name": "x"}]}, r"\[\[defence\]\] .*method"),
        ({"defence": [{"method": "none", "options": {}}]}, "'none' .*options"),
        ({"defence": [{"method": "coup", "options": {"seed": 1}}]}, "seed .*defence"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(eval_models.tables(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digits"}, r"\[data\] .*'digits'"),
        ({"data": {"name": 3}}, r"name of \[data\] .* 3"),
        ({"data": {"images": "many"}}, r"images of \[data\] .*'many'"),
        ({"models": 3}, "models .* 3"),
        ({"controls": "yes"}, "controls .*'yes'"),
        ({"defence": "coup"}, r"\[\[defence\]\].*'coup'"),
        ({"defence": {"method": "coup"}}, r"\[\[defence\]\].*\{'method': 'coup'\}"),
        ({"defence": [{"method": "coup", "name": 3}]}, r"name of \[\[defence\]\] .* 3"),
        ({"defence": [{"method": "coup", "options": 3}]}, r"options of \[\[defence\]\] .* 3"),
        ({"defence": [{"method": "coup", "options": {"t_star": "a"}}]}, "t_star .*'a'"),
        ({"defence": [{"method": "coup", "options": {"t_star": ["a"]}}]}, "each of t_star .*'a'"),
        ({"attack": 3}, r"\[\[attack\]\].* 3"),
        ({"attack": [{"preset": "pgd40", "eps": "big"}]}, "eps .*'big'"),
        ({"attack": [{"preset": "pgd40", "defences": "COUP"}]}, r"defences of .*'COUP'"),
    ],
)
def test_values_of_another_type_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        from_dict(eval_models.tables(**changes))


def test_toml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "eval.toml"
    path.write_text(eval_models.TOML.format(images=6))
    config = from_dict(read_toml(str(path)))
    assert config == from_dict(eval_models.tables(attack=eval_models.tables()["attack"][:1]))
    path.write_text("draws = ")
    with pytest.raises(ValueError, match=r"eval\.toml .*TOML"):
        read_toml(path)


NAMED = (("one step", 1), ("two steps", 2))


def run(tables: dict, out: Path, count: int = 6) -> Report:
    images, labels = eval_models.images(count)
    report = evaluate(from_dict(tables), out, models=eval_models.load, data=(images, labels))
    assert report is not None
    return report


def test_an_evaluation_counts_what_the_attack_returns(tmp_path: Path) -> None:
    report = run(eval_models.tables(), tmp_path)
    images, labels = eval_models.images(6)
    line = next(line for line in report.lines if line.row.defence.name == "COUP")
    score_model, classifier = eval_models.load("vp")
    purifier = Purifier(score_model, classifier, method="coup", num_steps=2)
    defended = PurifiedClassifier(purifier, classifier)
    for part, pixels in (
        (line.clean, images),
        (line.attacked, line.row.attack(defended, images, labels)),
    ):
        with torch.no_grad():
            draws = [defended(pixels, draw=k).argmax(1) for k in range(3)]
        assert part == numbers(torch.stack(draws, 1).tolist(), labels.tolist())
    assert line.weakness is None
    assert [x.weakness is None for x in report.lines] == [True, True, False, True, True]
    both, labels = [], labels.tolist()
    for attack in (
        line.row.attack,
        line.row.attack.replace(gradient="stopped", step_size=0.0223125),
    ):
        pixels = attack(defended, images, torch.tensor(labels))
        with torch.no_grad():
            both.append(torch.stack([defended(pixels, draw=k).argmax(1) for k in range(3)], 1))
    right = [(found == torch.tensor(labels)[:, None]).sum(1) for found in both]
    least = torch.minimum(*right)
    union = report.lines[3].attacked
    assert report.lines[3].union == tuple(x.attack_label for x in report.lines[1:3])
    assert union.average == Average(int(least.sum()), 3, 6)
    assert union.worst == Proportion(int((least == 3).sum()), 6)
    assert report.complete


def test_an_attack_that_ignores_the_purifier_runs_once_for_all_defences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = eval_models.tables(
        4,
        draws=1,
        batch_size=2,
        controls=False,
        defence=[{"method": "diffpure", "name": n, "options": {"num_steps": s}} for n, s in NAMED],
        attack=[{"preset": "classifier", "steps": 1, "eps": e} for e in (0.1, 0.2)],
    )
    alone = {}
    for name, steps in NAMED:
        only = {**tables, "defence": [tables["defence"][steps - 1]]}
        alone |= {(name, x.attack_label): x.attacked for x in run(only, tmp_path / name, 4).lines}
    calls = []
    attack_run = PGD.run
    monkeypatch.setattr(
        PGD, "run", lambda self, *a, **k: calls.append(self.eps) or attack_run(self, *a, **k)
    )
    together = run(tables, tmp_path / "both", 4)
    assert calls == [0.1, 0.2, 0.1, 0.2]  # two batches
    for line in together.lines:
        assert line.attacked == alone[line.row.defence.name, line.attack_label]


def evaluations(tables: dict, out: Path) -> tuple[Report, int]:
    """The report, and how many images went through the score network, looks left out."""
    seen: list[int] = []

    def load(score: str) -> tuple[ScoreModel, nn.Module]:
        score_model, classifier = eval_models.load(score)
        score_model.register_forward_pre_hook(
            lambda _, given: seen.append(len(given[0]) * is_counted())
        )
        return score_model, classifier

    data = eval_models.images(4)
    report = evaluate(from_dict(tables), out, models=load, data=data)
    assert report is not None
    return report, sum(seen)


def test_clean_images_are_purified_once_for_all_rows_of_a_defence(tmp_path: Path) -> None:
    few = eval_models.tables(4, controls=False)
    for attacks in (0, 1, 3):
        radii = [0.1, 0.2, 0.3][:attacks]
        weak = [{"preset": "classifier", "steps": 1, "eps": eps} for eps in radii]
        _, images = evaluations({**few, "attack": weak}, tmp_path / str(attacks))
        # 4 images in 2 steps under 3 draws; attacked ones as they are and as bytes.
        assert images == 4 * 2 * (3 + attacks * (3 + 3))


def test_defences_that_differ_by_name_are_computed_once(tmp_path: Path) -> None:
    one = eval_models.tables(4, controls=False)
    first = one["defence"][0]
    usual = {**first, "name": "again", "options": {**first["options"], "t_star": 0.1}}
    other = {**first, "name": "other", "num_draws": 2}
    _, images = evaluations(one, tmp_path / "one")
    both, with_twin = evaluations({**one, "defence": [first, usual]}, tmp_path / "both")
    _, with_other = evaluations({**one, "defence": [first, other]}, tmp_path / "other")
    assert with_twin == images < with_other
    named = {name: [x.attacked for x in both.lines if x.row.defence.name == name] for name in NAMES}
    assert named["COUP"] == named["again"]
    assert len(named["COUP"]) == 3


def test_what_was_shared_is_computed_again_after_a_stop(tmp_path: Path) -> None:
    tables = eval_models.tables(4, controls=False)
    first = tables["defence"][0]
    tables["defence"] = [first, {**first, "name": "again"}]
    whole, _ = evaluations(tables, tmp_path)
    text = whole.csv()
    for path in (tmp_path / "state").glob("batch-00001-row-*.json"):
        if whole.config.rows[int(path.stem[-3:])].defence.name == "again":
            path.unlink()
    resumed, images = evaluations(tables, tmp_path)
    assert images > 0
    assert resumed.csv() == text


def test_numbers_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    csvs = {run(eval_models.tables(batch_size=b), tmp_path / str(b)).csv() for b in (1, 2, 4, 6)}
    assert len(csvs) == 1


def test_a_report_in_all_forms(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    attack = {"preset": "pgd40", "steps": 1, "eps": [0.1, 0.2], "eot": [1, 2]}
    options = {"num_steps": 2, "t_star": [0.05, 0.1]}
    tables = eval_models.tables(
        2, draws=2, defence=[{"method": "coup", "options": options}], attack=[attack]
    )
    report = run(tables, tmp_path, 2)
    names = {path.name for path in report.write(tmp_path, "cpu", "coup-fast eval")}
    plots = ("accuracy", "worst-of-k", "accuracy-eps", "accuracy-eot", "accuracy-t_star")
    assert names == {"report.json", "report.md", "report.csv"} | {
        name + ending for name in plots for ending in (".png", ".svg")
    }
    assert all((tmp_path / name).stat().st_size > 500 for name in names)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["run"]["command"] == "coup-fast eval"
    assert {"versions", "device", "commit"} <= data["run"]["environment"].keys()
    for row in data["rows"]:
        if row["attack"] is None:
            assert len(row["worst_of"]) == 2
        else:
            assert {"gradient", "eot", "norm", "eps", "seed"} <= row["attack"].keys()
        assert row["images"] == 2
        assert set(row["attacked"]) == {"one_draw", "average", "worst", "majority"}
    row = next(row for row in data["rows"] if row["defence"]["name"] == "coup t*=0.05")
    score_model, classifier = eval_models.load("vp")
    purifier = Purifier(score_model, classifier, method="coup", num_steps=2, t_star=0.05)
    found = stiffness(purifier, eval_models.images(2)[0]).as_dict()
    assert row["guidance"] == found
    assert found["steepness"]["0.5"] > 0
    assert f"has median {found['steepness']['0.5']:.3g}" in (tmp_path / "report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(rows) == len(data["rows"]) == len(report.lines)
    assert float(rows[0]["clean_one_draw"]) == data["rows"][0]["clean"]["one_draw"]["rate"]
    assert "| coup t\\*=0.05" in report.table("markdown").replace("*", "\\*")
    assert "2 images are few" in (tmp_path / "report.md").read_text()


def test_a_report_in_a_notebook(tmp_path: Path) -> None:
    name = "<b>&\"'</td>"
    defence = [{"method": "coup", "name": name, "options": {"num_steps": 1}}]
    report = run(eval_models.tables(2, defence=defence), tmp_path, 2)
    html = report._repr_html_()
    assert "color" not in html
    assert "background" not in html
    shown = ElementTree.fromstring(html)
    head, *rows = [["".join(c.itertext()).strip() for c in row] for row in shown.iter("tr")]
    assert head == report.headers()
    assert [row[:2] for row in rows] == [
        [line.defence_label, line.attack_label] for line in report.lines
    ]
    assert name in {row[0] for row in rows}
    for row, line in zip(rows, report.lines, strict=True):
        assert row[2] == line.clean.one_draw.percent()
    assert shown.findtext("p") == report.heading()
    assert [note.text for note in shown.iter("li")] == report.notes()
    assert repr(report) == f"<Report on 2 images, {len(report.config.rows)} rows, complete>"


def test_curves_hold_rows_that_differ_in_one_value(tmp_path: Path) -> None:
    attack = [{"preset": "pgd40", "steps": 1, "eps": [0.1, 0.2], "eot": 1}]
    attack += [{"preset": "stopped", "steps": 1, "eps": 0.1, "eot": 1}]
    report = run(eval_models.tables(2, draws=1, attack=attack, controls=False), tmp_path, 2)
    found = {name: series(report.lines, name, value) for name, _, value in AXES}
    assert not found["accuracy-eot"]
    assert not found["accuracy-t_star"]
    (points,) = found["accuracy-eps"].values()
    assert [(at, line.row.attack.gradient) for at, line in points] == [
        (0.1, "exact"),
        (0.2, "exact"),
    ]


def test_curves_over_the_number_of_steps(tmp_path: Path) -> None:
    options = {"num_steps": [1, 2, 3], "solver": "exponential"}
    defence = [{"method": "diffpure", "name": "DiffPure", "options": options}]
    attack = [{"preset": "classifier", "steps": 1, "eps": 0.1}]
    tables = eval_models.tables(2, draws=1, defence=defence, attack=attack, controls=False)
    report = run(tables, tmp_path, 2)
    (axis,) = [value for name, _, value in AXES if name == "accuracy-num_steps"]
    found = series(report.lines, "accuracy-num_steps", axis)
    (label,) = found
    assert label.startswith("DiffPure: ")
    assert [at for at, _ in found[label]] == [1.0, 2.0, 3.0]
