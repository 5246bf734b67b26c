"""Time the fused operators and whole purification loops against their rivals in one run.

An operator's rivals are the same formula in eager PyTorch with torch's normals, torch.compile of
it, and the exact Philox noise in plain PyTorch, which shows what exactness costs without a kernel.
A loop's rivals (`--loop`) are a plain PyTorch loop, torchsde's solver as DiffPure and COUP call it,
and diffusers' DDPMScheduler, with the same models and weights. Correctness is checked first: a case
whose variants disagree is not timed, and the exit code is 1. Times are medians of samples taken in
turns, and beside each stands a limit that no variant can beat.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast.cli import common

if TYPE_CHECKING:
    import torch

    from coup_fast.benchmarking.catalogue import Family
    from coup_fast.benchmarking.rows import Row

# Samples of each variant, seconds of a sample, seconds after which a slow variant has had enough.
FULL = (101, 1e-3, 3.0)
QUICK = (31, 3e-4, 0.3)

HELP = "time the operators and whole loops against their rivals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast bench`."""
    parser.add_argument("--loop", action="store_true", help="time whole loops instead of operators")
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="time these cases; `--cases list` names all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="take fewer samples and at most two sizes"
    )
    parser.add_argument(
        "--batches",
        type=common.positive_int,
        nargs="+",
        metavar="N",
        help="numbers of images (default: the case's own)",
    )
    parser.add_argument(
        "--threads",
        type=common.thread_count,
        nargs="+",
        metavar="N",
        help="CPU threads; several numbers are measured in turn (default: torch's)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write a plot (.png or .svg), and FILE-components with the shares of a loop's time",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="also put the rows into FOLDER/DATE-DEVICE.json, replacing those of the same cases",
    )
    common.add_device_argument(parser)
    common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files that were asked for."""
    common.require("cli", "tabulate", "tqdm", *(["matplotlib"] if args.plot else []))
    import torch

    import coup_fast._extension as extension
    from coup_fast.benchmarking import catalogue, plots, results, tables
    from coup_fast.evaluation.provenance import environment

    if args.cases == ["list"]:
        listed = [f"{family.name:16} {family.group}" for family in catalogue.FAMILIES]
        groups = {family.name: family.group for family in catalogue.FAMILIES}
        common.check_outputs([common.json_file(args)], args.force)
        common.report(args, "\n".join(listed), {"cases": groups})
        return 0
    common.check_plot(args.plot)
    common.check_outputs([common.json_file(args), args.plot], args.force)
    if args.results is not None and not args.results.is_dir():
        raise common.CommandError(f"--results {args.results} is not a folder")
    with common.plain_errors():
        families = [catalogue.family(name) for name in args.cases or ()]
    group = "loops" if args.loop else "operators"
    families = families or [f for f in catalogue.FAMILIES if f.group == group]
    device = common.choose_device(args.device)
    loaded = extension.cuda_available() if device.type == "cuda" else extension.available()
    if not loaded:
        raise common.CommandError(
            f"the {device.type} kernels are not loaded, there is nothing to time: "
            "see `coup-fast info`"
        )
    before = torch.get_num_threads()
    rows: list[Row] = []
    wrong: list[str] = []
    command = common.command_line(args.argv)
    try:
        for threads in args.threads or [before]:
            torch.set_num_threads(threads)
            about = environment(str(device))
            measured = _measure(args, families, device, about, wrong)
            rows += measured
            if args.results is not None and measured:
                common.say(f"wrote {results.merge(args.results, measured, command)}")
    finally:
        torch.set_num_threads(before)
    if not rows and not wrong:
        raise common.CommandError(f"none of these cases is measured on {device.type}")
    summary = (
        f"{about['device_name']}, "
        f"coup_fast {about['versions']['coup_fast']} ({about['commit'] or 'installed'}), "
        f"torch {about['versions']['torch']}"
    )
    data = {"environment": about, "rows": [row.as_dict() for row in rows], "not_timed": wrong}
    common.report(args, f"{summary}\n\n{tables.tables(rows)}", data)
    if args.plot is not None:
        for path in plots.plot(rows, args.plot, summary):
            common.say(f"wrote {path}")
    for message in wrong:
        common.say(f"coup-fast bench: {message}")
    return 1 if wrong else 0


def _measure(
    args: argparse.Namespace,
    families: Sequence[Family],
    device: torch.device,
    about: dict[str, Any],
    wrong: list[str],
) -> list[Row]:
    """The rows of these families at the present number of threads.

    A case whose variants disagree is not timed but put into `wrong`; the others go on.
    """
    from datetime import datetime, timezone

    from coup_fast.benchmarking import case
    from coup_fast.benchmarking.rows import run_case, stamp_of

    budget = QUICK if args.quick else FULL
    stamp = stamp_of(about, datetime.now(timezone.utc).date().isoformat())
    todo = [(f, n) for f in families for n in f.sizes(device, args.batches)]
    if args.quick and not args.batches:
        todo = [(f, n) for f, n in todo if n in f.sizes(device)[:2]]
    rows: list[Row] = []
    with common.progress_bar(len(todo), "bench", "case", shown=not args.no_progress) as bar:
        for family, batch in todo:
            chosen = family.make(batch, device)
            if args.no_compile:
                chosen = case.without(chosen, "torch.compile")
            try:
                rows += run_case(chosen, *budget, stamp, watched_runs=3)
            except AssertionError as error:
                wrong.append(f"{chosen.name}, {batch} images: not timed, {error}")
            bar.update()
    return rows
