"""What kept graphs of steps save in a gradient and in an attack, and what memory they take.

    python benchmarks/kept_graphs.py
    python benchmarks/kept_graphs.py --parts attack --batch 2 --repeats 3

"gradient": forward and backward of one purification, by plain autograd, exactly with every graph
kept, and exactly with none. "attack": PGD-40 with EOT 8 in `--budget` bytes as it is, and with
every step computed again. "memory": the peak of an EOT gradient under several budgets (`LiveBytes`:
tensors alive at once above those alive before), without the result. Freed memory is kept by the
process, as `coup-fast` does. Time is processor time of this process; the ways
take turns, and ratios are medians over the turns. Every gradient and attacked image is compared bit
for bit first; a difference ends the script.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import gradient_models
import torch
from torch import Tensor

from coup_fast import PurifiedClassifier, Purifier
from coup_fast.attacks import preset
from coup_fast.attacks.eot import EotGradient, MemoryModel, eot_gradient
from coup_fast.attacks.peak_memory import peak_bytes
from coup_fast.evaluation.provenance import environment
from coup_fast.evaluation.tables import render_table
from coup_fast.malloc import keep_freed_memory

METHODS = ("diffpure", "coup")
PARTS = ("gradient", "attack", "memory")
EVERYTHING = 2**40
RECOMPUTED, KEPT = "computed again", "kept"


def purifier(models: gradient_models.Models, method: str, steps: int, **options: Any) -> Purifier:
    """The method in exponential steps."""
    score_model, classifier, _ = models
    short = {"num_steps": steps, "solver": "exponential"}
    return Purifier(score_model, classifier, method=method, **short, **options)


def in_turns(ways: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each way by turn, after one run of each, whose bits are compared."""
    results = {name: run() for name, run in ways.items()}
    first, *others = results
    for name in others:
        if not torch.equal(results[name], results[first]):
            raise SystemExit(f"{name!r} gave other bits than {first!r}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        order = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for name in order:
            started = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - started)
    return seconds


def over(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median over turns of the time of one way over that of another in the same turn."""
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def gradient_of(clean: Purifier, images: Tensor) -> Tensor:
    """One gradient of the images."""
    leaf = images.clone().requires_grad_()
    out = clean(leaf)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad(out, leaf, weights)[0]


def gradient_rows(models: gradient_models.Models, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Time of a gradient by each way, over plain autograd's."""
    images = models[2]
    rows = []
    for method in METHODS:
        made = partial(purifier, models, method, steps)
        ways = {
            "autograd": partial(gradient_of, made(gradient="autograd"), images),
            KEPT: partial(gradient_of, made(graph_memory=EVERYTHING), images),
            RECOMPUTED: partial(gradient_of, made(), images),
        }
        seconds = in_turns(ways, repeats)
        for way, run in ways.items():
            rows.append(
                {
                    "method": method,
                    "graphs": way,
                    "seconds": median(seconds[way]),
                    "over_autograd": over(seconds, way, "autograd"),
                    "peak_bytes": peak_bytes(run, images.device),
                }
            )
    return rows


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it, an EOT gradient has no memory for graphs, and the same micro-batches."""
    shared = MemoryModel.shared

    def none_left(*args: Any) -> tuple[int, int]:
        return shared(*args)[0], 0

    with mock.patch.object(MemoryModel, "shared", none_left):
        yield


def attack_rows(
    models: gradient_models.Models, steps: int, repeats: int, budget: int
) -> list[dict[str, Any]]:
    """Time of an attack, with graphs kept and with every step computed again."""
    _, classifier, images = models
    labels = classifier(images).argmax(1)
    attack = preset("pgd40", eot=8, eps=0.2)
    rows = []
    for method in METHODS:
        defended = PurifiedClassifier(purifier(models, method, steps), classifier)
        kept = partial(attack, defended, images, labels, memory_budget=budget)
        again = nothing_kept()(kept)
        seconds = in_turns({KEPT: kept, RECOMPUTED: again}, repeats)
        rows.append(
            {
                "method": method,
                "seconds_kept": median(seconds[KEPT]),
                "seconds_again": median(seconds[RECOMPUTED]),
                "speedup": over(seconds, RECOMPUTED, KEPT),
                "turns": repeats,
            }
        )
    return rows


def result_bytes(found: EotGradient) -> int:
    """Of an EOT gradient's sums, losses and scores, which a budget does not count."""
    return sum(t.numel() * t.element_size() for t in (found.gradient, found.losses, found.scores))


def memory_rows(models: gradient_models.Models, steps: int) -> list[dict[str, Any]]:
    """Peak of an EOT gradient under budgets from one run's need up."""
    _, classifier, images = models
    labels = classifier(images).argmax(1)
    rows = []
    for method in METHODS:
        defended = PurifiedClassifier(purifier(models, method, steps), classifier)
        measured = eot_gradient(defended, images, labels, draws=8, memory_budget=EVERYTHING)
        assert measured.memory is not None
        least, all_graphs = measured.memory.bytes(1), steps * measured.memory.one_step
        runs = 8 * len(images)
        for budget in (least, 4 * least, least + 2 * all_graphs, 2 * runs * (least + all_graphs)):
            take = partial(eot_gradient, defended, images, labels, draws=8, memory_budget=budget)
            found = take()  # measures the graphs of this micro-batch
            peak = peak_bytes(take, images.device) - result_bytes(found)
            rows.append(
                {
                    "method": method,
                    "budget_bytes": budget,
                    "peak_bytes": peak,
                    "runs_at_a_time": found.micro_batch,
                }
            )
            if peak > budget:
                raise SystemExit(f"{method}: a peak of {peak} bytes in a budget of {budget}")
    return rows


def show(report: dict[str, Any]) -> None:
    for part in PARTS:
        rows = report.get(part)
        if rows:
            print(f"\n{part}")
            cells = [
                [f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows
            ]
            print(render_table(list(rows[0]), cells))


def main() -> None:
    parser = gradient_models.parser(__doc__, batch=2, models="bundled")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--budget", type=int, default=2 * 10**9, help="bytes for the attack")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    models = gradient_models.MODELS[arguments.models](arguments.batch)
    steps, repeats = arguments.steps, arguments.repeats
    report: dict[str, Any] = {
        "environment": environment("cpu"),
        "models": arguments.models,
        "images": list(models[2].shape),
        "steps": steps,
        "budget": arguments.budget,
    }
    makers = {
        "gradient": lambda: gradient_rows(models, steps, repeats),
        "attack": lambda: attack_rows(models, steps, repeats, arguments.budget),
        "memory": lambda: memory_rows(models, steps),
    }
    for part in arguments.parts:
        report[part] = makers[part]()
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
