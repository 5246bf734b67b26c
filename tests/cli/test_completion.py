"""Completion scripts: what a shell offers when a word is begun."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import fails

from coup_fast.cli import COMMANDS, main
from coup_fast.cli.completion import SHELLS
from coup_fast.methods import METHODS

pytest.importorskip("shtab")


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--print-completion", shell]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    path = tmp_path / "coup-fast"
    path.write_text(script("bash", capsys))
    return path


def offered(path: Path, *words: str) -> list[str]:
    """What bash offers for the last word of a command line."""
    line = " ".join(f"'{word}'" for word in ("coup-fast", *words))
    program = (
        f"source {path}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_TYPE=9\n"
        "handler=$(complete -p coup-fast | sed -E 's/.* -F ([^ ]+) .*/\\1/')\n"
        "$handler coup-fast; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=path.parent)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_names(bash: Path) -> None:
    assert sorted(offered(bash, "")) == sorted(COMMANDS)
    assert offered(bash, "pur") == ["purify"]
    assert offered(bash, "purify", "a.png", "b.png", "--meth") == ["--method"]
    methods = offered(bash, "purify", "a.png", "b.png", "--method", "")
    assert methods == list(METHODS)
    assert offered(bash, "purify", "a.png", "b.png", "--method", "adp") == ["adp"]
    assert offered(bash, "demo", "--methods", "coup", "gd") == ["gdmp"]
    assert "pgd40" in offered(bash, "eval", "--attacks", "pg")
    assert offered(bash, "train", "nc") == ["ncsn"]
    for command in COMMANDS:
        assert "--help" in offered(bash, command, "--he")
    assert offered(bash, "eval", "--js") == ["--json"]


def test_bash_completes_files(bash: Path) -> None:
    (bash.parent / "picture.png").touch()
    assert "picture.png" in offered(bash, "purify", "pict")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_with_all_names(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    for word in (*COMMANDS, *METHODS, "no-progress"):
        assert word in text


def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print-completion", "sh"]) == 2
    assert "invalid choice: 'sh'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'coup-fast[cli]'" in fails(capsys, "--print-completion", "bash")


def test_help_says_how_it_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "coup-fast --print-completion bash > " in capsys.readouterr().out
