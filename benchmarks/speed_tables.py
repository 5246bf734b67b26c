"""Tables of speed, from rows that `coup-fast bench` stored. Run benchmarks/tables.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from table_cells import FOLDER, file_of, table

from coup_fast.benchmarking import loops, results
from coup_fast.benchmarking.components import COMPONENTS
from coup_fast.benchmarking.rows import Row
from coup_fast.benchmarking.tables import duration, grouped

Rows = Sequence[Row]


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
        f"Measured {first['date']} on {first['device_name']} ({first['instruction_set']}) with "
        f"{', '.join(packages)}. One thread is timed by its processor time. A `~` marks the "
        f"{unsteady} of {count} medians that a busy machine made unsteady. {file_of(path)} has all "
        "numbers, with the commit of each."
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
    headers += ["functional against eager", "functional against torch.compile"]
    headers += ["only noise against eager", "only arithmetic against eager", "two threads"]
    return table(headers, body)


def instruction_sets() -> str:
    """The guided step under each instruction set of one processor, measured one after the other."""
    body, source = [], ""
    paths = sorted((FOLDER / "instruction_sets").glob("*.json"))
    for path in paths:
        rows = results.load(path)
        stamp = rows[0].stamp or {}
        for group in _cases(rows, "guided COUP step", threads=1):
            eager, in_place = _find(group, "eager"), _find(group, "fused in place")
            assert in_place is not None
            body.append(
                [
                    str(stamp["instruction_set"]),
                    str(group[0].images),
                    f"{_mark(in_place)}{in_place.ns_per_element:.2f}",
                    _times(eager, in_place),
                    _times(_find(group, "torch.compile"), in_place),
                ]
            )
        source = f"Measured {stamp['date']} on {stamp['device_name']}"
    headers = ["instruction set", "images 3×32×32", "in place, ns/element"]
    headers += ["against eager", "against torch.compile"]
    files = ", ".join(file_of(path) for path in paths)
    return f"{table(headers, body)}\n\n{source}, one thread: {files}."


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
    lines = table(["operator", "size", "time", "against eager", "against torch.compile"], body)
    calls = next(iter(_cases(rows, "cost of a call", threads=1)), [])
    empty = _find(calls, "empty operator")
    if empty is None or empty.timing is None:
        return lines
    costs = []
    for row in calls:
        if row.timing and row is not empty:
            above = 1e6 * (row.timing.median - empty.timing.median)
            costs.append(f"{row.variant.replace('3x32x32', '1 image')}: {_mark(row)}{above:.1f}")
    return (
        f"{lines}\n\nMicroseconds that a call takes beyond an empty operator: {'; '.join(costs)}."
    )


SDE_RIVALS = {
    loops.PLAIN: "plain PyTorch",
    loops.TORCHSDE: "torchsde `sdeint`",
    loops.RELEASED: "released code",
    loops.TRAINABLE: "released code, weights trainable",
}
DDPM_RIVALS = {loops.DIFFUSERS: "diffusers' `DDPMScheduler`"}


def _network(row: Row) -> str:
    """The networks of a loop's case, as a table names them."""
    label = row.case.partition(", ")[2].partition(" networks")[0]
    return label.replace("networks of no cost", "none")


def _loops(rows: Rows, kinds: Sequence[str], rivals: dict[str, str]) -> str:
    """Time of a step of our loop, and how many times as long each rival takes."""
    body = []
    for group in [group for kind in kinds for group in _cases(rows, kind, threads=1)]:
        first, ours = group[0], _find(group, loops.OURS)
        title = first.case.partition(", ")[0].removesuffix(" loop")
        cells = [title, _network(first), str(first.images), str(first.steps), _time(ours)]
        body.append([*cells, *(_times(_find(group, name), ours) for name in rivals)])
    headers = ["loop", "networks", "images", "steps", "coup_fast, a step", *rivals.values()]
    return table(headers, body)


def loop(rows: Rows, _: Path) -> str:
    """Loops over a reverse SDE beside plain PyTorch's and torchsde's."""
    kinds = ("coup loop", "diffpure loop,", "diffpure loop and gradient")
    return _loops(rows, kinds, SDE_RIVALS)


def ddpm(rows: Rows, _: Path) -> str:
    """DDPM's loop beside that of diffusers."""
    return _loops(rows, ("ddpm loop",), DDPM_RIVALS)


def components(rows: Rows, _: Path) -> str:
    """Shares of a step's time."""
    body = []
    for group in _cases(rows, "coup loop", threads=1):
        for row in group:
            if not row.components or row.variant not in (loops.OURS, loops.PLAIN):
                continue
            total = sum(row.components.values())
            shares = [f"{100 * row.components[name] / total:.1f} %" for name in COMPONENTS]
            cells = [_network(row), str(row.images), row.variant]
            body.append([*cells, duration(total / row.steps).replace("us", "µs"), *shares])
    return table(["networks", "images", "loop", "a step", *COMPONENTS], body)


SPEED = {  # README's rows: the start of a case's name, its images, our variant
    "a guided COUP step": ("guided COUP step", 64, "fused in place"),
    "a step of ADP": ("adaptive_step", 64, "fused"),
    "a step of a COUP run, networks that cost nothing": (
        "coup loop, networks of no cost",
        64,
        loops.OURS,
    ),
    "a step of a COUP run, CIFAR-10-sized networks": ("coup loop, CIFAR-sized", 8, loops.OURS),
}


def speed(rows: Rows, _: Path) -> str:
    """README's few rows: our time, and how many times as long others take."""
    body = []
    for name, (start, images, variant) in SPEED.items():
        (group,) = (g for g in _cases(rows, start, threads=1) if g[0].images == images)
        ours, plain = _find(group, variant), _find(group, "eager") or _find(group, loops.PLAIN)
        rivals = (plain, _find(group, "torch.compile"), _find(group, loops.RELEASED))
        body.append([name, str(images), _time(ours), *(_times(rival, ours) for rival in rivals)])
    headers = ["one thread of a CPU", "images", "coup_fast", "eager PyTorch", "torch.compile"]
    return table([*headers, "released code (torchsde)"], body)
