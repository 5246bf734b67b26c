"""Write README's tables from stored results, between markers.

    python benchmarks/readme.py            # rewrites README.md
    python benchmarks/readme.py --check    # exit status 1 if README.md says something else
    python benchmarks/readme.py --results FILE.json --readme FILE.md

`<!-- bench:NAME -->` is speed, from the newest results of a device; numbers marked with ~ are
medians of samples whose middle half spreads over more than a quarter of the median: the machine was
busy. `<!-- eval:NAME -->` is the report benchmarks/results/NAME.json that `coup-fast eval` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from coup_fast.benchmarking import loops, results
from coup_fast.benchmarking.components import COMPONENTS
from coup_fast.benchmarking.rows import Row
from coup_fast.benchmarking.tables import duration, grouped

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"

Rows = Sequence[Row]


def _table(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _find(rows: Rows, variant: str, part: str = "whole") -> Row | None:
    return next((r for r in rows if r.variant == variant and r.part == part and r.timing), None)


def _mark(*rows: Row | None) -> str:
    return "~" if any(r is not None and r.timing and r.timing.unsteady for r in rows) else ""


def _time(row: Row | None) -> str:
    step = None if row is None else row.seconds_per_step
    return "" if step is None else _mark(row) + duration(step).replace("us", "µs")


def _times(slow: Row | None, fast: Row | None) -> str:
    """How many times as fast the second is."""
    if slow is None or fast is None or slow.timing is None or fast.timing is None:
        return ""
    ratio = slow.timing.median / fast.timing.median
    return f"{_mark(slow, fast)}{ratio:.2g}×" if ratio < 10 else f"{_mark(slow, fast)}{ratio:.0f}×"


def _threads(row: Row) -> int:
    return int((row.stamp or {})["threads"])


def _cases(rows: Rows, start: str, threads: int | None = None) -> list[list[Row]]:
    """Groups whose case starts so, by threads and size."""
    found = [
        group
        for group in grouped(rows)
        if group[0].case.startswith(start) and threads in (None, _threads(group[0]))
    ]
    return sorted(found, key=lambda g: (_threads(g[0]), g[0].case, g[0].images))


def source(rows: Rows, path: Path) -> str:
    """Where the numbers come from."""
    stamps = [row.stamp or {} for row in rows]
    first = stamps[0]
    count = sum(row.timing is not None for row in rows)
    unsteady = sum(row.timing is not None and row.timing.unsteady for row in rows)
    versions = first["versions"]
    packages = [f"{n} {versions[n]}" for n in ("torch", "torchsde", "diffusers") if n in versions]
    return (
        f"Measured {first['date']} on {first['device_name']} ({first['instruction_set']}), "
        f"{', '.join(packages)}; one thread by processor time. "
        f"`~` marks the {unsteady} of {count} medians that a busy machine made unsteady. "
        f"All numbers, with the commit of each: [{path.name}](benchmarks/results/{path.name})."
    )


def _two_threads(rows: Rows, one: Row | None) -> str:
    """How many times as fast two threads are as one."""
    for group in _cases(rows, "guided COUP step", threads=2):
        two = _find(group, "fused in place")
        if one and two and one.images == two.images:
            return _times(one, two)
    return ""


def step(rows: Rows, _: Path) -> str:
    """The guided step against eager PyTorch, whole and in its two shares."""
    body = []
    for group in _cases(rows, "guided COUP step", threads=1):
        eager = {p: _find(group, "eager", p) for p in ("whole", "noise", "arithmetic")}
        fused, in_place = _find(group, "fused"), _find(group, "fused in place")
        per_element = "" if in_place is None else f"{_mark(in_place)}{in_place.ns_per_element:.2f}"
        body.append(
            [
                str(group[0].images),
                per_element,
                _times(eager["whole"], in_place),
                _times(eager["whole"], fused),
                _times(_find(group, "torch.compile"), fused),
                _times(eager["noise"], _find(group, "fused", "noise")),
                _times(eager["arithmetic"], _find(group, "fused", "arithmetic")),
                _two_threads(rows, in_place),
            ]
        )
    headers = ["images 3×32×32", "in place, ns/element", "in place against eager"]
    headers += ["fused against eager", "fused against torch.compile"]
    headers += ["noise alone against eager", "arithmetic alone against eager"]
    headers.append("in place, two threads against one")
    return _table(headers, body)


def operators(rows: Rows, _: Path) -> str:
    """The other operators, and what a call costs."""
    body = []
    for start in ("normal", "adaptive_step", "confidence_cotangent"):
        for group in _cases(rows, start, threads=1):
            first = group[0]
            fused, eager = _find(group, "fused"), _find(group, "eager")
            name, _, shape = first.case.partition(" ")
            size = shape or f"{first.images} × {first.size.replace('x', '×')}"
            compiled = _find(group, "torch.compile")
            body.append(
                [f"`{name}`", size, _time(fused), _times(eager, fused), _times(compiled, fused)]
            )
    table = _table(["operator", "size", "fused", "against eager", "against torch.compile"], body)
    calls = next(iter(_cases(rows, "cost of a call", threads=1)), [])
    empty = _find(calls, "empty operator")
    if empty is None or empty.timing is None:
        return table
    costs = []
    for row in calls:
        if row.timing and row is not empty:
            above = 1e6 * (row.timing.median - empty.timing.median)
            costs.append(f"{row.variant.replace('3x32x32', '1 image')}: {_mark(row)}{above:.1f}")
    return f"{table}\n\nMicroseconds of a call above an empty operator: {'; '.join(costs)}."


LOOPS = (loops.PLAIN, loops.TORCHSDE, loops.RELEASED, loops.TRAINABLE, loops.DIFFUSERS)


def loop(rows: Rows, _: Path) -> str:
    """Time of a step of our loop, and how many times as long the others take."""
    kinds = ("coup loop", "diffpure loop,", "ddpm loop", "diffpure loop and gradient")
    groups = [group for kind in kinds for group in _cases(rows, kind, threads=1)]
    used = [name for name in LOOPS if any(_find(group, name) for group in groups)]
    body = []
    for group in groups:
        first, ours = group[0], _find(group, loops.OURS)
        title, _, label = first.case.partition(", ")
        network = label.partition(" networks")[0].replace("networks of no cost", "none")
        cells = [title.removesuffix(" loop"), network, str(first.images), str(first.steps)]
        body.append([*cells, _time(ours), *(_times(_find(group, n), ours) for n in used)])
    return _table(["loop", "networks", "images", "steps", "coup_fast, a step", *used], body)


def components(rows: Rows, _: Path) -> str:
    """Shares of a step's time."""
    body = []
    for group in _cases(rows, "coup loop", threads=1):
        for row in group:
            if not row.components or row.variant not in (loops.OURS, loops.PLAIN):
                continue
            total = sum(row.components.values())
            network = row.case.partition(", ")[2].partition(" networks")[0]
            shares = [f"{100 * row.components[name] / total:.1f} %" for name in COMPONENTS]
            cells = [network, str(row.images), row.variant]
            body.append([*cells, duration(total / row.steps).replace("us", "µs"), *shares])
    return _table(["networks", "images", "loop", "a step", *COMPONENTS], body)


