"""The command line, in-process: exit codes, messages, files; every error is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import digits, fails

import coup_fast
from coup_fast.cli import common, main

# --- the frame


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "purify" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == coup_fast.__version__


@pytest.mark.parametrize("argv", [["nonsense"], ["purify"], ["toy", "--samples", "0"]])
def test_what_argparse_refuses_has_exit_code_two(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("coup-fast")
    assert ": error: " in sentence


def test_a_warning_is_a_line_of_its_command(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", digits(1))
    words = ["purify", str(tmp_path / "in.npy"), str(tmp_path / "out.npy"), "--no-progress"]
    words += ["--set", "guidance_scale=1e4", "--set", "num_steps=2"]
    command = [sys.executable, "-m", "coup_fast", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (warning,) = [line for line in done.stderr.splitlines() if "overshoot" in line]
    assert warning.startswith("coup-fast purify: warning: ")
    assert "Warning" not in done.stderr


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coup_fast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == coup_fast.__version__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["purify", "", "x.png"], "argument IN: "),
        (["purify", "a.png", "b.png", "--batch-size", "x"], "argument --batch-size: "),
        (["purify", "a.png", "b.png", "--size", "32x"], "argument --size: "),
        (["purify", "a.png", "b.png", "--seed=-1"], "argument --seed: "),
        (["toy", "--t-star", "x"], "argument --t-star: "),
        (["eval", "--timeout=-3"], "argument --timeout: "),
        (
            ["train", "score", "--data", ".", "--out", "a", "--learning-rate", "0"],
            "argument --learning-rate: ",
        ),
    ],
)
def test_values_that_are_none_say_what_is_wanted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_outputs_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(common.CommandError, match=f"{tmp_path} is a folder"):
        common.check_outputs([tmp_path], force=True)
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(common.os, "access", lambda path, _: Path(path) != locked)
    assert "locked" in fails(capsys, "toy", "--plot", locked / "a.png")


def test_errors_of_the_system_have_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An OSError of Python's own, as of a missing data set, has no strerror."""
    words = ["demo", "--dataset", "cifar10", "--data", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main(words) == 1
    assert "test_batch.bin" in capsys.readouterr().err


def test_settings_are_typed() -> None:
    pairs = ["a=1", "b=0.5", "c=true", "d=None", "e=euler", "guidance-norm='none'", "r=(2, 3)"]
    assert common.parse_settings(pairs) == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": None,
        "e": "euler",
        "guidance_norm": "none",
        "r": (2, 3),
    }
    for wrong in (["a"], ["=1"], ["1a=1"], ["a=1", "a=2"], ["seed=1"], ["method=coup"]):
        with pytest.raises(common.CommandError, match="--set"):
            common.parse_settings(wrong)


def test_a_missing_extra_is_one_sentence_with_the_cure() -> None:
    common.require("cli", "json")
    with pytest.raises(common.CommandError, match=r"pip install 'coup-fast\[demo\]'"):
        common.require("demo", "json", "no_such_module")


EXTRAS = ("tqdm", "tabulate", "PIL", "matplotlib", "safetensors", "mlxtend", "foolbox")


@pytest.mark.parametrize("command", ["purify", "toy", "demo", "bench"])
def test_a_core_install_has_info_and_says_what_the_others_need(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert main(["info"]) == 0
    assert "cli (lacks" in capsys.readouterr().out
    words = ["in.png", "out.png"] if command == "purify" else []
    extra = "demo" if command == "demo" else "cli"
    assert f"pip install 'coup-fast[{extra}]'" in fails(capsys, command, *words)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda"])
def test_impossible_devices_are_refused(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(common.CommandError, match=f"--device {device}: "):
        common.choose_device(device)


# --- info


def test_info_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "CPU kernels" in out


def test_info_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["version"] == coup_fast.__version__
    path = tmp_path / "info.json"
    assert main(["info", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == {**printed, "command": f"coup-fast info --json {path}"}
    capsys.readouterr()
    assert "--force" in fails(capsys, "info", "--json", path)
    assert main(["info", "--json", str(path), "--force"]) == 0


# --- toy


def test_toy_guidance_shifts_fewer_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "toy.svg"
    argv = ["toy", "--samples", "1000", "--t-star", "0.02", "--guidance-scale", "3", "--json"]
    assert main([*argv, "--plot", str(plot)]) == 0
    data = json.loads(capsys.readouterr().out)
    near = data["label_shift"][1]
    assert near["starts"].endswith("boundary")
    assert near["guided_flow"]["high"] < near["score_flow_alone"]["low"]
    assert near["guided_flow"]["total"] == 1000
    assert data["command"].startswith("coup-fast toy")
    assert plot.read_text().lstrip().startswith("<?xml")


def test_toy_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "toy.png"
    plot.write_text("mine")
    assert "--force" in fails(capsys, "toy", "--plot", plot)
    assert plot.read_text() == "mine"
    assert "folder" in fails(capsys, "toy", "--plot", tmp_path / "none" / "toy.png")
    assert ".png or .svg" in fails(capsys, "toy", "--plot", tmp_path / "toy.pdf")
    assert "t_star" in fails(capsys, "toy", "--plot", tmp_path / "new.png", "--t-star", "7")
