"""What do explicit steps of guidance converge to, and is it what few stable steps give?

    python benchmarks/guidance_convergence.py --data TEST.npz --ode --out guidance_ode.json
    PUBLIC_CLASSIFIERS=DIR python benchmarks/guidance_convergence.py --data TEST.npz \
        --models ./benchmarks/public_classifiers.py:resnet20

COUP for CIFAR-10 under λ, with the bundled models or others, in 5, 20, 100 and 650 steps of the
exponential solver (few Euler steps leave the noise of the last one in the image), guided
explicitly, guided stably, and not guided. The noise of different step counts differs, so single
images do not converge; what can be compared are shares over images. Printed for each setting:
accuracy, the share of right labels that flip, the mean margin of the result, the share of stiff
states, and how many images have another label than under the first solver with the most steps. With
--ode the probability flow takes the place of the SDE, whose only noise is that of the start, the
same for all: there images converge one by one, and the mean distance to that solver's finest result
is printed as well.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import coup_fast
from coup_fast import reference
from coup_fast.data.cifar10 import load_cifar10
from coup_fast.evaluation import Proportion
from coup_fast.evaluation.provenance import environment, write_json
from coup_fast.evaluation.sources import model_loader
from coup_fast.malloc import keep_freed_memory
from coup_fast.stiffness import stiffness

STIFF_IMAGES = 8
GUIDANCE = ("explicit", "stable", "none")  # "none" is λ = 0


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] in [0, 1] and labels: an .npz of images and labels, or CIFAR-10."""
    if path.is_dir():
        return load_cifar10(path, "test")
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), labels.long()


def purified(purifier: coup_fast.Purifier, images: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        parts = [
            purifier(images[i : i + batch], list(range(i, min(i + batch, len(images)))))
            for i in range(0, len(images), batch)
        ]
    return torch.cat(parts)


def logits_of(classifier: torch.nn.Module, images: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([classifier(part) for part in images.split(batch)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help=".npz file, or CIFAR-10's folder")
    parser.add_argument("--models", default="cifar10", help="bundled ones, or FILE.py:function")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 100, 650])
    parser.add_argument("--guidance", nargs="+", choices=GUIDANCE, default=GUIDANCE, help="solvers")
    parser.add_argument("--scale", type=float, default=10.0, help="guidance_scale")
    parser.add_argument("--t-star", type=float, default=0.1)
    parser.add_argument("--solver", choices=["euler", "exponential"], default="exponential")
    parser.add_argument("--ode", action="store_true", help="the probability flow")
    parser.add_argument("--out", type=Path, help="a file for the numbers, JSON")
    args = parser.parse_args(argv)
    keep_freed_memory()
    score_model, classifier = model_loader(args.models, torch.device("cpu"))("vp")
    images, labels = load(args.data)
    images, labels = images[: args.images], labels[: args.images]
    right_before = logits_of(classifier, images, args.batch).argmax(1) == labels
    rows = []
    finest = None
    steps = sorted(args.steps, reverse=True)
    for solver, count in [(s, n) for s in args.guidance for n in steps]:
        guided = solver != "none"
        purifier = coup_fast.Purifier(
            score_model,
            classifier,
            method="vp-ode" if args.ode else "coup",
            t_star=args.t_star,
            num_steps=count,
            solver=args.solver,
            clamp_output=True,
            guidance_scale=args.scale if guided else 0.0,
            guidance_solver=solver if guided else "explicit",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of stiff steps, which are counted below
            result = purified(purifier, images, args.batch)
            stiff = stiffness(purifier, images[:STIFF_IMAGES]).share if guided else 0.0
        logits = logits_of(classifier, result, args.batch)
        found = logits.argmax(1)
        margin, _ = reference.confidence_cotangent(logits, "margin")
        finest = (found, result) if finest is None else finest
        row = {
            "solver": solver,
            "steps": count,
            "accuracy": Proportion(int((found == labels).sum()), len(labels)).as_dict(),
            "right_labels_flipped": Proportion(
                int((found != labels)[right_before].sum()), int(right_before.sum())
            ).as_dict(),
            "mean_margin": float(margin.mean()),
            "stiff_share": stiff,
            "other_labels_than_finest": int((found != finest[0]).sum()),
            "distance_to_finest": float((result - finest[1]).flatten(1).norm(dim=1).mean()),
        }
        rows.append(row)
        print(
            f"{solver:8} {count:4d} steps: accuracy {row['accuracy']['rate']:.3f}, right labels "
            f"flipped {row['right_labels_flipped']['rate']:.3f}, mean margin "
            f"{row['mean_margin']:.2f}, stiff {stiff:.1%}, other labels "
            f"{row['other_labels_than_finest']}, distance {row['distance_to_finest']:.3f}",
            flush=True,
        )
    if args.out is not None:
        facts = {key: value for key, value in vars(args).items() if key != "out"}
        facts["data"] = args.data.name
        report = {"arguments": facts, "environment": environment(), "rows": rows}
        write_json(args.out, report)


if __name__ == "__main__":
    main()