PUBLISHED = ("euler", 100)


def steps(_: Rows, __: Path) -> str:
    """Accuracy against the number of steps, where benchmarks/steps*.toml measured it."""
    counts: set[int] = set()
    lines: list[tuple[list[str], dict[int, str]]] = []
    sources = []
    for path in sorted(FOLDER.glob("steps*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        networks = {"mnist": "digits", "cifar10": "CIFAR-10"}[
            report["identity"]["config"]["models"]
        ]
        attacked = [row for row in report["rows"] if row["attacked"] is not None]
        for kind in ("clean", "attacked"):
            known: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
            for row in attacked:
                settings = row["defence"]["options"]
                number = row["clean"]["one_draw"] if kind == "clean" else row["attacked"]["average"]
                by_count = known.setdefault((row["defence"]["method"], settings["solver"]), {})
                by_count[settings["num_steps"]] = number
            for (method, solver), by_count in known.items():
                counts |= set(by_count)
                published = known[method, PUBLISHED[0]][PUBLISHED[1]]
                cells = {n: _percent(number) for n, number in by_count.items()}
                for n, number in by_count.items():
                    if published["low"] <= number["rate"] <= published["high"]:
                        cells[n] = f"**{cells[n]}**"
                label = "clean" if kind == "clean" else attacked[0]["attack_label"]
                lines.append(([f"{report['images']} {networks}", label, method, solver], cells))
        sources.append(f"[{path.name}](benchmarks/results/{path.name})")
    order = sorted(counts)
    headers = ["images", "attack", "method", "solver", *map(str, order)]
    body = [[*names, *(cells.get(n, "") for n in order)] for names, cells in lines]
    return f"{_table(headers, body)}\n\nEvery number and setting: {', '.join(sources)}."


BLOCKS: dict[str, Callable[[Rows, Path], str]] = {
    "source": source,
    "step": step,
    "operators": operators,
    "loop": loop,
    "components": components,
    "steps": steps,
}


def _percent(number: dict[str, float] | None) -> str:
    if number is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number[k] for k in ("rate", "low", "high")))


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
        worst = [] if draws == 1 else [_percent(under["worst"])]
        body.append([name, label, _percent(clean[name]), _percent(under["average"]), *worst])
    several = [] if draws == 1 else [f"worst of {draws}"]
    average = "attacked" if draws == 1 else f"average of {draws}"
    table = _table(["defence", "attack", "clean", average, *several], body)
    return (
        f"{table}\n\n{report['images']} images, in percent, with 95 % Wilson intervals; commit "
        f"{report['run']['environment']['commit']}. Every number and setting: "
        f"[{path.name}](benchmarks/results/{path.name})."
    )


