"""How much of COUP's gradient goes through its guidance, as λ and the classifier's sharpness grow.

    python benchmarks/guidance_gradient.py --plot docs/figures/guidance_gradient.png

The released attack stops the gradient at the guidance ("stopped"). The gradient here is that of the
cross-entropy of the purified images. Per image, the error is ||stopped - exact|| / ||exact||, and
the gain is what a signed step along the stopped gradient wins, to first order, of what one along
the exact gradient does: <exact, sign(stopped)> / ||exact||_1. Measured at images that one signed
step of size `--eps` against the bare classifier has moved, since there an attack needs its
gradients. Sharpness multiplies the logits that guide, not those attacked. COUP's λ is 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradient_models
import torch
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, eot_gradient
from coup_fast.evaluation.provenance import environment


def gradient(
    models: gradient_models.Models,
    labels: Tensor,
    guidance_scale: float,
    sharpness: float,
    options: dict[str, Any],
) -> Tensor:
    score_model, classifier, images = models
    guide = gradient_models.Sharpened(classifier, sharpness)
    clean = Purifier(score_model, guide, guidance_scale=guidance_scale, **options)
    return eot_gradient(PurifiedClassifier(clean, classifier), images, labels).gradient


def moved(classifier: nn.Module, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The images after one signed step against the bare classifier, and their labels before."""
    leaf = images.clone().requires_grad_()
    logits = classifier(leaf)
    labels = logits.argmax(1)
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), leaf)
    return (images + eps * slope.sign()).clamp(0, 1), labels


def measure(models: gradient_models.Models, arguments: Any) -> list[dict[str, float]]:
    """One row per sharpness and λ."""
    score_model, classifier, images = models
    images, labels = moved(classifier, images, arguments.eps)
    models = score_model, classifier, images
    rows = []
    options = {"num_steps": arguments.steps, "check_values": False}
    for sharpness in arguments.sharpness:
        for scale in arguments.scales:
            exact, stopped = (
                gradient(models, labels, scale, sharpness, options | {"guidance_gradient": kind})
                for kind in ("full", "stopped")
            )
            exact, stopped = exact.flatten(1), stopped.flatten(1)
            error = (stopped - exact).norm(dim=1) / exact.norm(dim=1)
            gain = (exact * stopped.sign()).sum(1) / exact.abs().sum(1)
            rows.append(
                {
                    "sharpness": sharpness,
                    "guidance_scale": scale,
                    "error": float(error.median()),
                    "error_upper_decile": float(error.quantile(0.9)),
                    "gain": float(gain.mean()),
                }
            )
            print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    return rows


def plot(path: Path, rows: list[dict[str, float]], steps: int) -> None:
    """Error and gain over λ, a line per sharpness."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for sharpness in sorted({row["sharpness"] for row in rows}):
        line = [row for row in rows if row["sharpness"] == sharpness]
        scales = [row["guidance_scale"] for row in line]
        error, upper, gain = (
            [100 * row[key] for row in line] for key in ("error", "error_upper_decile", "gain")
        )
        (drawn,) = axes[0].plot(scales, error, marker="o", label=f"logits × {sharpness:g}")
        axes[0].plot(scales, upper, "--", color=drawn.get_color())
        axes[1].plot(scales, gain, marker="o", color=drawn.get_color())
    axes[0].set(ylabel="error, %: median, upper decile (- -)", yscale="log")
    axes[1].set(ylabel="mean gain of a signed step, %")
    for axis in axes:
        axis.set(xlabel="guidance scale λ", xscale="log", title=f"COUP, {steps} steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = gradient_models.parser(__doc__, batch=24, models="digits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eps", type=float, default=0.15)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.3, 1, 3, 10, 30])
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = gradient_models.MODELS[arguments.models](arguments.batch)
    rows = measure(models, arguments)
    if arguments.json:
        facts = {"environment": environment("cpu"), "models": arguments.models, "rows": rows}
        arguments.json.write_text(json.dumps(facts, indent=1))
    if arguments.plot:
        plot(arguments.plot, rows, arguments.steps)


if __name__ == "__main__":
    main()
