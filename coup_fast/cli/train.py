"""Train a score model, an NCSN for ADP, or a classifier, on a standard data set or your images.

    coup-fast train score --data PLACE --out score.safetensors

PLACE is a folder of pictures whose sub-folders are classes, a folder of the standard files of
MNIST, Fashion-MNIST, CIFAR-10 or SVHN, a .npz file of images and labels, or huggingface:NAME. A run
that was stopped in any way resumes from OUT.checkpoint and ends with the same weights. Several
processes share each batch, and the numbers of images stay the same:
torchrun --nproc-per-node=4 -m coup_fast train score --data PLACE --out score.safetensors
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from coup_fast.cli.common import (
    CommandError,
    add_output_arguments,
    check_folder,
    check_outputs,
    choose_device,
    file_name,
    file_path,
    json_file,
    non_negative_int,
    parse_settings,
    positive_int,
    positive_number,
    report,
    require,
    say,
    thread_count,
)
from coup_fast.cli.networks import image_size

HELP = "train a score model, an NCSN or a classifier"

# option -> field of TrainConfig
_FIELDS = {
    "steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "precision": "precision",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coup-fast train`."""
    parser.add_argument(
        "task",
        choices=("score", "ncsn", "classifier"),
        help="score: predicts VP noise (COUP, DiffPure); ncsn: NCSNv2 levels (ADP); or classifier",
    )
    parser.add_argument(
        "--data", type=file_name, required=True, metavar="PLACE", help="where the images are"
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="what the files in the folder PLACE are: mnist, fashion-mnist, cifar10, svhn or "
        "torchvision:NAME (default: what is found there)",
    )
    parser.add_argument(
        "--size", type=image_size, metavar="HxW", help="resize the images, to 32 or 28x32"
    )
    parser.add_argument("--color", choices=("grey", "rgb"), help="convert the images")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images (default: only CIFAR-10's)",
    )
    parser.add_argument(
        "--out", type=file_path, required=True, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--steps", type=positive_int, help="training steps (default: the recipe's)")
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--learning-rate", type=positive_number)
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="auto (default) takes bfloat16 where the hardware multiplies it",
    )
    parser.add_argument(
        "--network",
        choices=("UNet", "NAFNet", "ConvNet", "Classifier"),
        help="UNet (default) or NAFNet of a score model; of a classifier ConvNet (default, but for "
        "MNIST) or Classifier",
    )
    parser.add_argument(
        "--channels", type=positive_int, nargs="+", metavar="N", help="width of each level"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another argument of the network, such as blocks=2; may be repeated",
    )
    parser.add_argument("--energy", action="store_true", help="train a scalar energy network")
    parser.add_argument(
        "--large", action="store_true", help="the recipe for a GPU: score on CIFAR-10 has one"
    )
    parser.add_argument(
        "--init",
        type=file_path,
        metavar="FILE",
        help="weights or a checkpoint to start from: a network of this task, or for ncsn a VP one",
    )
    parser.add_argument("--half", action="store_true", help="store float16 weights")
    parser.add_argument(
        "--watch",
        type=file_path,
        metavar="DIR",
        help="write metrics.csv and strips of held-out pictures there while it runs, and "
        "TensorBoard's files if it is installed",
    )
    parser.add_argument(
        "--watch-every", type=positive_int, metavar="N", help="steps between (default: a twentieth)"
    )
    parser.add_argument(
        "--timeout",
        type=positive_number,
        default=1800.0,
        help="seconds to wait for another process (default: 1800)",
    )
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add_output_arguments(parser, force="overwrite FILE, and an OUT that has no checkpoint")


def run(args: argparse.Namespace) -> int:
    """Train, write the weights, print what the run reached."""
    require("train", "safetensors", "tqdm", *(["PIL"] if args.watch else []))
    import torch

    from coup_fast.data import Look, find_source
    from coup_fast.evaluation.state import EvaluationError
    from coup_fast.training.runs import train

    if args.energy and args.task == "classifier":
        raise CommandError("--energy is for score and ncsn")
    if args.channels and args.task == "classifier":
        raise CommandError("--channels is for score and ncsn; --set widths=[64,128] for a ConvNet")
    if args.watch_every and not args.watch:
        raise CommandError("--watch-every is about --watch: name its folder")
    _check_files(args)
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {field: getattr(args, option) for option, field in _FIELDS.items()}
    arguments = parse_settings(args.set)
    if args.channels:
        arguments["channels"] = args.channels
    shown = not args.no_progress and os.environ.get("RANK", "0") == "0"
    try:
        look = Look(args.size, args.color or "")
        facts = train(
            args.task,
            find_source(args.data, args.dataset, look, progress=shown),
            args.out,
            overrides={field: value for field, value in given.items() if value is not None},
            network=args.network,
            arguments=arguments,
            energy=args.energy,
            large=args.large,
            init=args.init,
            flip=args.flip,
            log=args.watch,
            log_every=args.watch_every or 0,
            device=device,
            half=args.half,
            progress=shown,
            timeout=args.timeout,
        )
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FloatingPointError,
        ImportError,
        EvaluationError,
    ) as error:
        raise CommandError(" ".join(str(error).split())) from error
    if facts is None:
        return 0  # the first process says it
    report(args, _text(facts), {"out": str(args.out), **facts})
    say(f"wrote {args.out}")
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be read or written before the training, not after it."""
    out: Path = args.out
    checkpoint = out.with_name(out.name + ".checkpoint")
    check_outputs([json_file(args)], args.force, [out, checkpoint])
    if out.suffix != ".safetensors":
        raise CommandError(f"--out {out} must end in .safetensors")
    check_folder(out.parent)
    if out.exists() and not out.with_name(out.name + ".checkpoint").exists() and not args.force:
        raise CommandError(
            f"{out} exists, and there is no {out.name}.checkpoint to go on from: give --force to "
            "overwrite"
        )
    if args.init is not None and not args.init.is_file():
        raise CommandError(f"--init {args.init} is not a file")


def _text(facts: dict[str, Any]) -> str:
    run = facts["training"]
    lines = [
        f"{run['steps']} steps of {run['batch_size']} images from {facts['images']}, "
        f"{facts['seconds']} s, loss {facts['loss']:.4f}"
    ]
    found = facts["report"]
    if "correct" in found:
        lines.append(f"{found['split']} accuracy {found['correct']} of {found['images']}")
        return "\n".join(lines)
    name = "sigma" if facts["kind"] == "ncsn" else "t"
    lines.append(f"squared error of the noise\n{name:>8} {'train':>8} {'held out':>8}")
    for level, seen, held_out in zip(
        found["level"], found["train"], found["held_out"], strict=True
    ):
        lines.append(f"{level:8g} {seen:8.4f} {held_out:8.4f}")
    return "\n".join(lines)
