"""The study of guidance: what it counts, on planted answers, and its command with tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.scripts import ROOT, load_script
from scipy.stats import binomtest

THEMES = ("light", "dark")
N = 40
RIGHT = 30  # the first, that the bare classifier gets right; margins fall with the number
FOOLED = 20  # the first, whose attacked form is read as class 2
TRUTH, WRONG, ATTACKER = 0, 1, 2


@pytest.fixture(scope="module")
def counts() -> ModuleType:
    return load_script("benchmarks/guidance_counts.py")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("benchmarks/guidance_study.py")


def labels(**where: Any) -> np.ndarray:
    """TRUTH everywhere, but WRONG and ATTACKER at these places."""
    found = np.full(N, TRUTH)
    for name, places in where.items():
        found[places] = {"wrong": WRONG, "attacker": ATTACKER}[name]
    return found


@pytest.fixture
def planted(counts: ModuleType) -> Any:
    """λ = 0 flips images 0 to 5 and λ = 4 flips 5 and 29; 10 images, 3 of them kept, stay attacked.

    Images 30 to 39 are wrong from the start. Unguided purification leaves the attacker's label of
    images 0 to 2; guided purification leaves that of 0 to 6, and makes 7 and 8 something else.
    """
    plain = counts.Setting(0.1, False, 0.0, "")
    guided = counts.Setting(0.1, False, 4.0, "explicit")
    other = counts.Setting(0.1, False, 30.0, "explicit")
    outside = list(range(RIGHT, N))
    clean = {
        plain: labels(wrong=[*range(6), *outside]),
        guided: labels(wrong=[5, 29, *outside]),
        other: labels(wrong=list(range(N))),
    }
    purified = {
        plain: labels(attacker=[0, 1, 2]),
        guided: labels(attacker=list(range(7)), wrong=[7, 8]),
        other: labels(attacker=list(range(N))),
    }
    return counts.Answers(
        truth=labels(),
        bare=labels(wrong=outside),
        margin=np.arange(N, 0, -1.0),
        attacked=labels(attacker=list(range(FOOLED))),
        clean=clean,
        purified=purified,
    )


def test_planted_answers_are_counted(counts: ModuleType, planted: Any) -> None:
    report = counts.count(planted, "flipped", [4.0], lowest=0.1)
    plain, guided, other = report["settings"]
    assert report["right"]["successes"] == RIGHT
    assert (report["fooled"]["successes"], report["fooled"]["total"]) == (FOOLED, RIGHT)

    def found(row: dict[str, Any]) -> dict[str, tuple[int, int]]:
        return {k: (v["successes"], v["total"]) for k, v in row["outcomes"].items()}

    assert found(plain) == {
        "flipped": (6, RIGHT),
        "flipped_unsure": (0, 3),  # images 27, 28 and 29
        "accuracy": (24, N),
        "kept": (3, FOOLED),
        "recovered": (17, FOOLED),
        "attacked_accuracy": (37, N),
    }
    assert found(guided)["flipped"] == (2, RIGHT)
    assert found(guided)["flipped_unsure"] == (1, 3)
    assert found(guided)["kept"] == (7, FOOLED)
    assert found(guided)["recovered"] == (11, FOOLED)
    assert found(other)["kept"] == (FOOLED, FOOLED)
    assert "against_unguided" not in plain
    pairs = guided["against_unguided"]["flipped"]
    assert (pairs["both"], pairs["won"], pairs["lost"], pairs["neither"]) == (1, 1, 5, 23)
    assert pairs["difference"] == pytest.approx(-4 / 30)
    assert pairs["p"] == pytest.approx(binomtest(1, 6).pvalue)


def test_holm_is_over_the_stated_tests_alone(counts: ModuleType, planted: Any) -> None:
    one = counts.count(planted, "flipped", [4.0], lowest=0.1)["tests"]
    assert [(t["scale"], t["p_holm"]) for t in one] == [(4.0, pytest.approx(one[0]["p"]))]
    both = counts.count(planted, "flipped", [4.0, 30.0], lowest=0.1)["tests"]
    assert [t["scale"] for t in both] == [4.0, 30.0]
    smaller, larger = sorted(both, key=lambda t: t["p"])
    assert smaller["p_holm"] == pytest.approx(2 * smaller["p"])
    assert larger["p_holm"] == pytest.approx(max(larger["p"], smaller["p_holm"]))


def test_steps_are_counted_of_the_images_that_were_looked_at(
    counts: ModuleType, planted: Any
) -> None:
    """Two parts of 4 images: the attacker's label stays in the first and goes in the second."""
    parts = [
        {
            "clean": {"state": [[TRUTH] * 4, [WRONG] * 4], "denoised": [[TRUTH] * 4]},
            "attacked": {"state": [[ATTACKER] * 4, [last] * 4], "denoised": [[ATTACKER] * 4]},
        }
        for last in (ATTACKER, TRUTH)
    ]
    found = counts.along(planted, parts)
    assert [s["successes"] for s in found["clean"]["state"]] == [8, 0]
    assert [s["successes"] for s in found["kept"]["state"]] == [8, 4]
    assert [s["successes"] for s in found["attacked"]["state"]] == [0, 4]
    assert found["attacked"]["denoised"][0]["total"] == 8


