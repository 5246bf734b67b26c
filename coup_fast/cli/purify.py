"""Purify image files, folders of them, or .npy / .npz batches.

IN is a picture, a folder of pictures, or a batch of four dimensions ([B,C,H,W] or [B,H,W,C]; uint8,
or floats in [0,1]) in a .npy or .npz file. OUT gets the same format, shape and dtype.

A batch's layout follows from the axis whose length is the number of channels that the network
takes; give --layout if both axes fit. The noise is chosen by --seed, --draw and the position in the
batch or, in a folder, the picture's name. So results depend neither on --batch-size nor on the
other pictures. Results are clipped to [0,1] only if the format holds whole numbers, and a message
counts the clipped values.

Pictures of a folder that cannot be read are named at the end (exit code 1), and the others are
purified. OUT/coup-fast-purify.jsonl keeps the settings of a folder, for --resume. Several processes
share a folder and write the same results:
torchrun --nproc-per-node=4 -m coup_fast purify IN OUT
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from coup_fast.cli import common, networks
from coup_fast.cli.batches import Job
from coup_fast.cli.common import CommandError
from coup_fast.cli.fitting import Fit
from coup_fast.cli.folder_run import launched, run_folder
from coup_fast.cli.folders import check_target, make_folder, same_file
from coup_fast.cli.image_files import (
    ARRAY_SUFFIXES,
    image_target,
    read_array,
    read_image,
    warn_of_loss,
)
from coup_fast.files import IMAGE_SUFFIXES

if TYPE_CHECKING:
    pass

HELP = "purify image files, folders of them, or .npy / .npz batches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast purify`."""
    add = parser.add_argument
    add(
        "source",
        type=common.file_path,
        metavar="IN",
        help="a picture, a folder of pictures, a .npy or .npz file",
    )
    add(
        "target",
        type=common.file_path,
        metavar="OUT",
        help="where the result goes, in the same format",
    )
    add("--method", default="coup", help="purification method (default: coup)")
    add(
        "--fast",
        action="store_true",
        help="measure on the first pictures how this machine purifies fastest (ten steps, which "
        "may cost some accuracy, and bfloat16 where it pays), say what was chosen, and purify so",
    )
    add("--seed", type=common.non_negative_int, default=0, help="seed of the noise (default: 0)")
    add("--draw", type=common.non_negative_int, default=0, help="which noise draw (default: 0)")
    add("--batch-size", type=common.positive_int, default=64, help="images at once (default: 64)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the method, such as t_star=0.1; may be repeated",
    )
    add(
        "--bundled-settings",
        action="store_true",
        help="start from the settings chosen for the bundled models, as the demo does, instead of "
        "the published defaults for CIFAR-10; --set changes them further",
    )
    add(
        "--layout", choices=["auto", "nchw", "nhwc"], default="auto", help="order of a batch's axes"
    )
    add("--key", help="array of a .npz file that holds the images; the others are copied")
    add("--resize", action="store_true", help="resize to the network's size and back (bilinear)")
    add(
        "--convert-color",
        action="store_true",
        help="convert between RGB and grey, for the network and back",
    )
    add("--alpha", choices=["keep", "drop"], help="copy an alpha channel, or leave it out")
    add(
        "--resume",
        action="store_true",
        help="continue a folder after a stop: leave out the pictures whose results are there, and "
        "refuse other settings than those it was begun with",
    )
    add(
        "--recursive",
        action=argparse.BooleanOptionalAction,
        help="purify the pictures in sub-folders too, or leave them out",
    )
    add("--skip-broken", action="store_true", help="exit with 0 even if pictures could not be read")
    networks.add_arguments(parser)
    common.add_device_argument(parser)
    common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read, purify, write; says on stderr what it did."""
    common.require("cli", "PIL", "tqdm", "safetensors")
    source: Path = args.source
    if not source.exists():
        raise CommandError(f"{source} does not exist")
    suffix = source.suffix.lower()
    is_array = not source.is_dir() and suffix in ARRAY_SUFFIXES
    if not (source.is_dir() or is_array or suffix in IMAGE_SUFFIXES):
        endings = " ".join((*IMAGE_SUFFIXES, *ARRAY_SUFFIXES))
        raise CommandError(f"{source} is neither a folder nor one of {endings}")
    if args.resume and (args.force or not source.is_dir()):
        raise CommandError("--resume is for a folder of pictures, and excludes --force")
    if source.is_dir():
        check_target(source, args.target, (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES))
    elif args.recursive is not None or args.skip_broken:
        option = "--skip-broken" if args.recursive is None else "--recursive"
        raise CommandError(f"{option} is for a folder of pictures")
    written = common.json_file(args)
    if written is not None and same_file(written, source):
        raise CommandError(f"--json {written} is IN: name another file")
    common.check_outputs([written], args.force, [args.target])
    if not source.is_dir() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(f"several processes share a folder, and {source} is one file")
    job = _prepare(args)
    start = time.perf_counter()
    broken: list[str] = []
    if source.is_dir():
        with launched(job) as ranks:
            count, clipped = run_folder(args, job, broken, ranks)
        if ranks.rank != 0:
            return 0  # process 0 says it
    else:
        count, clipped = (_run_array if is_array else _run_picture)(args, job)
    seconds = time.perf_counter() - start
    plan = job.purifier.plan
    common.say(
        f"purified {count} image{'s' * (count != 1)} with {args.method} ({plan.num_steps} steps, "
        f"seed {args.seed}, draw {args.draw}, {job.device}) in {seconds:.1f} s: {args.target}"
    )
    data = {
        "settings": job.settings,
        "source": str(source),
        "target": str(args.target),
        "device": str(job.device),
        "steps": plan.num_steps,
        "images": count,
        "clipped_values": clipped,
        "left_out": broken,
        "seconds": seconds,
    }
    common.report(args, None, data)
    if clipped:
        common.say(f"{clipped} values outside [0, 1] were clipped: the file holds whole numbers")
    for sentence in broken:
        common.say(f"left out: {sentence}")
    if broken and not args.skip_broken:
        common.say(f"{len(broken)} of {count + len(broken)} pictures could not be read")
        return 1
    return 0


def _prepare(args: argparse.Namespace) -> Job:
    from coup_fast import Purifier
    from coup_fast.evaluation.distributed import local_device

    device = local_device(common.choose_device(args.device))
    if args.bundled_settings and args.score is not None:
        raise CommandError("--bundled-settings suit the bundled models, not --score")
    options = common.parse_settings(args.set)
    if args.bundled_settings:
        from coup_fast.models.bundled import bundled_settings

        options = bundled_settings(args.bundled)["methods"].get(args.method, {}) | options
    models = networks.load(args, device)
    try:
        with common.plain_errors():
            purifier = Purifier(
                models.score_model, models.classifier, method=args.method, seed=args.seed, **options
            )
    except CommandError as error:
        if models.classifier is None and "guided by a classifier" in str(error):
            raise CommandError(
                f"method {args.method!r} is guided by a classifier: give --classifier, or "
                "--set guidance_scale=0"
            ) from None
        raise
    height, width = models.size or (None, None)
    hint = _other_sets(models.channels) if args.score is None else ""
    fit = Fit(models.channels, height, width, args.convert_color, args.resize, hint)
    settings = {
        "method": args.method,
        "options": options,
        "seed": args.seed,
        "draw": args.draw,
        "size": models.size,
        "resize": args.resize,
        "convert_color": args.convert_color,
        "alpha": args.alpha,
    }
    shown = not args.no_progress and os.environ.get("RANK", "0") == "0"
    job = Job(purifier, fit, device, args.draw, args.batch_size, shown, settings)
    job.check_memory(1)
    return job


def _other_sets(channels: int) -> str:
    """What to say to a user whose pictures have other channels than the bundled set."""
    others = [name for name, shape in networks.IMAGE_SHAPES.items() if shape[0] != channels]
    return f"; --bundled {others[0]} takes {networks.IMAGE_SHAPES[others[0]][0]}" if others else ""


def _run_array(args: argparse.Namespace, job: Job) -> tuple[int, int]:
    """Purify one .npy or .npz file; returns the numbers of images and of clipped values."""
    import torch

    target: Path = args.target
    if target.is_dir():
        target = target / args.source.name
    if target.suffix.lower() != args.source.suffix.lower():
        raise CommandError(f"{target} must end in {args.source.suffix.lower()}, as {args.source}")
    _prepare_target(args.source, target, args.force)
    batch = read_array(args.source, job.fit, args.layout, args.key)
    shape = tuple(batch.pixels.shape[1:])
    job.fit.check(shape, str(args.source))
    ids = range(len(batch.pixels))
    if args.fast:
        job.choose_fast(batch.pixels[: job.batch_size], len(ids))
    purified = torch.stack(list(job.run([shape] * len(ids), ids, batch.pixels.__getitem__)))
    return len(purified), batch.write(target, purified)


def _run_picture(args: argparse.Namespace, job: Job) -> tuple[int, int]:
    """Purify one picture; returns as `_run_array`."""
    target = image_target(args.source, args.target)
    _prepare_target(args.source, target, args.force)
    picture = read_image(args.source, target, args.alpha)
    shape = tuple(picture.pixels.shape)
    job.fit.check(shape, str(picture.source))
    if args.fast:
        job.choose_fast(picture.pixels[None], 1)
    (purified,) = job.run([shape], [0], lambda _: picture.pixels)
    clipped = picture.write(purified)
    warn_of_loss([target])
    return 1, clipped


def _prepare_target(source: Path, target: Path, force: bool) -> None:
    """Refuse to overwrite, the source itself above all, and make the folder that OUT goes to."""
    if same_file(source, target):
        raise CommandError(f"IN and OUT are the same file, {source}: name another for the result")
    common.refuse_to_overwrite([target], force)
    make_folder(target.parent)
