"""How long an evaluation takes on this machine, without running it.

    python benchmarks/eval_cost.py benchmarks/cifar10_guided.toml --data FILE.npz
    python benchmarks/eval_cost.py benchmarks/cifar10_guided.toml --data FILE.npz --processes 2
    python benchmarks/eval_cost.py benchmarks/digits_table.toml --set precision=bf16

A run is one image through a defence, under one draw. A few runs of each defence are timed, without
gradient and with each that its attacks take, and multiplied by the runs that its rows consist of.
"as stated" are the attacks of the file, and "full recipe" the same with the presets' own steps,
restarts and draws. Attacks on the bare classifier are left out, since they take next to nothing.
Time is processor time of one thread, or the wall clock on a GPU. TFLOP are those of the networks'
products and convolutions, for estimates of other machines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from coup_fast.attacks import PRESETS, AdaptiveGuided, Attack, Square
from coup_fast.attacks.losses import LOSSES
from coup_fast.attacks.objective import Objective
from coup_fast.cli.common import parse_settings
from coup_fast.evaluation.config import Row, from_dict, read_toml
from coup_fast.evaluation.defences import UNDEFENDED
from coup_fast.evaluation.sources import load_images, model_loader
from coup_fast.evaluation.work import Worker
from coup_fast.malloc import keep_freed_memory
from coup_fast.purified_classifier import PurifiedClassifier

VALUE = "value"  # a run without gradient
DRAW = 2**40  # far from those of attacks and judges
RECIPE = ("steps", "restarts", "finish_steps", "eot")


class Operations(TorchDispatchMode):
    """Counts the multiplications and additions of products and convolutions while it is on.

    `FlopCounterMode` does so too, but its hooks on modules cannot be used within a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def runs_of(attack: Attack) -> Counter[str]:
    """Runs that an attack takes for one image, by gradient."""
    found: Counter[str] = Counter()
    if attack.gradient == "classifier":
        return found
    if isinstance(attack, Square):
        found[VALUE] = (1 + 2 * attack.steps) * attack.eot
    elif isinstance(attack, AdaptiveGuided):
        parts = [attack.part(gradient) for gradient in attack.gradients]
        parts += [attack.finish()] if attack.finish_steps else []
        for part in parts:
            found += runs_of(part)
            found[VALUE] += 4 * attack.eot  # under which the parts are compared
    else:
        found[attack.gradient] = attack.restarts * attack.steps * attack.eot
        unguided = attack.gradient == "unguided"  # the defence is judged by runs of its own
        judged = attack.steps if unguided and attack.keep == "best" else 0
        if unguided or attack.keep == "best":
            judged += 1
        found[VALUE] += attack.restarts * judged * attack.eot
    return found


def full(attack: Attack) -> Attack:
    """With the steps, restarts and draws of its preset."""
    preset = next(one for one in PRESETS.values() if type(one) is type(attack))
    options = {name: getattr(preset, name) for name in RECIPE if hasattr(attack, name)}
    return attack.replace(**options) if isinstance(attack, Square | AdaptiveGuided) else attack


def runs_of_row(row: Row, draws: int, recipe: Callable[[Attack], Attack]) -> Counter[str]:
    """Runs of one image: the attack, and its judgement on the images as they are and in bytes."""
    if row.attack is None:
        return Counter({VALUE: draws})
    return runs_of(recipe(row.attack)) + Counter({VALUE: 2 * draws})


def measure(model: PurifiedClassifier, kind: str, worker: Worker) -> tuple[float, float]:
    """Seconds and FLOP of one run of a defence."""
    runs = len(worker.images)
    eot = 1 if kind == VALUE else min(4, runs)
    few = runs // eot
    images = worker.images[:few].to(worker.device)
    labels, ids = worker.labels[:few].to(worker.device), torch.arange(few, device=worker.device)
    gradient: Any = "exact" if kind == VALUE else kind
    budget = worker.config.memory_budget
    objective = Objective(model, labels, ids, LOSSES["ce"], gradient, eot, True, budget, True)
    call = partial(objective.value if kind == VALUE else objective.gradient, images, DRAW)
    with Operations() as counted:  # the first run, which looks at the networks
        call()
    cuda = worker.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    started = clock()
    call()
    if cuda:
        torch.cuda.synchronize()
    return (clock() - started) / (few * eot), counted.total / (few * eot)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file of coup-fast eval")
    parser.add_argument("--data", help="name of the data, in place of the file's")
    parser.add_argument("--data-folder", help="where the files of a named set are")
    parser.add_argument("--runs", type=int, help="timed at once (default: the file's batch_size)")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option")
    arguments = parser.parse_args(argv)
    tables = read_toml(arguments.config)
    total = tables["data"]["images"]
    runs = arguments.runs or tables["batch_size"]
    data = {**tables["data"], "images": runs}
    data |= {"name": arguments.data} if arguments.data else {}
    data |= {"folder": arguments.data_folder} if arguments.data_folder else {}
    settings = parse_settings(arguments.set)
    defences = [
        one if one["method"] == UNDEFENDED else {**one, "options": {**one["options"], **settings}}
        for one in tables["defence"]
    ]
    changes = {"data": data, "batch_size": runs, "defence": defences}
    config = from_dict({**tables, **changes})
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    device = torch.device(arguments.device)
    images, labels = load_images(config.data)
    worker = Worker(config, images, labels, model_loader(config.models, device), device)
    known: dict[str, Counter[str]] = {}
    wanted: dict[str, Counter[str]] = {}
    for row in config.rows:
        name = row.defence.name
        if isinstance(worker.defences[name], PurifiedClassifier):
            known.setdefault(name, Counter()).update(runs_of_row(row, config.draws, lambda a: a))
            wanted.setdefault(name, Counter()).update(runs_of_row(row, config.draws, full))
    rows, hours, full_hours, flop, full_flop = [], 0.0, 0.0, 0.0, 0.0
    for name, stated in tqdm(known.items()):
        model = worker.defences[name]
        costs = {kind: measure(model, kind, worker) for kind in {*stated, *wanted[name]}}
        one, many = (
            [sum(count * costs[kind][i] for kind, count in found.items()) for i in (0, 1)]
            for found in (stated, wanted[name])
        )
        each = ", ".join(f"{kind} {1000 * costs[kind][0]:.1f}" for kind in sorted(costs))
        rows.append([name, each, f"{one[0]:.1f}", f"{many[0]:.1f}"])
        scale = total / 3600 / arguments.processes
        hours, full_hours = hours + one[0] * scale, full_hours + many[0] * scale
        flop, full_flop = flop + one[1] * total, full_flop + many[1] * total
    headers = ["defence", "ms a run", "s an image, as stated", "s an image, full recipe"]
    print(tabulate(rows, headers))
    print(
        f"{total} images, {arguments.processes} process(es): {hours:.2g} h as stated "
        f"({flop / 1e12:.3g} TFLOP), {full_hours:.2g} h for the full recipe "
        f"({full_flop / 1e12:.3g} TFLOP)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
