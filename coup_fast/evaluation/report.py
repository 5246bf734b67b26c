"""The report of an evaluation: one table for the terminal, Markdown and CSV, and JSON.

Everything but the `run` part of the JSON and the last line of the Markdown is a function of the
results: the same bytes from any number of processes, interrupted or not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

from coup_fast.evaluation.config import EvalConfig, Row
from coup_fast.evaluation.defences import UNDEFENDED
from coup_fast.evaluation.fidelity import MEASURES, means
from coup_fast.evaluation.lines import Line, marks, radius
from coup_fast.evaluation.metrics import NUMBERS, Numbers, numbers, worst_curve, worst_of
from coup_fast.evaluation.notes import notes
from coup_fast.evaluation.paired import Comparison, comparison_table, comparisons
from coup_fast.evaluation.plots import draw
from coup_fast.evaluation.provenance import environment, write_json
from coup_fast.evaluation.state import FORMAT, Unit
from coup_fast.evaluation.tables import Style, render_table
from coup_fast.files import write_text


class Report:
    """The finished part of an evaluation; `evaluate` returns one.

    Only images for which every row is finished count, so that all rows are about the same images.

    Args:
        config: of the evaluation.
        identity: what the results depend on: configuration, data, networks, versions.
        units: what the state holds of each finished batch of each row.
    """

    def __init__(
        self,
        config: EvalConfig,
        identity: dict[str, Any],
        units: Mapping[Unit, dict[str, Any]],
    ) -> None:
        self.config, self.identity, self._units = config, identity, units
        rows = range(len(config.rows))
        batches = range(len(config.batches()))
        self.batches = [b for b in batches if all((b, row) in units for row in rows)]

    @property
    def images(self) -> int:
        """How many images every number is about."""
        return sum(len(self.config.batches()[batch]) for batch in self.batches)

    @property
    def complete(self) -> bool:
        """Whether all images have been evaluated."""
        return self.images == self.config.data.images

    def _predictions(self, row: int) -> tuple[list[list[int]], list[int]]:
        """Classes [images, draws] and labels [images] of a row."""
        results = [self._units[batch, row]["result"] for batch in self.batches]
        predictions = [line for result in results for line in result["predictions"]]
        return predictions, [label for result in results for label in result["labels"]]

    def _numbers(self, row: int) -> Numbers:
        return numbers(*self._predictions(row))

    @cached_property
    def lines(self) -> list[Line]:
        """A line per attack and defence; a defence without attacks has one about clean images."""
        found = []
        attacked = {row.defence.name for row in self.config.rows if row.attack is not None}
        clean = {
            row.defence.name: self._numbers(i)
            for i, row in enumerate(self.config.rows)
            if row.attack is None
        }
        for i, row in enumerate(self.config.rows):
            name = row.defence.name
            if row.attack is not None:
                numbers_found = self._numbers(i)
                line = Line(row, self.images, clean[name], numbers_found, self._attack_run(i))
                found.append(replace(line, **self._measured(i)))
            elif name not in attacked:
                line = Line(row, self.images, clean[name], None, None)
                found.append(replace(line, **self._measured(i)))
        told = marks([line.attack_label for line in found], [line.row.attack for line in found])
        found = [replace(line, mark=mark) for line, mark in zip(found, told, strict=True)]
        order = list(clean)
        found += self._unions(found)
        return sorted(found, key=lambda line: order.index(line.row.defence.name))

    def _unions(self, lines: list[Line]) -> list[Line]:
        """For each defence and ball that several attacks share, a line of all of them together."""
        groups: dict[tuple[str, str], list[Line]] = {}
        for line in lines:
            if line.row.attack is not None:
                key = (line.row.defence.name, radius(line.row.attack))
                groups.setdefault(key, []).append(line)
        unions = []
        for group in groups.values():
            if len(group) > 1:
                rows = [self._predictions(self.config.rows.index(line.row)) for line in group]
                labels = rows[0][1]
                joined = worst_of([predictions for predictions, _ in rows], labels)
                worst = numbers(joined, labels)
                names = tuple(line.attack_label for line in group)
                clean = Row(group[0].row.defence, None)
                line = Line(clean, self.images, group[0].clean, worst, None, names)
                unions.append(replace(line, curve=tuple(worst_curve(joined, labels))))
        return unions

    def _measured(self, row: int) -> dict[str, Any]:
        """The fields of a `Line` beside its numbers."""
        predictions, labels = self._predictions(row)
        results = [self._units[batch, row]["result"] for batch in self.batches]
        in_bytes = [line for result in results for line in result.get("rounded") or []]
        return {
            "curve": tuple(worst_curve(predictions, labels)),
            "rounded": numbers(in_bytes, labels) if len(in_bytes) == len(labels) > 0 else None,
            "fidelity": means([result.get("fidelity") for result in results]),
        }

    def _attack_run(self, row: int) -> dict[str, float | int]:
        """How the attack went on its own draws, summed over batches."""
        runs = [self._units[batch, row]["result"]["attack"] for batch in self.batches]
        fooled = [share for run in runs for share in run["fooled"]]
        counts = {
            key: sum(run.get(key, 0) for run in runs)
            for key in (
                "stopped",
                "zero_gradients",
                "gradient_runs",
                "score_evaluations",
                "classifier_evaluations",
            )
        }
        return {"fooled_own_draws": sum(fooled) / max(len(fooled), 1), **counts}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """What the stated comparisons of two defences came to."""
        return comparisons(self.config, self._predictions)

    def comparison_table(self, style: Style = "terminal") -> str:
        """One line per stated comparison and attack; "" if none was stated."""
        return comparison_table(self.comparisons, style) if self.comparisons else ""

    def tables(self, style: Style = "terminal") -> str:
        """`table`, and `comparison_table` below it."""
        return "\n\n".join(filter(None, [self.table(style), self.comparison_table(style)]))

    def headers(self) -> list[str]:
        """Of the table's columns."""
        k = self.config.draws
        return [
            *("defence", "attack", "clean", f"clean, worst of {k}", "final iterate"),
            *(f"average of {k}", f"worst of {k}", f"majority of {k}"),
        ]

    def table(self, style: Style = "terminal") -> str:
        """One line per defence and attack, percentages with their intervals."""
        rows: list[list[object]] = []
        for line in self.lines:
            clean = [line.clean.one_draw.percent(), line.clean.worst.percent()]
            attacked = [None] * len(NUMBERS) if line.attacked is None else _percents(line.attacked)
            rows.append([line.defence_label, line.attack_label, *clean, *attacked])
        align: list[Literal["left", "right", "center"]] = ["left", "left"]
        align += ["right"] * (len(self.headers()) - 2)
        text = render_table(self.headers(), rows, style, align)
        return text.replace("WEAK ", "**weak:** ") if style == "markdown" else text

    def measures(self, style: Style = "terminal") -> str:
        """Beside the accuracies: worst of k, images rounded to 8 bits, fidelity, compression."""
        some = [k for k in (1, 2, 5, 10, 20, 50, 100) if k < self.config.draws]
        some.append(self.config.draws)
        headers = ["defence", "attack", *(f"worst of {k}" for k in some), "8 bits, average"]
        headers += ["L2 to clean", "L2 to input", "PSNR (dB)", "compression"]
        rows: list[list[object]] = []
        for line in self.lines:
            curve = [line.curve[k - 1] if k <= len(line.curve) else None for k in some]
            cells: list[object] = [None if c is None else f"{100 * c.rate:.1f} %" for c in curve]
            average = None if line.rounded is None else line.rounded.average
            cells.append(None if average is None else f"{100 * average.rate:.1f} %")
            found = line.fidelity or dict.fromkeys(MEASURES)
            for name in MEASURES:
                value = found[name]
                digits = 1 if name == "psnr" else 2
                cells.append(None if value is None else f"{value:.{digits}f}")
            rows.append([line.defence_label, line.attack_label, *cells])
        align: list[Literal["left", "right", "center"]] = ["left", "left"]
        align += ["right"] * (len(headers) - 2)
        text = render_table(headers, rows, style, align)
        return text.replace("WEAK ", "**weak:** ") if style == "markdown" else text

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not finished"
        return f"<Report on {self.images} images, {len(self.config.rows)} rows, {state}>"

    def _repr_html_(self) -> str:
        listed = "".join(f"<li>{escape(note)}</li>" for note in self.notes())
        return f"<div><p>{escape(self.heading())}</p>{self.tables('html')}<ul>{listed}</ul></div>"

    def heading(self) -> str:
        """What the table counts."""
        data = self.config.data
        part = "" if self.complete else f" of {data.images} asked for (the run is not finished)"
        where = " ".join(filter(None, [data.name, data.split]))
        return (
            f"{self.images} images{part}: {where}, chosen by seed {data.seed}. Every row is about "
            "the same images. Accuracy in percent with 95 % Wilson intervals."
        )

    def notes(self) -> list[str]:
        """What has to be said beside the table."""
        return notes(self)

    def foreign(self) -> dict[str, str]:
        """What could be verified of each defence that is not ours, and what could not."""
        found = {}
        for i, row in enumerate(self.config.rows):
            if row.attack is not None or not row.defence.foreign:
                continue
            first = self._units.get((0, i), {}).get("result", {}).get("foreign")
            if first is None:
                words = "its gradient and its seeds are NOT VERIFIED, the first batch is missing"
            else:
                seeds = "the same draw gave the same scores"
                if not first["repeats"]:
                    seeds = "its noise COULD NOT BE REPEATED, nor told from the attack's"
                seeds += f" (noise driven by {first['seeding']})"
                words = f"{first['gradient']}, on {first['images']} images; {seeds}"
            found[f"{row.defence.name} is foreign ({row.defence.method})"] = words
        return found

    def guidance(self) -> dict[str, dict[str, Any]]:
        """How steep and how stiff each guided defence's guidance was found, by its name."""
        found = {}
        for i, row in enumerate(self.config.rows):
            unit = self._units.get((0, i), {"result": {}})
            if row.attack is None and unit["result"].get("guidance"):
                found[row.defence.name] = unit["result"]["guidance"]
        return found

    def as_dict(self, run: dict[str, Any] | None = None) -> dict[str, Any]:
        """For JSON. run: what says where and how it was computed."""
        plans = self.identity["plans"]
        rows = []
        for line in self.lines:
            row = self.config.as_dict()["rows"][self.config.rows.index(line.row)]
            if line.row.defence.foreign:
                clean = self.config.rows.index(Row(line.row.defence, None))
                unit = self._units.get((0, clean), {"result": {}})
                row = {**row, "foreign": unit["result"].get("foreign")}
            if line.row.defence.guided:
                row = {**row, "guidance": self.guidance().get(line.row.defence.name)}
            rows.append(
                {
                    **row,
                    "plan": plans.get(line.row.defence.name),
                    "guided": line.row.defence.guided,
                    "attack_label": line.attack_label,
                    "weakness": line.weakness,
                    "worst_of": list(line.union),
                    "images": line.images,
                    "draws": 1 if line.row.defence.method == UNDEFENDED else self.config.draws,
                    "clean": line.clean.as_dict(),
                    "attacked": None if line.attacked is None else line.attacked.as_dict(),
                    "attack_run": line.attack_run,
                    "worst_of_k": [share.as_dict() for share in line.curve],
                    "rounded": None if line.rounded is None else line.rounded.as_dict(),
                    "fidelity": line.fidelity,
                }
            )
        report = {
            "format": FORMAT,
            "heading": self.heading(),
            "images": self.images,
            "complete": self.complete,
            "rows": rows,
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "notes": self.notes(),
            "identity": self.identity,
        }
        return report if run is None else {**report, "run": run}

    def csv(self) -> str:
        """The table for programs: a rate and an interval's ends for each number."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = [f"clean_{name}" for name in NUMBERS] + [f"attacked_{name}" for name in NUMBERS]
        head = ["defence", "method", "attack", "gradient", "weak", "norm", "eps", "steps", "eot"]
        head += ["images", "draws", "label"]
        writer.writerow(head + [f"{n}{end}" for n in names for end in ("", "_low", "_high")])
        for line in self.lines:
            defence, attack = line.row.defence, line.row.attack
            cells: list[object] = [defence.name, defence.method]
            if attack is None:
                cells += ["worst of all" if line.union else ""] + [""] * 6
            else:
                cells += [type(attack).__name__, attack.gradient, line.weakness or "", attack.norm]
                cells += [attack.eps, attack.steps, attack.eot]
            cells += [line.images, 1 if defence.method == UNDEFENDED else self.config.draws]
            cells.append(line.attack_label)
            for part in (line.clean, line.attacked):
                for name in NUMBERS:
                    number = None if part is None else getattr(part, name)
                    ends = ["", "", ""] if number is None else [number.rate, *number.interval()]
                    cells += ends
            writer.writerow(cells)
        return file.getvalue()

    def codes(self) -> dict[str, int]:
        """The code of coup_fast that computed the units, and how many units each computed."""
        counts: dict[str, int] = {}
        for _, unit in sorted(self._units.items()):
            code = unit["run"]["code"]
            commit = f"commit {code['commit']}" if code["commit"] else "(installed)"
            name = f"{commit}, sources {code['sources']}"
            counts[name] = counts.get(name, 0) + 1
        return counts

    def run_facts(self, device: str, command: str) -> dict[str, Any]:
        """Where and how it was computed: command, versions, host, time; not for comparing."""
        runs = [unit["run"] for unit in self._units.values()]
        seconds: dict[str, float] = {}
        for (_, row), unit in sorted(self._units.items()):
            name = self.config.rows[row].name
            seconds[name] = round(seconds.get(name, 0.0) + unit["run"]["seconds"], 3)
        return {
            "command": command,
            "seconds": round(sum(seconds.values()), 1),
            "seconds_by_row": seconds,
            "hosts": sorted({run["host"] for run in runs}),
            "most_processes": max((run["ranks"] for run in runs), default=0),
            "starts": len({(run["host"], run["process"]) for run in runs if run["rank"] == 0}),
            "codes": self.codes(),
            "environment": environment(device),
        }

    def markdown(self, run: dict[str, Any] | None = None) -> str:
        """Heading, table, notes, and where it comes from."""
        listed = "\n".join(f"- {note}" for note in self.notes())
        more = f"## Further measures\n\n{self.measures('markdown')}"
        text = f"{self.heading()}\n\n{self.tables('markdown')}\n\n{listed}\n\n{more}\n"
        if run is None:
            return text
        about = run["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        return (
            f"{text}\n`{run['command']}`: {run['seconds']:.0f} s of computing on "
            f"{about['device_name']}, {' and '.join(run['codes'])}; {versions}.\n"
        )

    def write(self, folder: Path, device: str = "cpu", command: str = "") -> list[Path]:
        """report.json, report.md, report.csv and the plots in `folder`; returns their paths."""
        run = self.run_facts(device, command)
        paths = [folder / name for name in ("report.json", "report.md", "report.csv")]
        write_json(paths[0], self.as_dict(run))
        write_text(paths[1], f"# Evaluation\n\n{self.markdown(run)}")
        write_text(paths[2], self.csv())
        if self.images:
            paths += draw(self.lines, self.images, self.config.draws, folder)
        return paths


def _percents(found: Numbers) -> list[str]:
    return [getattr(found, name).percent() for name in NUMBERS]
