"""The demo at small size: its report, its table and its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coup_fast.cli import demo_run, main

IMAGES = 16


@pytest.fixture(scope="module")
def short_settings() -> Any:
    """The demo's own attack, with chains short enough for a test."""
    settings = demo_run.load_settings("mnist")
    short = demo_run.Settings(
        settings.epsilon,
        settings.attack_steps,
        {
            "coup": {"t_star": 0.01},
            "diffpure": {"t_star": 0.01},
            "adp": {"num_steps": 2},
        },
        {"adp": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "load_settings", lambda dataset: short)
        yield settings


@pytest.fixture(scope="module")
def demo(
    short_settings: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "results"
    argv = ["demo", "--images", str(IMAGES), "--out", str(out), "--batch-size", "6", "--seed", "3"]
    assert main(argv) == 0
    return out, json.loads((out / "report.json").read_text())


def test_report_says_what_was_run(demo: tuple[Path, dict[str, Any]]) -> None:
    out, report = demo
    assert report["command"] == (
        f"coup-fast demo --images {IMAGES} --out {out} --batch-size 6 --seed 3"
    )
    assert report["seed"] == 3
    assert report["data"]["images"] == IMAGES
    assert report["data"]["split"] == "report"
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["environment"]["versions"]["foolbox"]
    assert "weak" in report["attack"]["strength"]
    assert report["attack"]["epsilon"] > 0


def test_report_counts_every_image(demo: tuple[Path, dict[str, Any]]) -> None:
    _, report = demo
    assert [entry["name"] for entry in report["defences"]] == ["coup", "diffpure", "adp"]
    for entry in [report["undefended"], *report["defences"]]:
        for images in ("clean", "attacked"):
            accuracy = entry[images]["accuracy"]
            assert accuracy["total"] == IMAGES
            assert 0 <= accuracy["low"] <= accuracy["rate"] <= accuracy["high"] <= 1
    adp = report["defences"][2]
    assert adp["num_draws"] == 2
    assert adp["options"] == {"num_steps": 2}
    for entry in report["defences"]:
        assert entry["images_per_second"] > 0
        assert 0 < entry["operators"]["share"] < 1


def test_attack_beats_the_bare_classifier(demo: tuple[Path, dict[str, Any]]) -> None:
    undefended = demo[1]["undefended"]
    assert undefended["clean"]["accuracy"]["successes"] >= IMAGES - 1
    assert undefended["attacked"]["accuracy"]["successes"] <= 1


def test_pictures_and_words(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    names = ["images.png", "report.json", "report.md", "trajectory.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in ("images.png", "trajectory.png"):
        with Image.open(out / name) as image:
            image.load()
            assert image.width > 800
    text = (out / "report.md").read_text()
    assert "weak" in text
    assert "95 % Wilson" in text
    assert "| COUP" in text


def test_results_do_not_depend_on_the_batch_size(
    demo: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Same seed and digits in one batch: the same counts, up to one borderline digit."""
    argv = ["demo", "--images", str(IMAGES), "--out", str(tmp_path), "--seed", "3"]
    assert main([*argv, "--methods", "coup"]) == 0
    assert "under attack (weak)" in capsys.readouterr().out
    again = json.loads((tmp_path / "report.json").read_text())["defences"][0]
    before = demo[1]["defences"][0]
    difference = again["clean"]["accuracy"]["successes"] - before["clean"]["accuracy"]["successes"]
    assert abs(difference) <= 1


def test_what_the_demo_refuses(
    short_settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["demo", "--methods", "coup", "magic", *out]) == 2
    assert "magic" in capsys.readouterr().err
    assert main(["demo", "--images", "2501", *out]) == 2
    assert "2500" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err
