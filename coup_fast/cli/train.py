"""Train a score model, an NCSN for ADP, or a classifier on MNIST or CIFAR-10.

    coup-fast train score --dataset mnist --data DIR --out score.safetensors

DIR holds the data set's standard files, which are checked. A run that was stopped in any way
resumes from OUT.checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coup_fast.cli.common import (
    CommandError,
    add_output_arguments,
    check_folder,
    check_outputs,
    choose_device,
    file_path,
    json_file,
    non_negative_int,
    positive_int,
    positive_number,
    report,
    require,
    say,
    thread_count,
)

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
    parser.add_argument("--dataset", choices=("mnist", "cifar10"), default="mnist")
    parser.add_argument(
        "--data", type=file_path, required=True, metavar="DIR", help="folder of the data"
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
        "--network", choices=("UNet", "NAFNet"), help="network of a score model (default: UNet)"
    )
    parser.add_argument(
        "--channels", type=positive_int, nargs="+", metavar="N", help="width of each level"
    )
    parser.add_argument("--energy", action="store_true", help="train a scalar energy network")
    parser.add_argument(
        "--init", type=file_path, metavar="FILE", help="trained VP network that ncsn starts from"
    )
    parser.add_argument("--half", action="store_true", help="store float16 weights")
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add_output_arguments(parser, force="overwrite FILE, and OUT of another run")


def run(args: argparse.Namespace) -> int:
    """Train, write the weights, print what the run reached."""
    require("train", "safetensors", "tqdm")
    import torch

    from coup_fast.training.runs import train

    if args.energy and args.task == "classifier":
        raise CommandError("--energy is for score and ncsn")
    if args.channels and args.task == "classifier":
        raise CommandError("--channels is for score and ncsn")
    _check_files(args)
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {field: getattr(args, option) for option, field in _FIELDS.items()}
    try:
        facts = train(
            args.task,
            args.dataset,
            args.data,
            args.out,
            overrides={field: value for field, value in given.items() if value is not None},
            network=args.network,
            channels=args.channels,
            energy=args.energy,
            init=args.init,
            device=device,
            half=args.half,
            progress=not args.no_progress,
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise CommandError(str(error)) from error
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
    lines = [f"{facts['images']} images, {facts['seconds']} s, loss {facts['loss']:.4f}"]
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
