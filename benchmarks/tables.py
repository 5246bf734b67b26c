"""Write the tables of README and docs from stored results, between markers.

    python benchmarks/tables.py            # README.md and the pages of docs/ that have such tables
    python benchmarks/tables.py --check    # exit status 1 if one of them says something else
    python benchmarks/tables.py --results FILE.json --pages FILE.md

`<!-- bench:NAME -->` is a table of SPEED or STORED below. Speed is taken from the newest results
of a CPU; a ~ marks a median whose samples spread so widely that the machine must have been busy.
`<!-- eval:NAME -->` is the report benchmarks/results/NAME.json, which `coup-fast eval` wrote.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import accuracy_tables
import guidance_tables
import ptx_instructions
import speed_tables
from table_cells import FOLDER

from coup_fast.benchmarking import results
from coup_fast.benchmarking.rows import Row

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guidance", "results", "performance", "kernels")),
)

SPEED: dict[str, Callable[[Sequence[Row], Path], str]] = {
    "source": speed_tables.source,
    "speed": speed_tables.speed,
    "step": speed_tables.step,
    "operators": speed_tables.operators,
    "loop": speed_tables.loop,
    "ddpm": speed_tables.ddpm,
    "components": speed_tables.components,
}
STORED: dict[str, Callable[[], str]] = {
    "adaptive": accuracy_tables.adaptive,
    "fast": accuracy_tables.fast,
    "instruction_sets": speed_tables.instruction_sets,
    "demo": accuracy_tables.demo,
    "instructions": ptx_instructions.table,
    "steps": accuracy_tables.steps,
    "toy": accuracy_tables.toy,
    **guidance_tables.TABLES,
}


def fill(text: str, path: Path) -> str:
    """A page's text with its blocks filled, those of speed from this results file.

    Raises ValueError for a marker of an unknown name or without its end.
    """
    rows = results.load(path)

    def block(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        report = FOLDER / f"{name}.json"
        if kind == "eval" and report.is_file():
            content = accuracy_tables.evaluation(report)
        elif kind == "bench" and name in SPEED:
            content = SPEED[name](rows, path)
        elif kind == "bench" and name in STORED:
            content = STORED[name]()
        else:
            known = ", ".join([*SPEED, *STORED, *(f.stem for f in FOLDER.glob("*.json"))])
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
    parser.add_argument("--pages", type=Path, nargs="+", metavar="FILE", default=PAGES)
    arguments = parser.parse_args(argv)
    path = arguments.results or results.newest(FOLDER, "cpu")
    if path is None:
        print(f"there are no results in {FOLDER}", file=sys.stderr)
        return 2
    same = True
    for page in arguments.pages:
        before = page.read_text(encoding="utf-8")
        after = fill(before, path)
        same = same and before == after
        if not arguments.check:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            print(f"{page} says something else than the stored results")
    return 0 if same or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
