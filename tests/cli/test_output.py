"""`--json`, `--force` and `--no-progress`: the same in every command that prints results."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import digits, fails
from helpers.scripts import ROOT, environment
from PIL import Image

import coup_fast
import coup_fast.data
from coup_fast.cli import COMMANDS as ALL
from coup_fast.cli import build_parser, demo_run, main
from coup_fast.data import Labelled, Source
from coup_fast.training import runs
from coup_fast.training.data import TrainingData

Prepared = list[str]
COMMANDS = tuple(name for name in ALL if name != "app")  # which serves a page and has no results


def parser_of(command: str) -> argparse.ArgumentParser:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices[command]


@pytest.mark.parametrize("option", ["--json", "--no-progress"])
def test_the_words_are_the_same_everywhere(option: str) -> None:
    found = {command: parser_of(command)._option_string_actions.get(option) for command in COMMANDS}
    lacking = [command for command, action in found.items() if action is None]
    assert lacking == (["info"] if option == "--no-progress" else [])  # which shows no progress
    assert len({action.help for action in found.values() if action is not None}) == 1
    assert all("--force" in parser_of(command)._option_string_actions for command in COMMANDS)


# --- each command, at its smallest


def prepare_purify(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    np.save(folder / "in.npy", digits(2))
    options = ["--set", "t_star=0.002", "--seed", "7", "--force"]
    return ["purify", f"{folder}/in.npy", f"{folder}/out.npy", *options]


def prepare_toy(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    return ["toy", "--samples", "50", "--t-star", "0.01", "--plot", f"{folder}/a.svg", "--force"]


def prepare_bench(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    if not coup_fast.build_info()["extension"]["loaded"]:
        pytest.skip("there are no kernels to time")
    words = ["bench", "--quick", "--batches", "2", "--no-compile", "--threads", "1", "--force"]
    return [*words, "--cases", "confidence-10"]


def prepare_train(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    def load_data(source: Source, task: str) -> TrainingData:
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (12, 1, 28, 28), generator=rng).to(torch.uint8)
        found = Labelled(images, torch.arange(12) % 10)
        return TrainingData(found, found, "test")

    patch.setattr(runs, "load_data", load_data)
    words = [
        "train",
        "classifier",
        "--dataset",
        "mnist",
        "--data",
        "unused",
        "--steps",
        "3",
        "--batch-size",
        "4",
    ]
    return [*words, "--out", f"{folder}/net.safetensors", "--force"]


def prepare_demo(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    settings = demo_run.load_settings("mnist")
    short = demo_run.Settings(settings.epsilon, 2, {"coup": {"t_star": 0.002}}, {})
    patch.setattr(demo_run, "load_settings", lambda dataset: short)
    return ["demo", "--images", "4", "--methods", "coup", "--out", f"{folder}/demo", "--force"]


def prepare_eval(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    words = ["eval", "--images", "1", "--draws", "1", "--methods", "coup", "--set", "num_steps=1"]
    words += ["--attacks", "pgd40", "--steps", "1", "--eot", "1", "--no-controls"]
    return [*words, "--out", f"{folder}/eval", "--force"]


def prepare_info(folder: Path, patch: pytest.MonkeyPatch) -> Prepared:
    return ["info", "--force"]


PREPARE = {name.removeprefix("prepare_"): f for name, f in globals().items() if "prepare_" in name}
# A number or a setting that stands in the JSON of each command.
HOLDS: dict[str, Any] = {
    "purify": lambda data: (data["images"], data["settings"]["seed"]) == (2, 7),
    "toy": lambda data: data["label_shift"][0]["guided_flow"]["total"] == 50,
    "bench": lambda data: (
        {row["case"] for row in data["rows"]} == {"confidence_cotangent [512,10]"}
    ),
    "train": lambda data: data["training"]["steps"] == 3 and data["images"] == 12,
    "demo": lambda data: data["defences"][0]["options"] == {"t_star": 0.002},
    "eval": lambda data: data["images"] == 1 and data["identity"]["config"]["draws"] == 1,
    "info": lambda data: data["torch"] == torch.__version__,
}


def test_every_command_is_here() -> None:
    assert set(PREPARE) == set(HOLDS) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_results_as_json(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = PREPARE[command](tmp_path, monkeypatch)
    path = tmp_path / "result.json"
    quiet = [] if command == "info" else ["--no-progress"]
    assert main([*words, *quiet, "--json", str(path)]) == 0
    text = capsys.readouterr()
    written = json.loads(path.read_text())
    assert (text.out == "") == (command == "purify")  # its result is a file
    assert f"wrote {path}" in text.err
    assert list(written)[:2] == ["command", "version"]
    assert written["command"] == shlex.join(["coup-fast", *words, *quiet, "--json", str(path)])
    assert written["version"] == coup_fast.__version__
    assert HOLDS[command](written)
    told = ("step 3 of 3", "under attack", "row", "batches were finished", "\r")
    assert not [line for line in told if line in text.err]

    assert main([*words, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert HOLDS[command](printed)
    assert printed.keys() == written.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_there_is_refused_before_the_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = PREPARE[command](tmp_path, monkeypatch)
    words.remove("--force")
    before = set(tmp_path.iterdir())
    path = tmp_path / "mine.json"
    path.write_text("mine")
    assert "mine.json exists: give --force" in fails(capsys, *words, "--json", path)
    assert path.read_text() == "mine"
    assert main([*words, "--json", ""]) == 2
    assert "argument --json: is empty" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == {*before, path}


def test_a_list_of_cases_is_a_result_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--cases", "list", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"]["step"] == "operators"


def test_json_does_not_go_over_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = prepare_purify(tmp_path, monkeypatch)
    assert "is IN" in fails(capsys, *words, "--json", tmp_path / "in.npy")


def test_pictures_that_were_left_out_are_in_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(source / "a.png")
    (source / "b.png").write_text("no picture")
    words = ["purify", str(source), str(tmp_path / "out"), "--set", "t_star=0.001", "--json", "-"]
    assert main(words) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["images"] == 1
    assert "b.png is not an image" in data["left_out"][0]


def test_the_page_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for command in ALL:
        assert f"| `{command}" in page
    for word in ("--json FILE", "--json -", "--force", "--no-progress", "--print-completion bash"):
        assert word in page


def test_json_does_not_take_the_place_of_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of one that will be there, nor of one in the folder of results."""
    image, folder, out = tmp_path / "a.png", tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for path in (image, folder / "a.png"):
        Image.new("L", (28, 28)).save(path)
    target = tmp_path / "b.png"
    for words in (
        ["purify", image, target, "--force", "--json", tmp_path / "in" / ".." / "b.png"],
        ["purify", folder, out, "--force", "--json", out / "a.png"],
        ["purify", folder, out, "--force", "--json", out / "coup-fast-purify.jsonl"],
        ["eval", "--out", out, "--force", "--json", out / "report.json"],
        ["demo", "--out", out, "--force", "--json", out / "report.json"],
        ["toy", "--plot", target, "--force", "--json", target],
    ):
        assert "name another file" in fails(capsys, *words)
        assert not target.exists()
        assert not out.exists()


def test_an_instruction_set_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", digits(1))
    done = subprocess.run(
        [sys.executable, "-m", "coup_fast", "purify", "in.npy", "out.npy"],
        cwd=tmp_path,
        env=environment() | {"COUP_FAST_CPU": "garbage"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "\ncoup-fast purify: error: COUP_FAST_CPU must be" in done.stderr
    assert "Traceback" not in done.stderr
