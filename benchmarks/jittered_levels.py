"""Go on training a score network with images that hold less noise than their label says.

    python benchmarks/jittered_levels.py --data DIR --share 0 --out share0.safetensors
    python benchmarks/jittered_levels.py --data DIR --share 0.5 --out share5.safetensors
    python benchmarks/score_networks.py --data DIR --attacked share0.safetensors share5.safetensors

COUP starts from the image as it is and hands it to the network under the label t*, although no
noise of that level is in it; no training has shown that to the network. Here a share of the images
has a noise level below its label. Such an image is x = √ᾱ(s) x₀ + σ(s) z, where s = u t and u is
uniform, and the network is told t. Its target is the noise that makes the estimate of the image
right under the label, (x - √ᾱ(t) x₀)/σ(t), which is z where s = t. Images, times and normals are
the same whatever the share is, so two runs are compared in pairs.

A run that was stopped goes on from OUT.checkpoint by the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from coup_fast import checks, load_bundled
from coup_fast.cli.common import positive_int, positive_number
from coup_fast.data import Source
from coup_fast.evaluation.sources import tensor_digest
from coup_fast.models.network_files import load_network, save_network
from coup_fast.training.classifier import shifted
from coup_fast.training.data import load_data
from coup_fast.training.dsm import VPNoise
from coup_fast.training.recipes import RECIPES
from coup_fast.training.trainer import Trainer


def jittered_error(
    network: nn.Module,
    images: Tensor,
    _: Tensor,
    generator: torch.Generator,
    *,
    noise: VPNoise,
    share: float,
) -> Tensor:
    """Mean squared error of the predicted noise. images: [B, C, H, W] in [0, 1]."""
    x0 = 2.0 * shifted(images, generator, reach=0, flip=True) - 1.0
    t = noise.sample_times(len(images), generator)
    z = torch.randn(images.shape, generator=generator)
    chosen = torch.rand(len(images), generator=generator) < share
    below = t * torch.rand(len(images), generator=generator, dtype=torch.float64)
    signal, sigma = _scales(noise, torch.where(chosen, below, t))
    x = signal * x0 + sigma * z
    signal, sigma = _scales(noise, t)
    wanted = (x - signal * x0) / sigma
    predicted: Tensor = network(x, (t * noise.time_scale).float()).float()
    return (wanted - predicted).square().mean()


def _scales(noise: VPNoise, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = noise.alpha_bar(t)[:, None, None, None]
    return alpha_bar.sqrt().float(), (1.0 - alpha_bar).sqrt().float()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's files")
    parser.add_argument("--share", type=float, required=True, help="of the images, in [0, 1]")
    parser.add_argument("--init", type=Path, help="weights to start from (default: the bundled)")
    parser.add_argument("--steps", type=positive_int, default=2000)
    parser.add_argument("--learning-rate", type=positive_number, default=3e-4)
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args(argv)
    try:
        share = checks.number("--share", args.share, 0.0, 1.0)
        if args.init is None:
            network = load_bundled("cifar10")[0].network
        else:
            network, facts = load_network(args.init)
            if facts["kind"] != "eps":
                raise ValueError(f"--init {args.init} holds kind {facts['kind']!r}, not 'eps'")
        assert isinstance(network, nn.Module)
        data = load_data(Source("cifar10", str(args.data)), "score").train
        recipe = RECIPES["cifar10", "score"]
        trainer = Trainer(
            network.requires_grad_(True),
            partial(jittered_error, noise=recipe.vp, share=share),
            data.images,
            torch.zeros(len(data.images), dtype=torch.int64),
            replace(
                recipe.config, steps=args.steps, batch_size=64, learning_rate=args.learning_rate
            ),
            checkpoint=args.out.with_name(f"{args.out.name}.checkpoint"),
            identity={"share": share, "init": tensor_digest(*network.state_dict().values())},
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    averaged = trainer.run()
    facts = {
        "kind": "eps",
        "t_max": recipe.vp.t_max,
        "share": share,
        "training": {"steps": args.steps, "batch_size": 64, "learning_rate": args.learning_rate},
    }
    save_network(args.out, averaged, facts, torch.float32)
    return 0


if __name__ == "__main__":
    sys.exit(main())
