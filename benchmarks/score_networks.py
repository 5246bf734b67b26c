"""Compare score networks for CIFAR-10: error of the noise, and accuracy behind a purification.

    python benchmarks/score_networks.py --data DIR bundled score.safetensors run.checkpoint
    python benchmarks/score_networks.py --data DIR --kind ncsn bundled ncsn.safetensors

Each network is "bundled", a weights file, or the checkpoint of a training that is still going on
(its averaged weights are judged). The images are the first of the validation split, which no
training has seen; the classifier is the bundled one. VP networks (kind eps) take ten exponential
steps of DiffPure, and of COUP without guidance, from t* = 0.05 and 0.1; networks of kind ncsn run
ADP with its published constants and with those of `bundled_settings`, and the logits of four runs
are averaged. Networks of equal error can purify differently, so the accuracy decides: each network
is compared with the first, image by image, under the same noise (*lost*, *won* and the exact test
of McNemar 1947).

`--attacked` also judges the images after PGD-40 on the classifier alone (ℓ∞ 8/255, a weak attack:
it ignores the purifier).

`--keep FILE` stores what was measured and measures no network twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, load_bundled
from coup_fast.attacks import PGD
from coup_fast.data import Source
from coup_fast.evaluation.tables import render_table
from coup_fast.models.network_files import load_network
from coup_fast.training.checkpoint import averaged_network
from coup_fast.training.data import load_data
from coup_fast.training.measures import error_per_level

# Times of VP networks, standard deviations of those of kind ncsn.
LEVELS = {"eps": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "ncsn": (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "eps": {
        f"{name} {t_star}": {
            "method": method,
            "t_star": t_star,
            "num_steps": 10,
            "solver": "exponential",
            **options,
        }
        for name, method, options in (
            ("DiffPure", "diffpure", {}),
            ("COUP λ=0", "coup", {"guidance_scale": 0.0}),
        )
        for t_star in (0.05, 0.1)
    },
    "ncsn": {
        "ADP as published": {"method": "adp"},
        "ADP σ=0.1 λ=0.5": {"method": "adp", "sigma": 0.1, "step_lambda": 0.5},
    },
}
BATCH = 50
DRAWS = {"eps": 1, "ncsn": 4}


def load(name: str, kind: str) -> tuple[nn.Module, float, str]:
    """A network, the latest time that it was trained on, and the images that it saw, in words."""
    if name == "bundled":
        score_model, _ = load_bundled("cifar10", score="vp" if kind == "eps" else "ncsn")
        seen = {"eps": "2,016,000 images", "ncsn": "560,000 images"}[kind]
        return score_model.network, score_model.t_max or 1.0, seen
    path = Path(name)
    network, facts = (load_network if path.suffix == ".safetensors" else averaged_network)(path)
    if facts.get("kind", kind) != kind:
        raise SystemExit(f"{path} holds a network of kind {facts['kind']}; --kind is {kind}.")
    trained = facts.get("training", facts)
    steps = facts.get("step", trained["steps"])
    seen = f"{steps * trained['batch_size']:,} images"
    return network, facts.get("t_max", 1.0), seen


def digest(network: nn.Module) -> str:
    """A name of the weights themselves: a checkpoint changes while its file name stays."""
    state = hashlib.sha256()
    for tensor in network.state_dict().values():
        state.update(tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


@torch.no_grad()
def measure(
    network: nn.Module, kind: str, t_max: float, sets: dict[str, Tensor], labels: Tensor
) -> dict[str, Any]:
    """Errors by level, and for each method and set whether each image is classified rightly.

    sets: the clean images [N, C, H, W] first, whose name is "", and others of the same labels.
    """
    levels = [x for x in LEVELS[kind] if kind == "ncsn" or x <= t_max]
    found = error_per_level(network, sets[""], kind, levels)
    errors = dict(zip(map(str, levels), found, strict=True))
    score_model = ScoreModel(network, kind=kind, t_max=t_max).eval()
    _, classifier = load_bundled("cifar10")
    right, started = {}, time.process_time()
    for method, options in METHODS[kind].items():
        purifier = Purifier(score_model, **options)
        defence = PurifiedClassifier(purifier, classifier, num_draws=DRAWS[kind])
        for kept, images in sets.items():
            name = f"{method}{kept}"
            hits: list[bool] = []
            for first in tqdm(range(0, len(images), BATCH), desc=name, unit="batch"):
                part = slice(first, first + BATCH)
                ids = torch.arange(len(images))[part]
                logits = defence(images[part], sample_ids=ids)
                hits += (logits.argmax(dim=1) == labels[part]).tolist()
            right[name] = hits
    return {"errors": errors, "right": right, "seconds": time.process_time() - started}


def attacked(images: Tensor, labels: Tensor) -> Tensor:
    """The images after PGD-40 on the bundled classifier."""
    _, classifier = load_bundled("cifar10")
    attack = PGD(eps=8 / 255, steps=40, step_size=2 / 255, eot=1)
    parts = range(0, len(images), BATCH)
    found = [
        attack(classifier, images[i : i + BATCH], labels[i : i + BATCH])
        for i in tqdm(parts, desc="attack", unit="batch")
    ]
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", metavar="NETWORK")
    parser.add_argument("--data", type=Path, required=True, help="folder of standard files")
    parser.add_argument("--kind", choices=tuple(METHODS), default="eps", help="of all networks")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--attacked", action="store_true", help="judge attacked images too")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON of what was measured")
    args = parser.parse_args()
    held_out = load_data(Source("cifar10", str(args.data)), "classifier").held_out
    assert held_out.labels is not None
    images, labels = held_out.images[: args.images].float() / 255.0, held_out.labels[: args.images]
    judge = digest(load_bundled("cifar10")[1])
    sets = {"": images}
    if args.attacked:
        sets[", attacked"] = attacked(images, labels)
    kept: dict[str, Any] = {}
    if args.keep is not None and args.keep.exists():
        kept = json.loads(args.keep.read_text(encoding="utf-8"))
    names, found = [], []
    for name in args.networks:
        network, t_max, seen = load(name, args.kind)
        key = f"{digest(network)} before {judge}, {args.images} images{''.join(sets)}"
        if key not in kept:
            kept[key] = {
                "network": name,
                "seen": seen,
                **measure(network, args.kind, t_max, sets, labels),
            }
            if args.keep is not None:
                args.keep.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        names.append(f"{Path(name).name}, {seen}")
        found.append(kept[key])
    levels = list(map(str, LEVELS[args.kind]))
    errors = [
        [name, *(f"{r['errors'][x]:.4f}" if x in r["errors"] else "" for x in levels)]
        for name, r in zip(names, found, strict=True)
    ]
    level = "t" if args.kind == "eps" else "σ"
    print(render_table([f"error of the noise at {level} =", *levels], errors))
    body = []
    for name, result in zip(names, found, strict=True):
        for method in result["right"]:
            right, first = (np.array(r["right"][method]) for r in (result, found[0]))
            lost, won = int((first & ~right).sum()), int((right & ~first).sum())
            p = binomtest(lost, lost + won).pvalue if lost + won else 1.0
            body.append(
                [name, method, f"{100 * right.mean():.1f} %", str(lost), str(won), f"{p:.3f}"]
            )
    print()
    print(render_table(["network", "purification", "right", "lost", "won", "p"], body))


if __name__ == "__main__":
    main()
