"""Show on two Gaussians why COUP guides: numbers and a plot, with exact score and classifier.

The data has one dimension and one Gaussian for each class. Purification without guidance pulls
points near the class boundary across it, so their label shifts. The classifier's confidence
gradient pushes points away from the boundary, so the guided flow shifts fewer labels and keeps both
modes. Both flows start from the same points and use the same noise. (Zhang et al., arXiv
2408.05900.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coup_fast.cli import common

HELP = "show on two Gaussians that guidance shifts fewer labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast toy`."""
    add = parser.add_argument
    add(
        "--samples",
        type=common.positive_int,
        default=20000,
        help="number of start points (default: 20000)",
    )
    add(
        "--guidance-scale",
        type=common.number,
        default=1.0,
        help="lambda of the guided flow (default: 1)",
    )
    add(
        "--t-star", type=common.number, default=0.1, help="where purification starts (default: 0.1)"
    )
    add("--seed", type=common.non_negative_int, default=0, help="seed of start points and noise")
    add(
        "--plot",
        type=common.file_path,
        default=Path("coup_fast_toy.png"),
        metavar="FILE",
        help="file of the plot, .png or .svg (default: coup_fast_toy.png)",
    )
    common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate, print the rates, write the plot."""
    common.require("cli", "matplotlib", "tabulate", "tqdm")
    from coup_fast.cli import toy_plot, toy_run
    from coup_fast.evaluation.provenance import environment
    from coup_fast.evaluation.tables import render_table

    common.check_plot(args.plot)
    common.check_outputs([common.json_file(args), args.plot], args.force)
    shown = common.progress_bar(toy_run.RUNS, "toy", "flow", shown=not args.no_progress)
    with common.plain_errors(), shown as bar:
        toy = toy_run.Toy(args.guidance_scale, args.t_star, args.seed, bar.update)
        shifts = toy_run.label_shifts(toy, args.samples)
        toy_plot.draw(toy, args.samples, args.plot)
    headers = ["start points", "score flow without guidance", "guided flow", "number"]
    rows = [[s.starts, s.alone.percent(), s.guided.percent(), s.alone.total] for s in shifts]
    text = (
        f"Label shift: share of points that end on the other side of the class boundary\n"
        f"(95 % Wilson intervals; {toy.describe()})\n\n{render_table(headers, rows)}\n\n"
        f"{toy_run.mode_sentence(shifts[0])}"
    )
    data = {
        "environment": environment(),
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "t_star": args.t_star,
        "label_shift": [shift.as_dict() for shift in shifts],
    }
    common.report(args, text, data)
    common.say(f"wrote {args.plot}")
    return 0
