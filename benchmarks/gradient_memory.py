"""Memory, time and error of gradients through a run, by every way there is to take them.

    python benchmarks/gradient_memory.py --plot docs/figures/gradient_memory.png
    python benchmarks/gradient_memory.py --parts adjoint --models digits

Memory is the most bytes of tensors alive at once above those alive before (`LiveBytes`; the
allocator's count on CUDA), of forward and backward together; `resident` is what the operating
system says about processes of their own. Time is CPU time of one thread, the least of several runs,
and stands beside the time of the network and classifier calls alone: N forward, N with their graph,
N backward.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradient_models
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coup_fast import Purifier
from coup_fast._torch.frozen import frozen_parameters
from coup_fast.attacks.peak_memory import peak_bytes
from coup_fast.evaluation.provenance import environment
from coup_fast.gradient_check.adjoint import AdjointRun
from coup_fast.run.backends import choose_ops
from coup_fast.run.guidance import confidence_gradient
from coup_fast.run.loop import final_state
from coup_fast.run.steps import State

METHODS = ("diffpure", "coup")
PARTS = ("memory", "resident", "time", "adjoint")
CALLS = 50  # of the models alone, per sample
GradientCall = Callable[[], Tensor]


def checkpointed(clean: Purifier, images: Tensor) -> Tensor:
    """The gradient with torch.utils.checkpoint around every step."""
    leaf = images.clone().requires_grad_()
    run = clean.prepare(leaf)

    def step(k: int, state: State, attacked: Tensor | None) -> State:
        # The reentrant kind: the other one cannot hold a step that differentiates inside.
        return checkpoint(lambda *x: run.step(k, x, None), *state, use_reentrant=True)

    with frozen_parameters(*run.models):
        (x,) = final_state(run, leaf, step)
        x.backward(cotangent(x))
    assert leaf.grad is not None
    return leaf.grad


def through(clean: Purifier, images: Tensor) -> Tensor:
    """The gradient as the purifier gives it."""
    leaf = images.clone().requires_grad_()
    out = clean(leaf)
    return torch.autograd.grad(out, leaf, cotangent(out))[0]


def cotangent(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)


WAYS: dict[str, tuple[dict[str, str], Callable[[Purifier, Tensor], Tensor]]] = {
    "autograd": ({"gradient": "autograd"}, through),
    "checkpoint": ({"gradient": "autograd"}, checkpointed),
    "exact": ({"gradient": "exact"}, through),
    "exact, sqrt": ({"gradient": "exact", "states": "sqrt"}, through),
}


def gradient_by(way: str, models: gradient_models.Models, method: str, steps: int) -> GradientCall:
    score_model, classifier, images = models
    options, take = WAYS[way]
    clean = Purifier(score_model, classifier, method=method, num_steps=steps, **options)
    return lambda: take(clean, images)


def cpu_seconds(runs: dict[str, GradientCall], repeats: int) -> dict[str, float]:
    """The least CPU time of each, in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def memory_table(models: gradient_models.Models, steps: list[int]) -> list[dict[str, Any]]:
    """Peak bytes of every way at every N, and the growth per step in states."""
    images = models[2]
    state = images.numel() * 4
    rows = []
    for method in METHODS:
        for way in WAYS:
            peaks = [peak_bytes(gradient_by(way, models, method, n), images.device) for n in steps]
            growth = (peaks[-1] - peaks[0]) / (steps[-1] - steps[0]) / state
            rows.append(
                {"method": method, "way": way, "peak_bytes": peaks, "growth_in_states": growth}
            )
    return rows


def model_calls(models: gradient_models.Models, method: str) -> dict[str, GradientCall]:
    """The models' calls of CALLS steps: as the forward pass does them, and with backward."""
    score_model, classifier, images = models
    guided = method == "coup"
    ops = choose_ops("auto", images)
    t = torch.full((len(images),), 0.05, dtype=torch.float64)
    x = (2 * images - 1).clone()

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = score_model(x, t)
            return confidence_gradient(classifier, x, ops) if guided else out

    def recompute_and_backward() -> Tensor:
        leaf = x.clone().requires_grad_()
        out: list[Tensor] = [score_model(leaf, t)]
        if guided:
            out.append(confidence_gradient(classifier, leaf, ops, graph=True))
        return torch.autograd.grad(out, leaf, [cotangent(part) for part in out])[0]

    def often(run: GradientCall) -> GradientCall:
        return lambda: [run() for _ in range(CALLS)][-1]

    return {"forward": often(forward), "recompute + backward": often(recompute_and_backward)}


