"""Tables of guidance, from reports of guidance_study.py and guidance_convergence.py.

Run benchmarks/tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from table_cells import FOLDER, file_of, percent, table

from coup_fast.evaluation.paired import Paired

STUDY = FOLDER / "guidance_study.json"
CONVERGENCE = {  # files of guidance_convergence.py; the first says what is finest
    "ResNet-20, probability flow": ("guidance_ode_resnet20", "guidance_ode_resnet20_unguided"),
    "bundled, probability flow": ("guidance_ode",),
}
CERTAIN = 0.05  # p below which a difference is set in bold


def study() -> dict[str, Any]:
    """The stored report."""
    report: dict[str, Any] = json.loads(STUDY.read_text(encoding="utf-8"))
    return report


def _start(row: dict[str, Any]) -> str:
    return "DiffPure" if row["forward_noise"] else "COUP"


def shares(outcome: str) -> str:
    """An outcome under every setting: a line for each chain and solver, a column for each λ."""
    report = study()
    scales = [scale for scale in report["study"]["scales"] if scale]
    body = []
    for family in report["families"]:
        lines: dict[tuple[str, str, str], dict[float, str]] = {}
        unguided: dict[tuple[str, str], str] = {}
        for row in family["settings"]:
            chain = f"{row['t_star']:g}", _start(row)
            cell = percent(row["outcomes"][outcome])
            if not row["scale"]:
                unguided[chain] = cell
                continue
            if row["against_unguided"][outcome]["p"] < CERTAIN:
                cell = f"**{cell}**"
            lines.setdefault((*chain, row["guidance_solver"]), {})[row["scale"]] = cell
        for (t_star, start, solver), cells in lines.items():
            guided = [cells[scale] for scale in scales]
            body.append([family["name"], t_star, start, solver, unguided[t_star, start], *guided])
    headers = ["classifier", "t*", "start", "solver", "λ = 0", *(f"{s:g}" for s in scales)]
    return f"{table(headers, body)}\n\n{_counted(report, outcome)}"


def _counted(report: dict[str, Any], outcome: str) -> str:
    counts = [
        f"{family['name']} {family['settings'][0]['outcomes'][outcome]['total']}"
        for family in report["families"]
    ]
    return (
        f"Percent of images ({', '.join(counts)}) with 95 % Wilson intervals. **Bold** differs "
        f"from λ = 0 on the same images (McNemar, p < {CERTAIN:g}, not adjusted). Every number "
        f"and setting: {file_of(STUDY)}."
    )


def stiff() -> str:
    """How steep each classifier is, and the share of stiff states by λ."""
    report = study()
    scales = [scale for scale in report["study"]["scales"] if scale]
    body = []
    for family in report["families"]:
        chains: dict[tuple[float, bool], dict[float, dict[str, Any]]] = {}
        for row in family["settings"]:
            if row["guidance_solver"] == "explicit":
                chain = row["t_star"], row["forward_noise"]
                chains.setdefault(chain, {})[row["scale"]] = {**row, **row["stiffness"]}
        for (t_star, _), by_scale in chains.items():
            first = by_scale[scales[0]]
            low, median, high = first["steepness"].values()
            cells = [f"{100 * by_scale[scale]['stiff_share']:.0f}" for scale in scales]
            slope = f"{median:.0f} [{low:.0f}, {high:.0f}]"
            body.append([family["name"], f"{t_star:g}", _start(first), slope, *cells])
    seen = report["families"][0]["settings"][1]["stiffness"]
    headers = ["classifier", "t*", "start", "a", *(f"λ = {scale:g}" for scale in scales)]
    return (
        f"{table(headers, body)}\n\na: median and 10 and 90 % quantiles at λ = {scales[0]:g}. "
        f"Share of stiff states under the explicit solver, in percent, {seen['images']} images "
        f"and {seen['guided_steps']} steps. Every number and setting: {file_of(STUDY)}."
    )


def tests() -> str:
    """The comparisons that were stated before the run."""
    report = study()
    body = []
    for family in report["families"]:
        for test in family["tests"]:
            chain = [f"{test['t_star']:g}", _start(test), test["guidance_solver"]]
            pairs = Paired(*(test[name] for name in ("both", "won", "lost", "neither")))
            _, _, difference, counted = pairs.cells()
            p = test["p_holm"]
            numbers = [f"{test['scale']:g}", difference, counted]
            numbers.append(f"{p:.3f}" if p >= 0.001 else f"{p:.0e}")
            body.append([family["name"], *chain, *numbers])
    headers = ["classifier", "t*", "start", "solver", "λ", "difference"]
    lines = table([*headers, "with : without, p", "p (Holm)"], body)
    return (
        f"{lines}\n\nDifference: right labels that flip under λ less those under λ = 0, in points "
        "with Newcombe's 95 % interval. With : without: images whose label flips only with "
        "guidance, and only without it, and McNemar's exact p. Holm over the "
        f"{len(report['families'][0]['tests'])} tests of a classifier. Every number and setting: "
        f"{file_of(STUDY)}."
    )


def precision() -> str:
    """How the labels of the study's precision compare with those of fp32."""
    report = study()
    body = []
    for family in report["families"]:
        for row in family["agreement"]:
            solver, pairs = row["guidance_solver"] or "none", row["flipped"]
            flips = f"{pairs['won']} : {pairs['lost']}"
            shown = [family["name"], solver, f"{row['scale']:g}", str(row["same"]["total"])]
            body.append([*shown, percent(row["same"]), flips])
    chain = report["study"]["check"]
    lines = table(["classifier", "solver", "λ", "images", "same label", "flips"], body)
    return (
        f"{lines}\n\nCOUP from t* = {chain['t_star'][0]:g}, clean images. Same label: percent of "
        "images that get the same label in bfloat16 and in float32, with 95 % Wilson intervals. "
        "Flips: right labels that flip only in bfloat16, and only in float32. Every number and "
        f"setting: {file_of(STUDY)}."
    )


