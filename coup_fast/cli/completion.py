"""Completion of the command line in a shell: scripts by shtab, of what the parser knows.

A script is made once and holds every name, so that completing starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from coup_fast.cli import common, networks

SHELLS = ("bash", "zsh", "fish", "tcsh")
INSTALL = """\
completion of commands, options and names in a shell (--print-completion), once:
  bash  coup-fast --print-completion bash > ~/.local/share/bash-completion/completions/coup-fast
  zsh   coup-fast --print-completion zsh > ~/.zfunc/_coup-fast     (a folder of your fpath)
  fish  coup-fast --print-completion fish > ~/.config/fish/completions/coup-fast.fish
"""

_FILES = ("FILE", "CONFIG", "IN", "OUT", "PATH", "FILE|NAME")
_FOLDERS = ("DIR", "FOLDER")


def print_script(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Print the completion script for `args.print_completion`, one of SHELLS."""
    common.require("cli", "shtab")
    import shtab

    names = _names()
    for action in _actions(parser):
        wanted: Any = action  # `complete` is shtab's attribute
        if action.metavar in _FILES:
            wanted.complete = shtab.FILE
        elif action.metavar in _FOLDERS:
            wanted.complete = shtab.DIRECTORY
        elif action.dest in names and action.choices is None:
            action.choices = names[action.dest]
    print(shtab.complete(parser, args.print_completion))
    return 0


def _names() -> dict[str, list[str]]:
    """Argument -> the names that it takes, where the parser leaves them to the library."""
    from coup_fast.attacks import PRESETS
    from coup_fast.benchmarking.catalogue import FAMILIES
    from coup_fast.methods import METHODS

    methods = list(METHODS)
    return {
        "method": methods,
        "methods": methods,
        "attacks": list(PRESETS),
        "bundled": list(networks.IMAGE_SHAPES),
        "cases": ["list", *(family.name for family in FAMILIES)],
        "device": ["auto", "cpu", "cuda"],
    }


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of the parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