def fill(text: str, path: Path) -> str:
    """README's text with its blocks filled, those of speed from this results file.

    Raises ValueError for a marker of an unknown name or without its end.
    """
    rows = results.load(path)

    def block(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        report = FOLDER / f"{name}.json"
        if kind == "eval" and report.is_file():
            content = evaluation(report)
        elif kind == "bench" and name in BLOCKS:
            content = BLOCKS[name](rows, path)
        else:
            known = ", ".join([*BLOCKS, *(f.stem for f in FOLDER.glob("*.json"))])
            raise ValueError(f"there is no block {kind}:{name}; there are {known}")
        return f"<!-- {kind}:{name} -->\n{content}\n<!-- /{kind}:{name} -->"

    filled, count = re.subn(
        r"<!-- (bench|eval):(\w+) -->\n(?:.*?\n)?<!-- /\1:\2 -->", block, text, flags=re.DOTALL
    )
    if count != len(re.findall(r"<!-- /?(?:bench|eval):", text)) / 2:
        raise ValueError("a marker <!-- bench:NAME --> has no <!-- /bench:NAME --> after it")
    return filled


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would")
    parser.add_argument("--results", type=Path, help="default: the newest of the CPU")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args(argv)
    path = arguments.results or results.newest(FOLDER, "cpu")
    if path is None:
        print(f"there are no results in {FOLDER}", file=sys.stderr)
        return 2
    before = arguments.readme.read_text(encoding="utf-8")
    after = fill(before, path)
    if arguments.check:
        same = before == after
        print(f"{arguments.readme} {'agrees with' if same else 'differs from'} {path}")
        return 0 if same else 1
    arguments.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
