"""The `coup-fast` command: one module per subcommand.

A subcommand module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> exit code`. It
imports torch, pillow, matplotlib and the like inside its functions, so that `coup-fast --help` is
quick and `coup-fast info` works on a core install. A wrong request raises `CommandError`: one
sentence on stderr, exit code 2, no traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from coup_fast.checks import nearest
from coup_fast.cli.common import CommandError
from coup_fast.cli.completion import INSTALL, SHELLS, print_script
from coup_fast.files import FileError
from coup_fast.malloc import keep_freed_memory

COMMANDS = ("info", "purify", "app", "toy", "demo", "eval", "bench", "train")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors about names name the nearest one that there is."""

    def error(self, message: str) -> NoReturn:
        given, names = "", list[str]()
        if message.startswith("unrecognized arguments: "):
            words = message.partition(": ")[2].split()
            given = next((word for word in words if word.startswith("--")), "").partition("=")[0]
            names = [name for part in self._parts() for name in part._option_string_actions]
        elif "invalid choice: '" in message:
            place, _, rest = message.partition(": invalid choice: '")
            given = rest.partition("'")[0]
            names = [
                name
                for action in self._actions
                if place.endswith((str(action.metavar), *action.option_strings, action.dest))
                for name in action.choices or ()
            ]
        self.exit(2, f"{self.prog}: error: {message}{nearest(given, names)}\n")

    def _parts(self) -> list[argparse.ArgumentParser]:
        """Itself, or the subcommand that was being parsed."""
        chosen = [
            part
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for name, part in action.choices.items()
            if name in self.words
        ]
        return chosen or [self]

    words: Sequence[str] = ()  # of the command line


def build_parser() -> _Parser:
    """Parser of the whole command line, every subcommand included."""
    parser = _Parser(
        prog="coup-fast",
        description="Purify adversarial images with diffusion and score models, fast and exactly.",
        epilog=INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print the completion script of a shell ({', '.join(SHELLS)}) and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"coup_fast.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit code."""
    parser = build_parser()
    try:
        parser.words = list(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has already written its message
        return stop.code if isinstance(stop.code, int) else 2
    if args.version:
        import coup_fast

        print(coup_fast.__version__)
        return 0
    if args.print_completion is not None:
        args.command, args.run = "--print-completion", partial(print_script, parser)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a program that calls this function decides about its warnings itself
        warnings.showwarning = partial(_say_warning, args.command)
    if args.command != "bench":  # which measures what the programs of others meet
        keep_freed_memory()
    try:
        code: int = args.run(args)
    except (CommandError, FileError) as error:
        print(f"coup-fast {args.command}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not str(error).startswith("COUP_FAST_CPU"):
            raise
        print(f"coup-fast {args.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `coup-fast info | head -1`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the last flush must not fail too
        return 141
    except OSError as error:  # a full disk, a folder without permission
        where = "" if error.filename is None else f"{error.filename}: "
        reason = error.strerror or str(error)
        print(f"coup-fast {args.command}: error: {where}{reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"coup-fast {args.command}: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    return code


def _say_warning(command: str, message: Warning | str, *_: object) -> None:
    """In the place of `warnings.showwarning`, whose line of the program says nothing to a user."""
    print(f"coup-fast {command}: warning: {message}", file=sys.stderr)