def test_precisions_are_compared_where_the_classifier_was_right(counts: ModuleType) -> None:
    bare = [{"truth": [0, 0, 0], "bare": [0, 0, 0]}, {"truth": [0, 0], "bare": [0, 1]}]
    found = counts.agreement(bare, fast=[0, 1, 1, 0, 1], exact=[0, 0, 2, 2, 0])
    assert (found["same"]["successes"], found["same"]["total"]) == (1, 5)
    flipped = found["flipped"]
    assert [flipped[name] for name in ("both", "won", "lost", "neither")] == [1, 1, 1, 1]


MODELS = """
from helpers import tiny

def load(score):
    return tiny.score_model(), tiny.TinyClassifier().eval()
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The shipped configuration at one t*, on 8 images of 8×8 with tiny models, in parts of 3."""
    (tmp_path / "tiny_models.py").write_text(MODELS)
    text = (ROOT / "benchmarks" / "guidance_study.toml").read_text(encoding="utf-8")
    text = text[: text.index("[[family]]")]
    for shipped, small in (
        ("part = 100", "part = 3"),
        ("stiff_images = 25", "stiff_images = 2"),
        ("t_star = [0.05, 0.1]", "t_star = [0.1]"),
    ):
        assert shipped in text
        text = text.replace(shipped, small)
    for name, first, count in (("one", 0, 8), ("two", 2, 3)):
        text += f'[[family]]\nname = "{name}"\nmodels = "{tmp_path}/tiny_models.py:load"\n'
        text += f'images = "test"\nfirst = {first}\ncount = {count}\n\n'
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    images = (255 * tiny.images(8)).to(torch.uint8).numpy()
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(8) % 4)
    return [
        *("--config", str(tmp_path / "study.toml"), "--test", str(tmp_path / "test.npz")),
        *("--out", str(tmp_path / "out")),
    ]


def report_of(arguments: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Path(arguments[-1], "report.json").read_text())
    return report