def time_table(models: gradient_models.Models, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of every way, over those of the models' calls alone."""
    rows = []
    for method in METHODS:
        calls = model_calls(models, method)
        runs = {way: gradient_by(way, models, method, steps) for way in WAYS}
        with frozen_parameters(models[0], models[1]):
            seconds = cpu_seconds(runs | calls, repeats)  # in turns: the machine may be shared
        least = steps * sum(seconds.pop(name) for name in calls) / CALLS
        for way, value in seconds.items():
            rows.append(
                {"method": method, "way": way, "seconds": value, "over_calls": value / least}
            )
    return rows


def adjoint_runs(clean: Purifier, images: Tensor) -> dict[str, GradientCall]:
    """The exact gradient and the adjoint's, all of the run on one Brownian path."""
    frozen = AdjointRun(clean, images)
    trainable = AdjointRun(clean, images, trainable=True)
    direction = cotangent(images)

    def exact() -> Tensor:
        leaf = images.clone().requires_grad_()
        out = clean(leaf, noise=frozen.noise)
        return torch.autograd.grad(out, leaf, direction)[0]

    return {
        "exact": exact,
        "adjoint, frozen": lambda: frozen.gradient(images, direction)[1],
        "adjoint, trainable": lambda: trainable.gradient(images, direction)[1],
    }


def adjoint_table(models: gradient_models.Models, steps: int, repeats: int) -> list[dict[str, Any]]:
    """torchsde's adjoint, the exact gradient beside it: time, memory, error."""
    score_model, classifier, images = models
    rows = []
    for method in METHODS:
        clean = Purifier(score_model, classifier, method=method, num_steps=steps)
        runs = adjoint_runs(clean, images)
        seconds = cpu_seconds(runs, repeats)
        truth = runs["exact"]()
        for way, run in runs.items():
            got = run()
            rows.append(
                {
                    "method": method,
                    "way": way,
                    "seconds": seconds[way],
                    "peak_bytes": peak_bytes(run, images.device),
                    "error": float((got - truth).norm() / truth.norm()),
                    "cosine": float(torch.cosine_similarity(got.flatten(), truth.flatten(), 0)),
                }
            )
    return rows


def resident_sizes(arguments: Any, steps: list[int]) -> list[dict[str, Any]]:
    """Peak resident sizes of processes that take one gradient each, above one of one step."""
    rows = []
    for way in WAYS:
        sizes = []
        for n in (1, *steps):
            command = [sys.executable, __file__, "--one", way, str(n), "--models", arguments.models]
            command += ["--batch", str(arguments.batch)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            sizes.append(int(done.stdout.split()[-1]))
        rows.append({"way": way, "resident_bytes": [size - sizes[0] for size in sizes[1:]]})
    return rows


def plot(path: Path, report: dict[str, Any]) -> None:
    """Peak memory over N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METHODS), figsize=(9, 3.6), sharey=True)
    for axis, method in zip(axes, METHODS, strict=True):
        for row in report["memory"]:
            if row["method"] == method:
                megabytes = [size / 1e6 for size in row["peak_bytes"]]
                axis.plot(report["steps"], megabytes, marker="o", label=row["way"])
        axis.set(title=method, xlabel="steps N", yscale="log", xscale="log")
        axis.set_xticks(report["steps"], [str(n) for n in report["steps"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("peak memory of a gradient, MB")
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def show(report: dict[str, Any]) -> None:
    from tabulate import tabulate

    if report.get("memory"):
        state = report["state_bytes"]
        print(f"\npeak memory in MB by N; one state is {state / 1e6:.3f} MB")
        names = ["method", "way", *map(str, report["steps"]), "growth per step / state"]
        table = [
            [r["method"], r["way"], *(b / 1e6 for b in r["peak_bytes"]), r["growth_in_states"]]
            for r in report["memory"]
        ]
        print(tabulate(table, names, floatfmt=".3f"))
    for key in ("resident", "time", "adjoint"):
        if report.get(key):
            print(f"\n{key}, N = {report['steps'][-1]}")
            print(tabulate(report[key], "keys", floatfmt=".4g"))


def main() -> None:
    parser = gradient_models.parser(__doc__, batch=4, models="random")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["memory", "time"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "N"), help="used by resident")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = gradient_models.MODELS[arguments.models](arguments.batch)
    if arguments.one:
        gradient_by(arguments.one[0], models, "coup", int(arguments.one[1]))()
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    steps, longest = arguments.steps, arguments.steps[-1]
    report: dict[str, Any] = {
        "environment": environment("cpu"),
        "models": arguments.models,
        "images": list(models[2].shape),
        "steps": steps,
        "state_bytes": models[2].numel() * 4,
    }
    for part in arguments.parts:
        report[part] = {
            "memory": lambda: memory_table(models, steps),
            "resident": lambda: resident_sizes(arguments, steps),
            "time": lambda: time_table(models, longest, arguments.repeats),
            "adjoint": lambda: adjoint_table(models, longest, arguments.repeats),
        }[part]()
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    if arguments.plot:
        plot(arguments.plot, report)


if __name__ == "__main__":
    main()
