"""Attack real images, purify them with each method, and count what is right.

The demo takes held-out MNIST digits, or CIFAR-10 test images from --data, and attacks the bundled
classifier with PGD. Then it classifies clean and attacked images without a defence and behind each
purifier. The attack knows only the classifier, not the purifier, so it is weak, and its numbers say
nothing about an adaptive attack. The demo writes report.json, report.md, images.png (clean,
attacked, purified) and trajectory.png (from the attacked image to the purified one) into the output
folder, and replaces what an earlier demo wrote there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coup_fast.cli import common, networks
from coup_fast.cli.common import CommandError
from coup_fast.files import write_text

if TYPE_CHECKING:
    from coup_fast.cli.demo_run import Demo

HELP = "attack real images, purify them with each method, and count what is right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast demo`."""
    add = parser.add_argument
    add(
        "--dataset",
        choices=tuple(networks.IMAGE_SHAPES),
        default="mnist",
        help="images and bundled models (default: mnist)",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="for CIFAR-10: the folder of its standard files, or a .npz of images and labels",
    )
    add("--images", type=common.positive_int, default=200, help="number of images (default: 200)")
    add(
        "--out",
        type=Path,
        default=Path("coup_fast_demo"),
        metavar="DIR",
        help="output folder (default: ./coup_fast_demo)",
    )
    add("--seed", type=common.non_negative_int, default=0, help="seed of images, attack and noise")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="methods to show (default: coup diffpure adp)",
    )
    add("--batch-size", type=common.positive_int, default=50, help="images at once (default: 50)")
    common.add_device_argument(parser)
    common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo, print its table, write its files."""
    modules = ("tqdm", "tabulate", "matplotlib", "safetensors", "mlxtend", "foolbox")
    common.require("demo", *modules)
    from coup_fast.cli import demo_run
    from coup_fast.evaluation.provenance import environment, write_json

    started = time.perf_counter()
    device = common.choose_device(args.device)
    out: Path = args.out
    common.check_outputs([common.json_file(args)], args.force, [out])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{out} cannot be made: {error.strerror}") from None
    with common.plain_errors():
        demo = demo_run.prepare(
            args.dataset, args.data, args.images, args.seed, args.methods, args.batch_size, device
        )
    demo.progress = not args.no_progress
    demo_run.attack(demo)
    demo_run.measure(demo)
    demo_run.draw_images(demo, out / "images.png")
    demo_run.draw_trajectory(demo, out / "trajectory.png")
    seconds = time.perf_counter() - started
    report = {
        "command": common.command_line(args.argv),
        "seed": args.seed,
        "environment": environment(str(device)),
        "seconds": seconds,
        **demo_run.describe(demo),
    }
    write_json(out / "report.json", report)
    write_text(out / "report.md", _markdown(demo, report))
    text = (
        f"\n{demo.heading}\n\n{demo.table('terminal')}\n\n{demo.notes}\n\n"
        f"{seconds:.0f} s in all; pictures and reports are in {out}/:\n"
        "  images.png  trajectory.png  report.json  report.md"
    )
    common.report(args, text, report)
    return 0


def _markdown(demo: Demo, report: dict[str, Any]) -> str:
    about = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"# coup-fast demo\n\n{demo.heading}\n\n{demo.table('markdown')}\n\n{demo.notes}\n\n"
        "![images](images.png)\n\n![trajectory](trajectory.png)\n\n"
        f"`{report['command']}`, {report['seconds']:.0f} s on {about['device_name']} "
        f"({about['threads']} threads), commit {about['commit'] or '(installed)'}; {versions}.\n"
    )
