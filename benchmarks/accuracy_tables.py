"""Tables of accuracy, from reports that `coup-fast eval` stored. Run benchmarks/tables.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import binomtest
from table_cells import FOLDER, file_of, networks_of, percent, table

from coup_fast.cli.demo_run import NAMES
from coup_fast.evaluation.intervals import Proportion

IMAGES = {"mnist": "digits", "cifar10": "CIFAR-10 images"}
EULER, PUBLISHED_STEPS = "euler", 100


def steps() -> str:
    """Accuracy against the number of steps, where benchmarks/steps*.toml measured it."""
    tables, sources = [], []
    for path in sorted(FOLDER.glob("steps*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        models = report["identity"]["config"]["models"]
        images = f"{report['images']} {IMAGES[models]}{networks_of(path)}"
        attacked = [row for row in report["rows"] if row["attacked"] is not None]
        for label in ("clean", attacked[0]["attack_label"]):
            known: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
            for row in attacked:
                method, settings = row["defence"]["method"], row["defence"]["options"]
                number = (
                    row["clean"]["one_draw"] if label == "clean" else row["attacked"]["average"]
                )
                by_count = known.setdefault((method, settings["solver"]), {})
                by_count[settings["num_steps"]] = number
            tables.append(f"**{images}, {label}**\n\n{_by_steps(known)}")
        sources.append(file_of(path))
    return "\n\n".join([*tables, f"Every number and setting: {', '.join(sources)}."])


def _by_steps(known: dict[tuple[str, str], dict[int, dict[str, float]]]) -> str:
    """One table: a line for each method and solver, a column for each number of steps."""
    counts = sorted({count for by_count in known.values() for count in by_count})
    body = []
    for (method, solver), by_count in known.items():
        published = known[method, EULER][PUBLISHED_STEPS]
        cells = []
        for count in counts:
            number = by_count.get(count)
            inside = number and published["low"] <= number["rate"] <= published["high"]
            cells.append(f"**{percent(number)}**" if inside else percent(number))
        body.append([f"`{method}`, {solver}", *cells])
    return table(["method, solver", *map(str, counts)], body)


LOOPS = {  # of benchmarks/fast_setting.py
    "released": "released loop",
    "published": "published setting",
    "fast": "fast setting",
}


def fast() -> str:
    """Seconds and accuracy of the released loop, the published setting and the fast one."""
    tables, sources, device = [], [], ""
    for path in sorted(FOLDER.glob("fast_*.json"), reverse=True):
        state = json.loads(path.read_text(encoding="utf-8"))
        body, released = [], math.nan
        for name, label in LOOPS.items():
            batches = [batch for batch in state["batches"] if name in batch]
            seconds = median(100 * b[name]["seconds"] / len(b["labels"]) for b in batches)
            released = seconds if name == "released" else released
            cells = [f"{seconds:.2f} s", f"{released / seconds:.1f}×"]
            for what in ("clean", "attacked"):
                right, published = _right(batches, name, what), _right(batches, "published", what)
                cells.append(Proportion(sum(right), len(right)).percent())
                cells.append("" if name == "published" else _paired(right, published))
            body.append([label, str(len(right)), *cells])
        images = IMAGES[state["models"]] + networks_of(path)
        headers = ["COUP", "images", "100 images take", "as fast", "clean", "won : lost, p"]
        tables.append(
            f"**{images}**, fast: {_options(state['options'])}\n\n"
            + table([*headers, "attacked", "won : lost, p"], body)
        )
        sources.append(file_of(path))
        device = state["environment"]["device_name"]
    return "\n\n".join([*tables, f"One thread of {device}. Every answer: {', '.join(sources)}."])


def _right(batches: list[dict[str, Any]], name: str, what: str) -> list[bool]:
    """Whether each image of the batches was classified rightly."""
    return [
        guess == label
        for batch in batches
        for guess, label in zip(batch[name][what], batch["labels"], strict=True)
    ]


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in options.items())


def _paired(right: list[bool], reference: list[bool]) -> str:
    """Images that only one of the two gets right, and McNemar's exact p."""
    pairs = list(zip(right, reference, strict=True))
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return f"{won} : {lost}, {p:.2f}"


