"""Time the fused operators against their rivals in one run.

Rivals: the same formula written in eager PyTorch with torch's own normals, torch.compile of it, and
the exact Philox noise in plain PyTorch (slow; it is there to show what exactness costs without a
kernel). Correctness is checked first; times are medians of samples taken in turns; beside each
stands the time of a plain copy that moves as many bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coup_fast.cli import common

# Samples of each variant, seconds of a sample, seconds after which a slow variant has had enough.
FULL = (101, 1e-3, 3.0)
QUICK = (31, 3e-4, 0.3)

HELP = "time the fused operators against eager PyTorch and torch.compile"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast bench`."""
    parser.add_argument("--quick", action="store_true", help="fewer samples, 8 and 64 images only")
    parser.add_argument(
        "--batches",
        type=common.positive_int,
        nargs="+",
        metavar="N",
        help="numbers of 3x32x32 images (default: 8 64 512)",
    )
    parser.add_argument(
        "--threads", type=common.positive_int, help="CPU threads (default: torch's)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    common.add_json_argument(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (.png or .svg)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files that were asked for."""
    common.require("cli", "tabulate", "tqdm", *(["matplotlib"] if args.plot else []))
    import torch

    import coup_fast._extension as extension
    from coup_fast.benchmarking import cases, report
    from coup_fast.evaluation.report import environment

    common.check_plot(args.plot)
    common.check_outputs([common.json_file(args), args.plot], args.force)
    device = common.choose_device(args.device)
    loaded = extension.cuda_available() if device.type == "cuda" else extension.available()
    if not loaded:
        raise common.CommandError(
            f"the {device.type} kernels are not loaded, there is nothing to time: "
            "see `coup-fast info`"
        )
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        batches = args.batches or (cases.BATCHES[:2] if args.quick else cases.BATCHES)
        budget = QUICK if args.quick else FULL
        rows: list[report.Row] = []
        chosen = cases.all_cases(device, batches)
        with common.progress_bar(len(chosen), "bench", "case") as bar:
            for case in chosen:
                if args.no_compile:
                    case = cases.without(case, "torch.compile")
                try:
                    rows += report.run_case(case, *budget)
                except AssertionError as error:
                    raise common.CommandError(f"{case.name}: not timed, {error}") from None
                bar.update()
        about = environment(str(device))
    finally:
        torch.set_num_threads(threads)
    summary = (
        f"{about['device_name']}, {about['threads']} thread{'s' * (about['threads'] != 1)}, "
        f"coup_fast {about['versions']['coup_fast']} ({about['commit'] or 'installed'}), "
        f"torch {about['versions']['torch']}"
    )
    stamp = {"commit": about["commit"], "device_name": about["device_name"]}
    stamp |= {"versions": about["versions"], "threads": about["threads"]}
    command = common.command_line(args.argv)
    table = [row.as_dict() | stamp for row in rows]
    data = {"command": command, "environment": about, "rows": table}
    common.print_or_write(f"{summary}\n\n{report.tables(rows)}", data, args)
    if args.plot is not None:
        report.plot(rows, args.plot, summary)
        common.say(f"wrote {args.plot}")
    return 0
