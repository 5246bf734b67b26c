"""Evaluate defences under adaptive attacks: all of them on the same images, in one table.

A TOML file, CONFIG, says what to evaluate (docs/evaluation.md has all its keys); without CONFIG,
options say it. The command writes report.json, report.md, report.csv and plots into DIR. Every
finished batch is kept in DIR/state, so the same command continues after a stop of any kind. Several
processes share the work and give the same numbers:
torchrun --nproc-per-node=4 -m coup_fast eval CONFIG --out DIR
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast.cli import common, networks
from coup_fast.cli.common import CommandError

if TYPE_CHECKING:
    from coup_fast.evaluation.config import EvalConfig
    from coup_fast.evaluation.report import Report

HELP = "evaluate defences under adaptive attacks; it resumes after a stop"
OVERRIDES = ("draws", "batch_size", "seed", "threads", "models")
WITHOUT_CONFIG = ("methods", "set", "attacks", "eps", "step_size", "steps", "eot", "no_controls")
_METHODS = ["coup", "diffpure", "adp"]
_ATTACKS_HELP = "attacks (default: adaptive-guided if a method is guided, else pgd40)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast eval`."""
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        type=common.file_path,
        metavar="CONFIG",
        help="TOML file that says what",
    )
    add(
        "--out",
        type=common.file_path,
        default=Path("coup_fast_eval"),
        metavar="DIR",
        help="output folder (default: ./coup_fast_eval)",
    )
    add("--images", type=common.positive_int, help="number of images (default: 64)")
    add("--draws", type=common.positive_int, help="draws to judge each image (default: 10)")
    add("--batch-size", type=common.positive_int, help="images at once (default: 16)")
    add("--seed", type=common.non_negative_int, help="seed of the noise (default: 0)")
    add("--threads", type=common.thread_count, help="threads of each process (default: 1)")
    add("--models", help="mnist or cifar10 (bundled), or MODULE:FUNCTION (default: mnist)")
    add(
        "--data",
        help="digits (default); a folder of pictures whose sub-folders are classes, or of the "
        "files of mnist, fashion-mnist, cifar10 or svhn; a .npz file; huggingface:NAME; "
        "torchvision:NAME",
    )
    add("--split", help="split of the data (default: test, where it has one)")
    add(
        "--size",
        type=networks.image_size,
        metavar="HxW",
        help="resize the images, to 32 or 28x32",
    )
    add("--color", choices=("grey", "rgb"), help="convert the images")
    add(
        "--timeout",
        type=common.positive_number,
        default=1800.0,
        help="seconds to wait for another rank (default: 1800)",
    )
    add("--report-only", action="store_true", help="only report what is finished")
    common.add_device_argument(parser)
    common.add_output_arguments(parser)
    group = parser.add_argument_group("without CONFIG")
    add = group.add_argument
    add("--methods", nargs="+", metavar="METHOD", help=f"defences (default: {' '.join(_METHODS)})")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of all these methods, such as num_steps=10; may be repeated",
    )
    add("--attacks", nargs="+", metavar="PRESET", help=_ATTACKS_HELP)
    add("--eps", type=common.pixels, nargs="+", help="radius in pixels, such as 8/255")
    add("--step-size", type=common.pixels, help="step of PGD in pixels, such as 2/255")
    add("--steps", type=common.positive_int, help="steps of the attacks")
    add("--eot", type=common.positive_int, nargs="+", help="draws behind each gradient")
    add("--no-controls", action="store_true", help="leave out the undefended and λ=0 rows")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files."""
    common.require("cli", "tabulate", "matplotlib", "safetensors")
    from coup_fast.evaluation.config import from_dict
    from coup_fast.evaluation.evaluate import evaluate
    from coup_fast.evaluation.state import EvaluationError

    common.check_outputs([common.json_file(args)], args.force, [args.out])
    device = common.choose_device(args.device)
    with common.plain_errors():
        config = from_dict(_tables(args))
    try:
        with common.plain_errors(), _stoppable(), _working_folder_searched(config):
            report = evaluate(
                config,
                args.out,
                device=device,
                say=None if args.no_progress else common.say,
                timeout=args.timeout,
                report_only=args.report_only,
            )
    except (EvaluationError, ImportError, FileNotFoundError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    except KeyboardInterrupt:
        kept = len(list((args.out / "state").glob("batch-*.json")))
        again = common.command_line(args.argv)
        common.say(f"stopped; {kept} finished batches are in {args.out}/state. To go on: {again}")
        return 130
    if report is not None:
        _show(report, args, str(device))
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, by which torchrun and batch systems stop a process, is taken as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _working_folder_searched(config: EvalConfig) -> Iterator[None]:
    """The working folder is searched for modules if the configuration names one, and last.

    Otherwise no code of that folder runs: a file there may be called as any package is.
    """
    defences = [row.defence for row in config.rows]
    named = [config.models, *(name for one in defences for name in (one.method, one.models))]
    folder = str(Path.cwd())
    searched = any(":" in name for name in named)
    if searched:
        sys.path.append(folder)
    try:
        yield
    finally:
        if searched:
            sys.path.remove(folder)


def _show(report: Report, args: argparse.Namespace, device: str) -> None:
    if not report.images:
        raise CommandError("no batch is finished in every row yet, so there is nothing to report")
    paths = report.write(args.out, device, common.command_line(args.argv))
    notes = "\n".join(f"- {note}" for note in report.notes())
    names = "  ".join(path.name for path in paths)
    text = f"\n{report.heading()}\n\n{report.tables()}\n\n{notes}\n\n{args.out}/: {names}"
    common.report(args, text, json.loads(paths[0].read_text(encoding="utf-8")))


def _tables(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration as a TOML file would give it."""
    from coup_fast.evaluation.config import read_toml

    if args.config is not None:
        for name in WITHOUT_CONFIG:
            if getattr(args, name):
                option = name.replace("_", "-")
                raise CommandError(f"--{option} and CONFIG exclude each other; say it in the file")
        if not args.config.is_file():
            raise CommandError(f"{args.config} is not a file")
        tables = read_toml(args.config)
    else:
        tables = _from_options(args)
    for name in OVERRIDES:
        if getattr(args, name) is not None:
            tables[name] = getattr(args, name)
    data = {key: getattr(args, key) for key in ("images", "split", "size", "color")}
    if args.data is not None:
        data |= _place(args.data, args.models if args.config is None else None)
    given = {key: value for key, value in data.items() if value is not None}
    if given and isinstance(tables.get("data", {}), dict):  # of a wrong one the reader will tell
        tables["data"] = {**tables.get("data", {}), **given}
    return tables