ADAPTIVE = {  # README's rows: names of the same defence in mnist.json and cifar10_adaptive.json
    "none": ("undefended", "undefended"),
    "DiffPure": ("DiffPure", "DiffPure"),
    "COUP": ("COUP", "COUP λ=1"),
    "COUP without guidance": ("COUP without guidance (λ=0)", "COUP λ=0"),
    "ADP": ("ADP", "ADP, 3 steps"),
}


def adaptive() -> str:
    """README's few rows: each defence under the worst of its attacks on each image."""
    digits, natural, bare = (
        json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("mnist", "cifar10_adaptive", "cifar10")
    )
    body = []
    for name, names in ADAPTIVE.items():
        cells = []
        for report, its_name in zip((digits, natural), names, strict=True):
            cells += _clean_and_worst(report, its_name) or _clean_and_worst(bare, its_name) or []
        body.append([name, *cells])
    headers = ["defence", "digits, clean", "digits, attacked"]
    lines = table([*headers, "CIFAR-10, clean", "CIFAR-10, attacked"], body)
    return (
        f"{lines}\n\nPercent, average over fresh draws, with 95 % Wilson intervals; "
        f"{digits['images']} digits (ℓ∞ 0.15) and {natural['images']} CIFAR-10 images (ℓ∞ 8/255; "
        f"undefended: {bare['images']} under another attack). COUP and DiffPure take five "
        "exponential steps, not the published hundred; ADP takes three on CIFAR-10."
    )


def _clean_and_worst(report: dict[str, Any], name: str) -> list[str] | None:
    """Accuracy of a defence on clean images and under the worst of its attacks, fresh draws."""
    rows = [row for row in report["rows"] if row["defence"]["name"] == name and row["attacked"]]
    if not rows:
        return None
    worst = next((row for row in rows if row["worst_of"]), rows[0])
    return [percent(worst["clean"]["one_draw"]), percent(worst["attacked"]["average"])]


def demo() -> str:
    """What `coup-fast demo` found."""
    path = FOLDER / "demo_mnist.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    body = []
    for row in [{"name": "none", **report["undefended"]}, *report["defences"]]:
        clean, attacked = (percent(row[key]["accuracy"]) for key in ("clean", "attacked"))
        body.append(
            [NAMES.get(row["name"], row["name"]), str(row.get("num_draws", "")), clean, attacked]
        )
    lines = table(["defence", "draws", "clean", "under attack (weak)"], body)
    return (
        f"{lines}\n\n{report['data']['images']} digits, in percent, with 95 % Wilson intervals; "
        f"commit {report['environment']['commit']}. Every number and setting: {file_of(path)}."
    )


def toy() -> str:
    """What `coup-fast toy` found."""
    path = FOLDER / "toy.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    shifts = report["label_shift"]
    body = [
        [s["starts"], percent(s["score_flow_alone"]), percent(s["guided_flow"])] for s in shifts
    ]
    lines = table(["points", "score flow", "guided flow"], body)
    return (
        f"{lines}\n\nPercent of {shifts[0]['guided_flow']['total']:,} points whose label shifts. "
        f"Every number and setting: {file_of(path)}."
    )


def evaluation(path: Path) -> str:
    """The rows of a stored report under attack, in percent, with 95 % Wilson intervals."""
    report = json.loads(path.read_text(encoding="utf-8"))
    attacked = [row for row in report["rows"] if row["attacked"] is not None]
    draws = max(row["draws"] for row in attacked)
    clean = {row["defence"]["name"]: row["clean"]["one_draw"] for row in attacked}
    body = []
    for row in attacked:
        under, name = row["attacked"], row["defence"]["name"]
        label = row["attack_label"]
        worst = [] if draws == 1 else [percent(under["worst"])]
        body.append([name, label, percent(clean[name]), percent(under["average"]), *worst])
    several = [] if draws == 1 else [f"worst of {draws}"]
    average = "attacked" if draws == 1 else f"average of {draws}"
    lines = table(["defence", "attack", "clean", average, *several], body)
    return (
        f"{lines}\n\n{report['images']} images{networks_of(path)}, in percent, with 95 % Wilson "
        f"intervals; commit {report['run']['environment']['commit']}. Every number and setting: "
        f"{file_of(path)}."
    )
