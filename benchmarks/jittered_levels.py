"""What a score network gains for COUP if it is trained on less noise than its label says.

    OMP_NUM_THREADS=1 python benchmarks/jittered_levels.py --data DIR --out results/jittered.json

COUP starts from the image as it is and hands it to the network under the label t*, although no
noise of that level is in it; no training has shown that to the network. Here the training of a
network goes on twice from the same weights, on the same images, times and normals: once as always,
and once with a share of the images whose noise level lies below the label. Such an image is
x = √ᾱ(s) x₀ + σ(s) z, where s = u t and u is uniform, and the network is told t. Its target is the
noise that makes the estimate of the image right under the label, (x - √ᾱ(t) x₀)/σ(t), which is z
where s = t.

The networks are then judged on validation images, clean and under PGD-40 on the classifier alone
(a weak attack: it ignores the purifier), behind ten exponential steps. Each network is compared
with the one trained as always, image by image, under the same noise. Both trainings and
the attacked images are kept in --work, and the same command goes on there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from coup_fast import Purifier, ScoreModel, load_bundled
from coup_fast.attacks import PGD
from coup_fast.data import Source
from coup_fast.evaluation import Proportion, count_pairs
from coup_fast.evaluation.provenance import environment, write_json
from coup_fast.evaluation.sources import tensor_digest
from coup_fast.malloc import keep_freed_memory
from coup_fast.models.network_files import load_network
from coup_fast.training.classifier import shifted
from coup_fast.training.data import TrainingData, load_data
from coup_fast.training.dsm import VPNoise
from coup_fast.training.measures import error_per_level
from coup_fast.training.recipes import RECIPES
from coup_fast.training.trainer import Trainer, as_pixels

SHARES = (
    0.0,
    0.5,
)  # of the images whose noise level lies below the label; the first is compared to
TIMES = (0.02, 0.05, 0.1, 0.2)
BATCH = 50
CHAINS: dict[str, dict[str, Any]] = {
    f"{name}, t* = {t_star}": {
        "method": method,
        "t_star": t_star,
        "num_steps": 10,
        "solver": "exponential",
        "precision": "bf16",
        **options,
    }
    for name, method, options in (
        ("COUP", "coup", {}),
        ("COUP, λ = 0", "coup", {"guidance_scale": 0.0}),
        ("DiffPure", "diffpure", {}),
    )
    for t_star in (0.05, 0.1)
}


def jittered_error(
    network: nn.Module,
    images: Tensor,
    _: Tensor,
    generator: torch.Generator,
    *,
    noise: VPNoise,
    share: float,
) -> Tensor:
    """Mean squared error of the predicted noise. images: [B, C, H, W] in [0, 1].

    The random numbers are the same whatever the share is.
    """
    x0 = 2.0 * shifted(images, generator, reach=0, flip=True) - 1.0
    t = noise.sample_times(len(images), generator)
    z = torch.randn(images.shape, generator=generator)
    chosen = torch.rand(len(images), generator=generator) < share
    below = t * torch.rand(len(images), generator=generator, dtype=torch.float64)
    s = torch.where(chosen, below, t)
    signal, sigma = _scales(noise, s)
    x = signal * x0 + sigma * z
    signal, sigma = _scales(noise, t)
    wanted = (x - signal * x0) / sigma
    predicted: Tensor = network(x, (t * noise.time_scale).float()).float()
    return (wanted - predicted).square().mean()


def _scales(noise: VPNoise, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = noise.alpha_bar(t)[:, None, None, None]
    return alpha_bar.sqrt().float(), (1.0 - alpha_bar).sqrt().float()


def trained(share: float, data: TrainingData, args: argparse.Namespace) -> nn.Module:
    """The network after its training has gone on, averaged."""
    if args.init is None:
        network = load_bundled("cifar10")[0].network
    else:
        network, facts = load_network(args.init)
        if facts["kind"] != "eps":
            raise SystemExit(f"--init {args.init} holds kind {facts['kind']!r}; 'eps' is needed")
    assert isinstance(network, nn.Module)
    recipe = RECIPES["cifar10", "score"]
    config = replace(
        recipe.config, steps=args.steps, batch_size=64, learning_rate=args.learning_rate
    )
    trainer = Trainer(
        network.requires_grad_(True),
        partial(jittered_error, noise=recipe.vp, share=share),
        data.train.images,
        torch.zeros(len(data.train.images), dtype=torch.int64),
        config,
        checkpoint=args.work / f"share-{share}.checkpoint",
        identity={"share": share, "init": str(args.init)},
    )
    return trainer.run()


@torch.no_grad()
def right_after(
    purifier: Purifier, classifier: nn.Module, images: Tensor, labels: Tensor
) -> list[bool]:
    """Whether the classifier is right on each image after the chain, under one draw."""
    hits: list[bool] = []
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        ids = torch.arange(len(images))[part]
        hits += (classifier(purifier(images[part], ids)).argmax(1) == labels[part]).tolist()
    return hits


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, from the file if it was made before."""
    if not path.exists():
        torch.save(make(), path)
    kept: Tensor = torch.load(path, weights_only=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's files")
    parser.add_argument("--init", type=Path, help="weights to start from (default: the bundled)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("build/jittered_levels"))
    parser.add_argument("--out", type=Path, required=True, help="JSON of the numbers")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    data = load_data(Source("cifar10", str(args.data)), "score")
    assert data.held_out.labels is not None
    images = as_pixels(data.held_out.images[: args.images])
    labels = data.held_out.labels[: args.images]
    classifier = load_bundled("cifar10")[1]

    def attack() -> Tensor:
        pgd = PGD(eps=8 / 255, steps=40, step_size=2 / 255, loss="margin", eot=1)
        parts = [
            pgd(classifier, images[i : i + BATCH], labels[i : i + BATCH]).detach()
            for i in range(0, len(images), BATCH)
        ]
        return torch.cat(parts)

    known = tensor_digest(images, labels, *classifier.state_dict().values())[:16]
    attacked = cached(args.work / f"attacked-{known}.pt", attack)
    found: dict[float, dict[str, Any]] = {}
    for share in SHARES:
        network = trained(share, data, args)
        errors = error_per_level(network, images, "eps", list(TIMES))
        score_model = ScoreModel(network, kind="eps", t_max=0.2).eval()
        right = {}
        for name, options in tqdm(CHAINS.items(), desc=f"share {share}", unit="chain"):
            guide = classifier if options["method"] == "coup" else None
            purifier = Purifier(score_model, guide, **options)
            for kind, pixels in (("clean", images), ("attacked", attacked)):
                right[f"{name}, {kind}"] = right_after(purifier, classifier, pixels, labels)
        found[share] = {"errors": dict(zip(map(str, TIMES), errors, strict=True)), "right": right}
    print(tabulate([[s, *f["errors"].values()] for s, f in found.items()], ["error at t", *TIMES]))
    first, rows = found[SHARES[0]]["right"], []
    for share in SHARES[1:]:
        for name, right in found[share]["right"].items():
            pair = count_pairs(right, first[name])
            cells = [Proportion(sum(x), len(x)).percent() for x in (first[name], right)]
            rows.append([name, share, *cells, f"{pair.won} : {pair.lost}", f"{pair.p:.3g}"])
    print(tabulate(rows, ["chain", "share", "share 0", "right", "won : lost", "p"]))
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("work", "out", "data")}
    write_json(
        args.out,
        {
            "settings": settings,
            "noise": asdict(RECIPES["cifar10", "score"].vp),
            "environment": environment(),
            "found": {str(share): f for share, f in found.items()},
        },
    )


if __name__ == "__main__":
    main()
