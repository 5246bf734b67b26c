"""Gather what the stages of benchmarks/gpu.sh left in a folder: results.json and report.md.

    python benchmarks/gpu_report.py FOLDER --commit COMMIT --device NAME

Reads steps.jsonl (the last run of each step counts), kernels.json, operators-*.json, loops-*.json
and profile.csv, as far as they exist. What was not run is said to be missing, never filled in.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from coup_fast.evaluation.provenance import package_versions, write_json

PARTS = ("kernels", "operators", "loops")
QUERY = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.memory"


def device_facts() -> dict[str, str]:
    """What nvidia-smi says of the first device; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=True))


def toolkit() -> str | None:
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[-1]


def steps(folder: Path) -> list[dict[str, Any]]:
    """The last run of each step, in the order of their first runs."""
    latest: dict[str, dict[str, Any]] = {}
    path = folder / "steps.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        step = json.loads(text)
        latest[step["name"]] = step
    return list(latest.values())


def profile(folder: Path) -> list[dict[str, str]]:
    """Rows of Nsight Compute's table: kernel, metric, unit, value."""
    path = folder / "profile.csv"
    if not path.exists():
        return []
    lines = [text for text in path.read_text().splitlines() if text.startswith('"')]
    names = {"Kernel Name": "kernel", "Metric Name": "metric", "Metric Unit": "unit"}
    names |= {"Metric Value": "value", "ID": "launch"}
    return [{new: row[old] for old, new in names.items()} for row in csv.DictReader(lines)]


def part(folder: Path, name: str) -> dict[str, Any] | None:
    """NAME.json, or the files NAME-CASE.json as one: the environment of the first, all rows."""
    files = sorted([*folder.glob(f"{name}.json"), *folder.glob(f"{name}-*.json")])
    if not files:
        return None
    whole, *others = (json.loads(path.read_text()) for path in files)
    whole["rows"] += [row for other in others for row in other["rows"]]
    return whole


def _step_line(step: dict[str, Any]) -> str:
    status = {None: "not run", 0: "passed", 124: "cut off", 137: "cut off"}.get(
        step["status"], f"FAILED ({step['status']})"
    )
    return f"| {step['stage']} | {step['name']} | {status} | {step['seconds']} |"


def _kernel_line(row: dict[str, Any]) -> str:
    cells = [row["case"], row["images"], f"{1e6 * row['seconds']:.1f}"]
    cells += [f"{1e-9 * row['bytes_per_second']:.0f}", f"{100 * row['of_copy']:.1f}"]
    for name in ("eager", "torch.compile"):
        ratio = row.get(name, {}).get("ratio")
        cells.append("" if ratio is None else f"{ratio:.2f}")
    call = row.get("call_seconds")
    cells.append("" if call is None else f"{1e6 * call:.1f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown(results: dict[str, Any]) -> str:
    about = results["about"]
    lines = [f"# CUDA run of coup_fast {about['commit']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if value]
    lines += ["", "| stage | step | result | s |", "|---|---|---|---|"]
    lines += [_step_line(step) for step in results["steps"]]
    kernels = results.get("kernels")
    if kernels is not None:
        lines += ["", "Kernels, measured here: times on the device, of one launch.", ""]
        lines += ["| case | images | us | GB/s | % of copy | eager/ours | compile/ours | call us |"]
        lines += ["|---|---|---|---|---|---|---|---|", *map(_kernel_line, kernels["rows"])]
    missing = [name for name in PARTS if name not in results]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    if about["device"] == "none":
        lines += ["", "Nothing in this report was measured on a device."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    about: dict[str, Any] = {"commit": options.commit, "device": options.device}
    about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about |= {"torch": torch.__version__, "CUDA of torch": torch.version.cuda}
    about |= {"toolkit": toolkit(), "nvidia-smi": device_facts(), "versions": package_versions()}
    results: dict[str, Any] = {"about": about, "steps": steps(options.folder)}
    for name in PARTS:
        if (whole := part(options.folder, name)) is not None:
            results[name] = whole
    rows = profile(options.folder)
    if rows:
        results["profile"] = rows
    write_json(options.folder / "results.json", results)
    (options.folder / "report.md").write_text(markdown(results))
    print(f"wrote {options.folder / 'results.json'} and {options.folder / 'report.md'}")


if __name__ == "__main__":
    main()
