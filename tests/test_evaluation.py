"""Proportions, tables, reports and the measured defence, against known values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from coup_fast import PurifiedClassifier, Purifier
from coup_fast.evaluation import Proportion, accuracy, environment, render_table, write_json
from coup_fast.evaluation.defence import measure_defence, operator_share, score
from coup_fast.evaluation.pictures import GridRow, chosen_steps, image_grid


def wilson(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's formula, written out."""
    p = successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (3, 200), (190, 200), (7, 7), (1, 1)])
def test_intervals_are_wilsons(successes: int, total: int) -> None:
    assert Proportion(successes, total).interval() == pytest.approx(
        wilson(successes, total), abs=1e-12
    )


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


def defended(method: str) -> PurifiedClassifier:
    kind, options = tiny.SHORT[method]
    classifier = tiny.TinyClassifier()
    return PurifiedClassifier(
        Purifier(tiny.score_model(kind), classifier, method=method, **options), classifier
    )


@pytest.mark.parametrize("method", ["coup", "diffpure", "adp"])
def test_the_clocked_run_is_the_purifiers_run(method: str) -> None:
    model, images = defended(method), tiny.images(3)
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
    model, images = defended("coup"), tiny.images(5)
    labels = torch.tensor([0, 1, 2, 3, 0])
    whole, split = (score(model, images, labels, size, True).accuracy for size in (5, 2))
    assert whole == split


def test_a_measured_defence_is_json() -> None:
    images, labels = tiny.images(4), torch.tensor([0, 1, 2, 3])
    result = measure_defence("coup", defended("coup"), images, images, labels, 2, 2)
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