def states() -> str:
    """How often the classifier is right on the state and on the denoised image, step by step."""
    report = study()
    body, counts = [], []
    for family in report["families"]:
        shown = [row for row in family["states"] if row["clean"] and not row["scale"]]
        for row in shown:
            for what, name in (("state", "x_t"), ("denoised", "x̂0")):
                steps = [f"{100 * step['rate']:.0f}" for step in row["clean"][what]]
                steps += [""] * (report["study"]["steps"] + 1 - len(steps))
                body.append([family["name"], _start(row), name, *steps])
        if shown:
            counts.append(f"{family['name']} {shown[0]['clean']['state'][0]['total']}")
    headers = ["classifier", "start", "right on", *map(str, range(report["study"]["steps"] + 1))]
    return (
        f"{table(headers, body)}\n\nPercent of clean images ({', '.join(counts)}) after so many "
        f"steps from t* = {report['study']['states']['t_star'][0]:g} without guidance; the last "
        f"state is the result. Every number and setting: {file_of(STUDY)}."
    )


def convergence() -> str:
    """Explicit and stable steps of λ = 10 in different numbers of steps."""
    tables, sources = [], []
    for title, names in CONVERGENCE.items():
        paths = [FOLDER / f"{name}.json" for name in names]
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        arguments = reports[0]["arguments"]
        finest = reports[0]["rows"][0]["steps"]
        body = []
        for number, report in enumerate(reports):
            for row in report["rows"]:
                cells = [percent(row[key]) for key in ("right_labels_flipped", "accuracy")]
                cells.append(f"{100 * row['stiff_share']:.0f}" if row["solver"] != "none" else "")
                beside = [str(row["other_labels_than_finest"])]
                beside += [f"{row['distance_to_finest']:.3f}"] if arguments["ode"] else []
                cells += [""] * len(beside) if number else beside
                body.append([row["solver"], str(row["steps"]), *cells])
        headers = ["solver", "steps", "right labels that flip", "accuracy", "stiff"]
        headers += [f"other labels than explicit in {finest}"]
        headers += ["distance to it"] if arguments["ode"] else []
        about = f"{arguments['images']} images, λ = {arguments['scale']:g}, t* = "
        tables.append(f"**{title}, {about}{arguments['t_star']:g}**\n\n{table(headers, body)}")
        sources += map(file_of, paths)
    return "\n\n".join([*tables, f"Every number and setting: {', '.join(sources)}."])


TABLES: dict[str, Callable[[], str]] = {
    "guidance_flipped": lambda: shares("flipped"),
    "guidance_unsure": lambda: shares("flipped_unsure"),
    "guidance_kept": lambda: shares("kept"),
    "guidance_recovered": lambda: shares("recovered"),
    "guidance_accuracy": lambda: shares("attacked_accuracy"),
    "guidance_stiff": stiff,
    "guidance_tests": tests,
    "guidance_precision": precision,
    "guidance_states": states,
    "guidance_convergence": convergence,
}