def _place(data: str, models: str | None) -> dict[str, Any]:
    """`name` and `folder` of [data] for --data.

    A folder in which nothing is recognised has the set of bundled models, or of CONFIG, to be.
    """
    from coup_fast.data import find_source
    from coup_fast.files import IMAGE_SUFFIXES

    if not Path(data).is_dir():
        return {"name": data}
    source = find_source(data)
    held = {path.suffix.lower() if path.is_file() else "/" for path in Path(data).iterdir()}
    if source.folder or held & {"/", ".json", *IMAGE_SUFFIXES}:
        return {"name": source.name, "folder": source.folder}
    return {"folder": data, "name": models if models in ("mnist", "cifar10") else None}


def _from_options(args: argparse.Namespace) -> dict[str, Any]:
    """Defences with the bundled models' settings (where they are used) and --set, and attacks."""
    options = common.parse_settings(args.set)
    settings: dict[str, Any] = {}
    from coup_fast.models.bundled import BUNDLED, bundled_settings

    if (args.models or "mnist") in BUNDLED:
        settings = bundled_settings(args.models or "mnist")
    known = settings.get("methods", {})
    defences = [
        {"method": method, "options": {**known.get(method, {}), **options}}
        for method in args.methods or _METHODS
    ]
    eps = args.eps or ([settings["epsilon"]] if "epsilon" in settings else None)
    chosen = {"eps": eps, "steps": args.steps, "eot": args.eot}
    changes = {key: value for key, value in chosen.items() if value is not None}
    from coup_fast.evaluation.defences import Defence

    methods = args.methods or _METHODS
    guided = any(Defence("", one, {**known.get(one, {}), **options}).guided for one in methods)
    default = "adaptive-guided" if guided else "pgd40"
    attacks = [{"preset": name, **changes} for name in args.attacks or [default]]
    if args.step_size is not None:
        from coup_fast.attacks import PGD, PRESETS

        takers = [one for one in attacks if isinstance(PRESETS.get(one["preset"]), PGD)]
        if not takers:
            raise CommandError("--step-size is for PGD, and none of the attacks is one")
        for one in takers:
            one["step_size"] = args.step_size
    return {"defence": defences, "attack": attacks, "controls": not args.no_controls}
