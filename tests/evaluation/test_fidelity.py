"""What a report says beside accuracy: distances, PSNR, compression, 8 bits, worst of k."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import eval_models, tiny

from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.fidelity import MEASURES, fidelity, means, rounded


def test_distances_are_those_of_the_purified_images() -> None:
    model, clean, ids = tiny.defended("coup"), tiny.images(3), torch.tensor([4, 0, 9])
    given = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)
    given[2] = clean[2]
    with torch.no_grad():
        pure, twin = model.purifier(given, ids, 0), model.purifier(clean, ids, 0)
    found = fidelity(clean, given, pure, twin)
    for i in range(3):
        error = float((pure[i] - clean[i]).norm())
        assert found["l2_to_clean"][i] == pytest.approx(error, rel=1e-5)
        assert found["l2_to_input"][i] == pytest.approx(
            float((pure[i] - given[i]).norm()), rel=1e-5
        )
        psnr = 20 * math.log10(math.sqrt(clean[i].numel()) / error)
        assert found["psnr"][i] == pytest.approx(psnr, rel=1e-5)
    apart = float((pure[0] - twin[0]).norm() / (given[0] - clean[0]).norm())
    assert found["compression"][0] == pytest.approx(apart, rel=1e-4)
    assert found["compression"][2] is None
    average = means([found, found])
    assert average is not None
    assert average["psnr"] == pytest.approx(sum(found["psnr"]) / 3)
    assert average["compression"] == pytest.approx(sum(found["compression"][:2]) / 2)
    assert means([found, None]) is None


def test_rounding_is_that_of_a_file() -> None:
    images = torch.rand(2, 3, 5, 5)
    as_bytes = (images * 255 + 0.5).floor().to(torch.uint8)
    assert torch.equal(rounded(images), as_bytes / 255)


def test_a_report_holds_curves_and_measures(tmp_path: Path) -> None:
    attack = [{"preset": "pgd40", "steps": 2, "eot": 2, "eps": 0.1, "stop_when_fooled": True}]
    config = from_dict(eval_models.tables(attack=attack))
    report = evaluate(config, tmp_path, models=eval_models.load, data=eval_models.images(6))
    assert report is not None
    data = json.loads(json.dumps(report.as_dict()))
    for row in data["rows"]:
        curve = row["worst_of_k"]
        assert len(curve) == row["draws"]
        assert curve[-1]["successes"] == row["attacked"]["worst"]["successes"]
        assert curve[0]["successes"] == row["attacked"]["one_draw"]["successes"]
        assert [k["successes"] for k in curve] == sorted(
            (k["successes"] for k in curve), reverse=True
        )
        assert row["rounded"]["average"]["total"] == 6
        ours = row["defence"]["method"] != "none"
        assert (row["fidelity"] is not None) == ours
        if ours:
            assert set(row["fidelity"]) == set(MEASURES)
    assert "stopped when fooled" in " ".join(report.notes())
    shown = report.measures("markdown")
    assert "worst of 3" in shown
    assert "compression" in shown
    assert "## Further measures" in report.markdown()
