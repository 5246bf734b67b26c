"""COUP as released, as published here, and under the fast setting: seconds and accuracy, in turns.

    OMP_NUM_THREADS=1 python benchmarks/fast_setting.py mnist --out results/fast_mnist.json
    OMP_NUM_THREADS=1 python benchmarks/fast_setting.py cifar10 --data DIR --out …/fast_cifar10.json

- *released loop*: the SDE as COUP's code hands it to torchsde (100 steps, float32, weights
  trainable, as there), its result clamped as there;
- *published setting*: `Purifier(method="coup")`, the same 100 steps;
- *fast setting*: what `coup_fast.fast_setting` chooses on the first batch.

Each batch of images, clean and under PGD-40 on the classifier without a purifier (a weak attack),
goes through the three in turns. A time is the processor time of one thread. The file is written
after each batch, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, load_bundled
from coup_fast.attacks import PGD
from coup_fast.benchmarking.fast_setting import fast_setting
from coup_fast.benchmarking.loop_rivals import torchsde_loop
from coup_fast.benchmarking.networks import Models
from coup_fast.data import demo_digits
from coup_fast.data.cifar10 import load_cifar10
from coup_fast.evaluation.provenance import environment, source_commit
from coup_fast.files import write_text
from coup_fast.malloc import keep_freed_memory
from coup_fast.models import bundled_settings

IMAGES, BATCH, SEED, STEPS = 1000, 50, 0, 100


def data_of(name: str, folder: Path | None) -> tuple[Tensor, Tensor]:
    """1,000 images [N, C, H, W] in [0, 1] and their labels: held-out digits, or test images."""
    if name == "mnist":
        return demo_digits(IMAGES, SEED)
    if folder is None:
        raise SystemExit("cifar10 needs --data, the folder with CIFAR-10's files")
    if folder.suffix == ".npz":
        import numpy as np

        with np.load(folder) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    else:
        images, labels = load_cifar10(folder, "test")
    images, labels = images[:IMAGES], labels[:IMAGES].long()
    return (images.float() / 255 if images.dtype == torch.uint8 else images), labels


class Released:
    """The released loop in front of the classifier; its noise is torch's, seeded by the batch."""

    def __init__(self, name: str, score_model: Any, classifier: nn.Module, shape: Any) -> None:
        models = Models(name, tuple(shape), score_model.network, classifier)
        self.loop = torchsde_loop(
            models, STEPS, True, torch.empty(0), released=True, trainable=True
        )
        self.classifier = classifier

    def __call__(self, images: Tensor, ids: range) -> Tensor:
        torch.manual_seed(SEED + ids.start)
        clean = self.loop(images).detach().clamp(0.0, 1.0)
        with torch.no_grad():
            logits: Tensor = self.classifier(clean)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("mnist", "cifar10"))
    parser.add_argument("--data", type=Path, help="folder or .npz file of CIFAR-10's test images")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument(
        "--released", type=int, default=IMAGES // BATCH, help="batches that the released loop gets"
    )
    parser.add_argument("--batches", type=int, default=IMAGES // BATCH, help="stop after so many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    images, labels = data_of(args.name, args.data)
    score_model, classifier = load_bundled(args.name)
    settings = bundled_settings(args.name)
    published = Purifier(score_model, classifier, method="coup", seed=SEED)
    state: dict[str, Any] = {"batches": []}
    if args.out.exists():
        state = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        found = fast_setting(published, images[:BATCH], num_images=2 * IMAGES)
        print(found, flush=True)
        state |= {
            "models": args.name,
            "options": found.options,
            "choice": str(found).splitlines(),
            "attack": {"steps": settings["attack_steps"], "eps": settings["epsilon"]},
            "commit": source_commit(),
            "environment": environment(),
        }
    fast = published.with_options(**state["options"])
    attack = PGD(
        eps=settings["epsilon"],
        step_size=settings["epsilon"] / 10,
        steps=settings["attack_steps"],
        eot=1,
        gradient="classifier",
    )
    rows: dict[str, Any] = {
        "released": Released(args.name, score_model, classifier, images.shape[1:])
    }
    target = PurifiedClassifier(published, classifier)
    rows["published"], rows["fast"] = target, PurifiedClassifier(fast, classifier)
    for row in rows.values():  # what torch sets up once
        row(images[:2], range(2))
    for number in range(len(state["batches"]), args.batches):
        part = range(number * BATCH, (number + 1) * BATCH)
        clean, truth = images[part.start : part.stop], labels[part.start : part.stop]
        attacked = attack(target, clean, truth, sample_ids=torch.arange(part.start, part.stop))
        entry: dict[str, Any] = {"labels": truth.tolist()}
        for name, row in rows.items():
            if name == "released" and number >= args.released:
                continue
            answers = {}
            began = time.process_time()
            for what, pixels in (("clean", clean), ("attacked", attacked)):
                with torch.set_grad_enabled(name == "released"):
                    answers[what] = row(pixels, part).argmax(dim=1).tolist()
            entry[name] = answers | {"seconds": (time.process_time() - began) / 2}
        state["batches"].append(entry)
        write_text(args.out, json.dumps(state) + "\n")
        done = [name for name in rows if name in entry]
        times = "  ".join(f"{name} {entry[name]['seconds']:.2f} s" for name in done)
        print(f"{part.stop} images: {times}", flush=True)


if __name__ == "__main__":
    main()
