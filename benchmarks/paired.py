"""Compare the defences of an evaluation image by image with one of them.

    coup-fast eval benchmarks/steps.toml --out DIR
    python benchmarks/paired.py DIR --reference "COUP, Euler num_steps=100" --match COUP

This is for looking at an evaluation that is there. Comparisons that are to count as tests are
stated before the run, in [[compare]] tables of the configuration, and are in its report; p is not
adjusted for the number of comparisons here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from coup_fast.evaluation.paired import COLUMNS, count_pairs
from coup_fast.evaluation.tables import render_table


def right(folder: Path) -> dict[tuple[str, str], list[bool]]:
    """Whether each image is classified rightly under draw 0, by (defence, attack or "clean").

    As in a report, only batches that every row has finished count, so entry i of all lists is
    about the same image. Attacks that differ in any option are different ones.
    """
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = report["identity"]["config"]["rows"]
    batches: dict[int, dict[int, list[bool]]] = {}
    for path in sorted((folder / "state").glob("batch-*-row-*.json")):
        unit = json.loads(path.read_text(encoding="utf-8"))
        result = unit["result"]
        pairs = zip(result["predictions"], result["labels"], strict=True)
        found = [draws[0] == label for draws, label in pairs]
        batches.setdefault(unit["batch"], {})[unit["row"]] = found
    finished = [batch for _, batch in sorted(batches.items()) if len(batch) == len(rows)]
    names = attack_names([row["attack"] for row in rows])
    return {
        (row["defence"]["name"], names[i]): [v for batch in finished for v in batch[i]]
        for i, row in enumerate(rows)
    }


def attack_names(attacks: list[dict[str, Any] | None]) -> list[str]:
    """A name for each, "clean" for None; the same for equal attacks alone."""
    given: dict[str, list[dict[str, Any]]] = {}
    names = []
    for attack in attacks:
        if attack is None:
            names.append("clean")
            continue
        name = f"{attack['name']}, {attack['norm']} {attack['eps']:g}"
        known = given.setdefault(name, [])
        if attack not in known:
            known.append(attack)
        number = known.index(attack)
        names.append(f"{name} ({number + 1})" if number else name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of an evaluation")
    parser.add_argument("--reference", required=True, help="name of a defence in its report")
    parser.add_argument("--match", default="", help="only defences whose names hold this")
    args = parser.parse_args()
    found = right(args.folder)
    defences = sorted({defence for defence, _ in found})
    if args.reference not in defences:
        parser.error(f"--reference {args.reference!r} is none of {', '.join(defences)}")
    if not all(map(len, found.values())):
        parser.error(f"no batch in {args.folder} has been finished by every row")
    body = []
    for (defence, attack), values in found.items():
        reference = found.get((args.reference, attack))
        if reference is None or defence == args.reference or args.match not in defence:
            continue
        counts = count_pairs(values, reference)
        body.append([defence, attack, *counts.cells()])
    print(render_table(["defence", "attack", "right", "reference", *COLUMNS], body))


if __name__ == "__main__":
    main()
