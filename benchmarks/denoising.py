"""Denoising error of a bundled VP network beside classical denoisers, level by level.

    pip install bm3d scikit-image
    python benchmarks/denoising.py --dataset cifar10 --data DIR_OR_NPZ --images 64

At each time t the image sqrt(alpha_bar) (2u - 1) + sigma z is denoised by the network in one call,
and the same noisy image, in pixel units and with its true noise level, by BM3D (Dabov et al. 2007,
colour) and by non-local means (Buades et al. 2005), the latter at the best of three strengths for
each level. All errors are mean squared errors of pixels in [0, 1], as PSNR in dB; nothing is
clipped. Without bm3d or scikit-image their columns stay empty.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from coup_fast import load_bundled
from coup_fast.cli.demo_run import load_images
from coup_fast.training.batches import generator_for
from coup_fast.training.dsm import VPNoise

TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
NLM_STRENGTHS = (0.6, 0.8, 1.0)

Image = NDArray[np.float64]  # [H, W, C]


def psnr(error: float) -> float:
    """Peak signal to noise of a mean squared error of pixels in [0, 1], in dB."""
    return -10.0 * math.log10(error)


def classical() -> dict[str, list[Callable[[Image, float], Image]]]:
    """name -> candidates denoise(noisy, sigma), the best of which counts at each level."""
    found: dict[str, list[Callable[[Image, float], Image]]] = {}
    try:
        from bm3d import bm3d_rgb

        found["BM3D"] = [lambda noisy, sigma: bm3d_rgb(noisy, sigma)]
    except ImportError:
        pass
    try:
        from skimage.restoration import denoise_nl_means
    except ImportError:
        return found

    def non_local_means(strength: float) -> Callable[[Image, float], Image]:
        return lambda noisy, sigma: denoise_nl_means(
            noisy,
            patch_size=3,
            patch_distance=10,
            h=strength * sigma,
            sigma=sigma,
            fast_mode=False,
            channel_axis=-1,
        )

    found["NLM"] = [non_local_means(strength) for strength in NLM_STRENGTHS]
    return found


@torch.no_grad()
def errors_at(t: float, images: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> dict:
    """Pixel errors of the noisy image, of the network and of every classical denoiser at time t."""
    alpha_bar = float(VPNoise().alpha_bar(torch.tensor(t)))
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    z = torch.randn(images.shape, generator=generator_for(0, "denoising", round(1e6 * t)))
    x = signal * (2 * images - 1) + noise * z
    predicted = torch.cat([network(part, torch.full((len(part),), t)) for part in x.split(64)])
    sigma = noise / (2 * signal)  # of the noise in pixels
    found = {
        "t": t,
        "sigma of 255": 255 * sigma,
        "noise error": float((predicted - z).square().mean()),
        "noisy": psnr(sigma**2 * float(z.square().mean())),
        "network": psnr(sigma**2 * float((predicted - z).square().mean())),
    }
    noisy = (images + sigma * z).permute(0, 2, 3, 1).double().numpy()
    clean = images.permute(0, 2, 3, 1).double().numpy()
    for name, candidates in classical().items():
        best = math.inf
        for denoise in candidates:
            pairs = zip(noisy, clean, strict=True)
            error = np.mean([np.mean((denoise(a, sigma) - b) ** 2) for a, b in pairs])
            best = min(best, float(error))
        found[name] = psnr(best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="cifar10", help="a bundled set (default: cifar10)")
    parser.add_argument("--data", type=Path, help="folder of standard files, or a .npz")
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    images, _, _ = load_images(args.dataset, args.data, args.images, seed=0)
    score_model, _ = load_bundled(args.dataset)
    rows = [errors_at(t, images, score_model) for t in tqdm(TIMES, unit="level")]
    print(tabulate(rows, headers="keys", floatfmt=".4g", tablefmt="github"))


if __name__ == "__main__":
    main()
