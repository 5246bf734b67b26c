"""How much of COUP's gradient goes through its guidance, as λ and the classifier's sharpness grow.

    python benchmarks/guidance_gradient.py --plot docs/figures/guidance_gradient.png

The released attack stops the gradient at the guidance ("stopped"). Here is the error of that
gradient against the exact one, of the cross-entropy of the purified images with respect to the
attacked ones, and the share of pixels where a signed attack step would go the other way. Sharpness
multiplies the classifier's logits. COUP's λ is 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradient_models
import torch
from torch import Tensor

from coup_fast import PurifiedClassifier, Purifier, eot_gradient
from coup_fast.evaluation.report import environment


def gradient(
    models: gradient_models.Models, guidance_scale: float, sharpness: float, options: dict[str, Any]
) -> Tensor:
    score_model, classifier, images = models
    guide = gradient_models.Sharpened(classifier, sharpness)
    clean = Purifier(score_model, guide, guidance_scale=guidance_scale, **options)
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    # The loss is the unsharpened classifier's: sharpness changes the guidance alone.
    return eot_gradient(PurifiedClassifier(clean, classifier), images, labels).gradient


def measure(models: gradient_models.Models, arguments: Any) -> list[dict[str, float]]:
    """One row per sharpness and λ."""
    rows = []
    options = {"num_steps": arguments.steps, "check_values": False}
    for sharpness in arguments.sharpness:
        for scale in arguments.scales:
            exact, stopped = (
                gradient(models, scale, sharpness, options | {"guidance_gradient": kind})
                for kind in ("full", "stopped")
            )
            rows.append(
                {
                    "sharpness": sharpness,
                    "guidance_scale": scale,
                    "error": float((stopped - exact).norm() / exact.norm()),
                    "wrong_signs": float((stopped.sign() != exact.sign()).float().mean()),
                }
            )
            print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    return rows


def plot(path: Path, rows: list[dict[str, float]], steps: int) -> None:
    """Error and wrong signs over λ, a line per sharpness."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for sharpness in sorted({row["sharpness"] for row in rows}):
        line = [row for row in rows if row["sharpness"] == sharpness]
        scales = [row["guidance_scale"] for row in line]
        for axis, key in zip(axes, ("error", "wrong_signs"), strict=True):
            values = [100 * row[key] for row in line]
            axis.plot(scales, values, marker="o", label=f"logits × {sharpness:g}")
    axes[0].set(ylabel="error of the stopped gradient, %", yscale="log")
    axes[1].set(ylabel="pixels with the wrong sign, %")
    for axis in axes:
        axis.set(xlabel="guidance scale λ", xscale="log", title=f"COUP, {steps} steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = gradient_models.parser(__doc__, batch=8)
    parser.add_argument("--steps", type=int, default=25)
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
