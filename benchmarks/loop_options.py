"""Images per second of the guided loop under the purifier's options, against the plain loop.

    OMP_NUM_THREADS=1 python benchmarks/loop_options.py --model cifar --batch 16 \
        --option channels_last=True --option compile=True

Each option is a run of the same models on the same images, in turns with the plain float32 loop,
whose weights are in torch's default format; "weights" is that loop on models that store theirs in
channels_last. Shown are medians of wall time and of processor time: on a machine that is not alone
the second is the one to read. "difference" is the largest one between results, of pixels in [0, 1].
"""

from __future__ import annotations

import argparse
import ast
import copy
import statistics
import time
from typing import Any

import torch

from coup_fast import Purifier, ScoreModel, load_bundled
from coup_fast.malloc import keep_freed_memory
from coup_fast.models import Classifier, UNet


def models(name: str) -> tuple[ScoreModel, torch.nn.Module, tuple[int, int, int]]:
    """(score model, classifier, image shape): bundled digits, or random weights of CIFAR's size."""
    if name == "mnist":
        return *load_bundled(), (1, 28, 28)
    torch.manual_seed(0)
    network = UNet(3, [64, 128, 128], patch=2).eval()
    torch.nn.init.normal_(network.head.weight, std=0.02)
    classifier = Classifier(3, 10, size=32, width=64).eval()
    return ScoreModel(network), classifier, (3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("mnist", "cifar"), default="cifar")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE, of Purifier")
    parser.add_argument(
        "--keep-memory", action="store_true", help="as the package's commands do; compare processes"
    )
    args = parser.parse_args()
    if args.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: the C library is not glibc, or its settings are given")

    score_model, classifier, shape = models(args.model)
    images = torch.rand(args.batch, *shape, generator=torch.Generator().manual_seed(0))

    def purifier(models: Any, **options: Any) -> Purifier:
        return Purifier(*models, method="coup", num_steps=args.steps, **options)

    def stored(memory_format: torch.memory_format) -> list[torch.nn.Module]:
        given = (score_model, classifier)
        return [copy.deepcopy(m).to(memory_format=memory_format) for m in given]

    plain, last = stored(torch.contiguous_format), stored(torch.channels_last)
    runs = {"plain": purifier(plain), "weights": purifier(last)}
    for option in args.option:
        name, _, value = option.partition("=")
        runs[option] = purifier(plain, **{name: ast.literal_eval(value)})
    results = {name: run(images) for name, run in runs.items()}  # and warm up
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            run(images)
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
    print(
        f"{args.model}, {args.batch} images, {args.steps} steps, {torch.get_num_threads()} threads"
    )
    for name in runs:
        seconds, used = statistics.median(wall[name]), statistics.median(processor[name])
        ratio = statistics.median(processor["plain"]) / used
        difference = float((results[name] - results["plain"]).abs().max())
        print(
            f"{name:24} {args.batch / seconds:8.2f} images/s  {args.batch / used:8.2f} images per "
            f"processor second  x{ratio:.2f}  difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
