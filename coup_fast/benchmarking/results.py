"""Dated results by device: DATE-DEVICE.json in a folder, filled case by case.

DEVICE is the device's name in lower case with dashes, and on a CPU the instruction set. A run
replaces the rows of the cases it measured (same case, images and threads) and leaves the others;
every row says which commit it is of.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coup_fast.benchmarking.rows import Row, row_from
from coup_fast.files import FileError, lock, read_json, reading

FORMAT = 1
_NAME = re.compile(r"\d{4}-\d{2}-\d{2}-[a-z0-9-]+\.json")


def file_name(stamp: dict[str, Any]) -> str:
    """Where rows with this stamp belong: "2026-11-24-amd-epyc-avx2.json"."""
    words = [stamp["device_name"], stamp["instruction_set"] or ""]
    slug = "-".join(re.findall(r"[a-z0-9]+", " ".join(words).lower()))
    return f"{stamp['date']}-{slug}.json"


def _place(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["case"], row["images"], row["threads"]


def merge(folder: Path, rows: Sequence[Row], command: str) -> Path:
    """Put rows, all with the same stamp, into their file; returns its path.

    Raises ValueError for a file of another format.
    """
    from coup_fast.evaluation.provenance import write_json

    stamp = rows[0].stamp
    assert stamp is not None
    path = folder / file_name(stamp)
    new = [row.as_dict() for row in rows]
    measured = {_place(row) for row in new}
    commands: list[str] = []
    kept: list[dict[str, Any]] = []
    with lock(path, wait=True):
        if path.exists():
            data = _read(path)
            kept = [row for row in data["rows"] if _place(row) not in measured]
            commands = [line for line in data["commands"] if line != command]
        merged = sorted(kept + new, key=lambda row: (row["threads"], row["case"], row["images"]))
        write_json(path, {"format": FORMAT, "commands": [*commands, command], "rows": merged})
    return path


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    keys = {"commands", "rows"}
    if not isinstance(data, dict) or data.get("format") != FORMAT or not keys <= set(data):
        raise FileError(f"{path} does not hold benchmark results of format {FORMAT}")
    return data


def load(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError for a file of another format."""
    data = _read(path)
    with reading(path, "benchmark results"):
        return [row_from(row) for row in data["rows"]]


def newest(folder: Path, device: str = "cpu") -> Path | None:
    """The latest file of results measured on this kind of device; None if there is none."""
    found = None
    for path in sorted(folder.glob("*.json")):
        if not _NAME.fullmatch(path.name):
            continue
        rows = _read(path)["rows"]
        if rows and str(rows[0]["device"]).startswith(device):
            found = path
    return found
