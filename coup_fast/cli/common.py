"""What subcommands share: errors, extras, typed `key=value` options, devices, progress."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CommandError(Exception):
    """A request that cannot be carried out; the message is one sentence for the user."""


# Options of a `Purifier` that are no `--set`, and what gives them.
_OWN_OPTIONS = {
    "method": "the option for methods",
    "seed": "--seed",
    "score_model": "the option for networks",
    "classifier": "the option for networks",
}

# import name -> name on the package index, where they differ
_DISTRIBUTIONS = {"PIL": "pillow"}


def require(extra: str, *modules: str) -> None:
    """Raise a `CommandError` with the pip command if any of `modules` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(_DISTRIBUTIONS.get(name, name) for name in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise CommandError(f"{names} {verb} not installed: pip install 'coup-fast[{extra}]'")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `["t_star=0.1", "solver=euler"]` into typed options.

    Numbers, `true`/`false`, `none` and quoted strings are read as such, anything else as a string.
    """
    words = {"true": True, "false": False, "none": None}
    options: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key.isidentifier():
            raise CommandError(f"--set needs key=value, got {pair!r}")
        if key in options:
            raise CommandError(f"--set gives {key} twice")
        if key in _OWN_OPTIONS:
            raise CommandError(f"--set takes no {key}: it is given by {_OWN_OPTIONS[key]}")
        text = text.strip()
        if text.lower() in words:
            options[key] = words[text.lower()]
            continue
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            options[key] = text
        except (RecursionError, MemoryError):
            raise CommandError(f"--set {key}: its value is nested too deeply") from None
    return options


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device` (default: cuda when this build has CUDA kernels and a GPU, else cpu)."""
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        default="auto",
        help="cpu, cuda, cuda:1, ... (default: cuda if its kernels are loaded, else cpu)",
    )


def choose_device(text: str) -> torch.device:
    """The torch device named `text`; `auto` as `add_device_argument` says."""
    import torch

    import coup_fast._extension as extension

    if text == "auto":
        usable = extension.cuda_available() and torch.cuda.is_available()
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CommandError(f"--device {text}: torch knows no such device") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {text}: the kernels run on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device {text}: torch sees no CUDA device here")
    return device


def positive_int(text: str) -> int:
    """argparse type: an integer >= 1."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """argparse type: an integer >= 0."""
    return _whole(text, 0)


def thread_count(text: str) -> int:
    """argparse type: a number of threads that can be started."""
    from coup_fast.checks import MAX_THREADS

    return _whole(text, 1, MAX_THREADS)


def _whole(text: str, least: int, most: int = 2**63 - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        bounds = f">= {least}" if value < least else f"<= {most}"
        raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, got {text!r:.60}")
    return value


def number(text: str) -> float:
    """argparse type: a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def positive_number(text: str) -> float:
    """argparse type: a finite float > 0."""
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def pixels(text: str) -> float:
    """argparse type: a length > 0 in pixels of [0, 1], a number or a fraction such as 8/255."""
    top, sign, bottom = text.partition("/")
    divisor = positive_number(bottom) if sign else 1.0
    return positive_number(top) / divisor


def file_path(text: str) -> Path:
    """argparse type: a path; an empty one, as of an unset shell variable, is no path."""
    return Path(file_name(text))


def file_name(text: str) -> str:
    """argparse type: the name of a file as it was given."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def add_output_arguments(
    parser: argparse.ArgumentParser,
    *,
    force: str = "overwrite files that exist",
    progress: bool = True,
) -> None:
    """Add `--json [FILE]`, `--force` and, with `progress`, `--no-progress`.

    What a command prints as a result goes through `report`, and nothing else to stdout.
    """
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=file_name,
        metavar="FILE",
        help="write all numbers as JSON to FILE; without FILE, or for -, print JSON instead of "
        "text",
    )
    parser.add_argument("--force", action="store_true", help=force)
    if progress:
        parser.add_argument(
            "--no-progress", action="store_true", help="no bars and no lines about how far it is"
        )


def json_file(args: argparse.Namespace) -> Path | None:
    """The file that `--json FILE` names; None without the option or for stdout."""
    return None if args.json in (None, "-") else Path(args.json)


def report(args: argparse.Namespace, text: str | None, data: Mapping[str, Any]) -> None:
    """Print `text` and write `data` where `--json FILE` says; or print `data` for `--json -`.

    The JSON begins with the command and the version of coup_fast.
    """
    import coup_fast
    from coup_fast.evaluation.provenance import to_json, write_json

    command = command_line(args.argv)
    whole = {"command": command, "version": coup_fast.__version__, **data}
    if args.json == "-":
        print(to_json(whole))
    elif text is not None:
        print(text)
    path = json_file(args)
    if path is not None:
        write_json(path, whole)
        say(f"wrote {path}")


def check_outputs(
    files: Sequence[Path | None], force: bool, results: Sequence[Path | None] = ()
) -> None:
    """Raise a `CommandError` if an output file exists (without `force`) or cannot be made.

    results: the files or folders that the command writes beside these. An output that is one of
    them, or lies inside, would take the place of a result.
    """
    paths = [path for path in files if path is not None]
    places = [path.resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise CommandError(f"{path} is named for two outputs: name another file")
        for result in results:
            if result is not None and result.resolve() in (place, *place.parents):
                raise CommandError(f"{path} is where results go ({result}): name another file")
    refuse_to_overwrite(paths, force)
    for path in paths:
        if path.is_dir():
            raise CommandError(f"{path} is a folder, where a file is to go")
        check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise a `CommandError` unless files can be made in `folder`: before the work, not after."""
    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"{folder} cannot be written to: no permission")


def check_plot(path: Path | None) -> None:
    """Raise a `CommandError` unless `path` ends in .png or .svg (or is None)."""
    if path is not None and path.suffix.lower() not in (".png", ".svg"):
        raise CommandError(f"{path} must end in .png or .svg")


def refuse_to_overwrite(paths: Sequence[Path], force: bool) -> None:
    """Raise a `CommandError` if one of `paths` exists and `force` is off."""
    existing = [path for path in paths if os.path.lexists(path)]
    if existing and not force:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise CommandError(f"{existing[0]} exists{more}: give --force to overwrite")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the library's errors about a request (options, shapes, values) into `CommandError`."""
    try:
        yield
    except (ValueError, TypeError, FloatingPointError) as error:
        raise CommandError(str(error)) from error


def command_line(argv: Sequence[str]) -> str:
    """The command as a user would type it again."""
    import shlex

    return shlex.join(["coup-fast", *argv])


def say(message: str) -> None:
    """A remark for the user, on stderr so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


def progress_bar(total: int, label: str, unit: str, *, shown: bool = True) -> Any:
    """A tqdm bar on stderr where that is a terminal; a log gets no half-drawn bars.

    shown: False for `--no-progress`.
    """
    from tqdm import tqdm

    hidden = not (shown and sys.stderr.isatty())
    return tqdm(total=total, desc=label, unit=unit, leave=False, disable=hidden)


@contextmanager
def network_progress(
    network: torch.nn.Module, total: int, label: str, *, shown: bool = True
) -> Iterator[None]:
    """Show a bar on stderr that advances with every forward call of `network`.

    `total` is the expected number of calls. Calls inside other threads or after an exception leave
    the bar where it is; the hook is always removed.
    """
    with progress_bar(total, label, "call", shown=shown) as bar:
        hook = network.register_forward_hook(lambda *_: bar.update() and None)
        try:
            yield
        finally:
            hook.remove()
