"""Pages as programs: the blocks of a Markdown page, run in their order as a reader runs them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coup_fast.cli import main

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the `title="…"` after it (a file's name), and its text."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page, re.M | re.S)
    return [Block(*parts) for parts in found]


def run(page: str) -> dict[str, Any]:
    """Run a page in the current folder; returns the names that its Python blocks leave.

    python: executed, in one namespace. bash: each line that begins with `coup-fast`. text: what the
    block before printed. Any block with a title: written to the file of that name first.
    """
    names: dict[str, Any] = {}
    printed = ""
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text)
        if block.language == "text":
            check_output(block.text, printed)
        elif block.language in ("python", "bash"):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                if block.language == "python":
                    exec(compile(block.text, block.title or "<page>", "exec"), names)
                else:
                    run_commands(block.text)
            printed = out.getvalue()
    return names


def run_commands(text: str) -> None:
    """Each `coup-fast …` of a shell block, in this process; a line may end in a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "coup-fast", f"only coup-fast is run here: {line}"
            assert main(words[1:]) == 0, line


def check_output(shown: str, printed: str) -> None:
    """What a page shows against what was printed: `...` stands for anything, spaces do not count.

    A number may be off by a tenth, because another processor rounds otherwise, and that can decide
    an image otherwise.
    """
    pattern = ""
    for part in re.split(rf"(\.\.\.|{NUMBER}|\s+)", shown.strip()):
        if part == "...":
            pattern += ".*?"
        elif re.fullmatch(NUMBER, part):
            pattern += f"({NUMBER})"
        else:
            pattern += r"\s+" if part.isspace() else re.escape(part)
    match = re.fullmatch(pattern, printed.strip(), re.S)
    assert match is not None, f"the page shows\n{shown}\nand this was printed\n{printed}"
    expected = re.findall(NUMBER, shown.replace("...", ""))
    for want, got in zip(map(float, expected), map(float, match.groups()), strict=True):
        near = abs(want - got) <= 0.1 * max(abs(want), abs(got)) + 1e-12
        assert near, f"the page shows {want}, and this was printed\n{printed}"