def test_the_command_runs_and_continues_where_it_stopped(
    study: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study.main([*arguments, "--only", "one"]) == 0
    (family,) = report_of(arguments)["families"]
    assert family["images"] == 8
    assert len(family["settings"]) == 18
    assert len(family["tests"]) == 8
    for row in family["settings"]:
        assert (row["stiffness"] is None) == (row["scale"] == 0)
        assert row["outcomes"]["accuracy"]["total"] == 8
    assert [len(s["clean"]["state"]) for s in family["states"]] == [6] * 4
    assert [len(s["clean"]["denoised"]) for s in family["states"]] == [5] * 4
    log = Path(arguments[-1], "one", "units.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-20]) + lines[-20][:10])  # killed while it wrote a line
    study.write_report(*study.parse(arguments)[1:], Path(arguments[-1]))
    assert report_of(arguments)["families"][0]["images"] == 6
    done: list[str] = []
    add = study.Log.add
    monkeypatch.setattr(
        study.Log, "add", lambda self, *unit: (done.append(unit[1]), add(self, *unit))[1]
    )
    assert study.main(arguments) == 0
    second = Path(arguments[-1], "two", "units.jsonl").read_text().splitlines()
    assert len(done) == 20 + len(second)
    assert sorted(log.read_text().splitlines(keepends=True)) == sorted(lines)
    again = report_of(arguments)["families"]
    assert again[0] == family
    assert again[1]["images"] == 3
    pictures = {path.name for path in Path(arguments[-1], "figures").iterdir()}
    named = {f"guidance-{what}-{theme}.png" for what in ("scale", "step") for theme in THEMES}
    assert pictures == named


def test_results_do_not_depend_on_parts(study: ModuleType, arguments: list[str]) -> None:
    """The second family has images 2 to 4 of the first, under the same noise."""
    assert study.main(arguments) == 0
    _, config, families = study.parse(arguments)
    one, two = (study.FamilyRun(config, f, Path(arguments[-1], f.name)).answers() for f in families)
    for setting, found in two.clean.items():
        assert found.tolist() == one.clean[setting][2:5].tolist()


def test_other_models_need_another_folder(
    study: ModuleType, arguments: list[str], tmp_path: Path
) -> None:
    given = f"two={tmp_path}/other_models.py:load"
    (tmp_path / "other_models.py").write_text(MODELS)
    shown = [*arguments, "--only", "two", "--models", given]
    assert study.main(shown) == 0
    assert report_of(arguments)["families"][0]["models"] == f"{tmp_path}/other_models.py:load"
    (tmp_path / "other_models.py").write_text(
        MODELS.replace("score_model()", "score_model(seed=3)")
    )
    with pytest.raises(SystemExit, match="was begun with other networks; use --out"):
        study.main(shown)
    with pytest.raises(SystemExit, match="was begun with other family; use --out"):
        study.main([*arguments, "--only", "two"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--only", "three"], "--only names three; there are"),
        (["--models", "three=cifar10"], "--models names three; there are"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_arguments_are_named(
    study: ModuleType,
    arguments: list[str],
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        study.main([*arguments, *more])
    assert said in capsys.readouterr().err


def test_the_denoised_image_is_the_one_that_was_noised() -> None:
    """Of a network that knows the noise: x = √ᾱ x̂0 + σ ε gives back x̂0."""
    states = load_script("benchmarks/guidance_states.py")
    import coup_fast

    clean = 2 * tiny.images(2) - 1
    schedule = coup_fast.VPSchedule()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = torch.as_tensor(schedule.alpha_bar((t / 999).double().numpy())).reshape(-1, 1, 1, 1)
        return ((x - level.sqrt() * clean) / (1 - level).sqrt()).float()

    purifier = coup_fast.Purifier(
        coup_fast.ScoreModel(network, kind="eps"),
        method="coup",
        num_steps=3,
        solver="exponential",
        guidance_scale=0.0,
    )
    seen: list[torch.Tensor] = []
    states.labels_along(
        purifier, tiny.images(2), torch.arange(2), lambda x: seen.append(x) or [0, 0]
    )
    assert len(seen) == 7
    for k in (1, 3, 5):
        torch.testing.assert_close(seen[k], 0.5 * clean + 0.5, atol=1e-5, rtol=0)


def test_the_page_shows_pictures_of_both_themes() -> None:
    page = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\((figures/guidance-\w+-\w+\.png)#only-(\w+)\)", page))
    wanted = {(f"figures/guidance-{what}-{t}.png", t) for what in ("scale", "step") for t in THEMES}
    assert named == wanted
    for name, _ in named:
        assert 10_000 < (ROOT / "docs" / name).stat().st_size < 150_000
