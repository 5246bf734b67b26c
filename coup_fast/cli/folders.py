"""Folders of pictures: which pictures there are, and the record of what a run made of them.

The record, RECORD in OUT, is what lets a run go on after a stop without mixing two runs. Its first
line holds everything that decides a result; each further one holds a picture's name and the
SHA-256 of its result, and is written before the result appears. So a result counts as this run's
only if its bytes are those that this run wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from coup_fast.cli.common import CommandError, check_folder, say
from coup_fast.files import IMAGE_SUFFIXES, FileError, append_text, reading, whole_file, write_text

RECORD = "coup-fast-purify.jsonl"
FORMAT = 1


def find_images(source: Path, target: Path, recursive: bool | None) -> list[str]:
    """Names of the pictures in a folder, in its sub-folders too, sorted; "/" parts folders.

    recursive: whether sub-folders are searched; None: pictures in them are an error, since nobody
    said what is to become of them. `target` is not searched.
    """
    images: list[str] = []
    below: dict[str, int] = {}  # pictures in each sub-folder
    others = linked = 0
    for folder, folders, names in os.walk(source):
        place = Path(folder)
        folders[:] = [n for n in folders if not same_file(place / n, target)]
        linked += sum((place / name).is_symlink() for name in folders)
        inside = place.relative_to(source)
        for name in names:
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                others += inside == Path() or bool(recursive)
                continue
            if inside.parts:
                below[inside.parts[0]] = below.get(inside.parts[0], 0) + 1
            if recursive or not inside.parts:
                images.append((inside / name).as_posix())
    if below and recursive is None:
        raise CommandError(
            f"{source} has {_count(sum(below.values()), 'picture')} in sub-folders "
            f"({', '.join(sorted(below)[:4])}{', …' if len(below) > 4 else ''}): give --recursive "
            "to purify them as well, or --no-recursive to leave them out"
        )
    if not images:
        raise CommandError(f"{source} holds no image files ({' '.join(IMAGE_SUFFIXES)})")
    left_out = [(others, "other file"), (linked, "linked sub-folder")]
    if not recursive:
        left_out.append((sum(below.values()), "picture in sub-folders"))
    for count, what in left_out:
        if count:
            say(f"{source}: {_count(count, what)} left out")
    return sorted(images)


def _count(number: int, what: str) -> str:
    first, _, rest = what.partition(" in ")
    return f"{number} {first}{'s' * (number != 1)}{f' in {rest}' if rest else ''}"


def same_file(a: Path, b: Path) -> bool:
    """Whether both are there and one file or folder, by whatever name."""
    return a.exists() and b.exists() and a.samefile(b)


def check_target(source: Path, target: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an OUT that is no folder, would become one of a file's name, or is IN."""
    if target.exists() and not target.is_dir():
        raise CommandError(f"{source} is a folder, so {target} must be one too")
    if not target.exists() and target.suffix.lower() in suffixes:
        raise CommandError(
            f"{source} is a folder, and {target} has the ending of a file: name a folder for the "
            "results"
        )
    if same_file(source, target):
        raise CommandError(f"IN and OUT are the same folder, {source}: name another for results")


class Record:
    """What a run has made in the folder `target`, so that it can go on after a stop."""

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        self.path = target / RECORD
        self.target = target
        self.settings = json.loads(json.dumps(settings, default=str))
        self.results: dict[str, str] = {}

    def begin(self) -> None:
        """Write the record anew, with the results that are known."""
        lines = [{"format": FORMAT, "settings": self.settings}]
        lines += [{"picture": name, "sha256": digest} for name, digest in self.results.items()]
        write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in lines))

    def begun_with(self) -> dict[str, Any] | None:
        """The settings that the record was begun with; None if there is no record."""
        return self._read()[0] if self.path.exists() else None

    def _read(self) -> tuple[dict[str, Any], list[str]]:
        """The settings, and the lines of the results."""
        with reading(self.path, "a record of coup-fast purify"):
            first, *rest = self.path.read_text(encoding="utf-8").splitlines()
            begun = json.loads(first)
            if begun["format"] != FORMAT:
                raise FileError(f"{self.path} has format {begun['format']}, not {FORMAT}")
            settings: dict[str, Any] = dict(begun["settings"])
            return settings, rest

    def resume(self) -> None:
        """Read the record, if there is one. Raises CommandError if it is of other settings."""
        if not self.path.exists():
            return
        settings, rest = self._read()
        self._check(settings)
        for line in rest:
            try:
                entry = json.loads(line)
                self.results[entry["picture"]] = entry["sha256"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that was being written when the process was killed

    def _check(self, begun: Any) -> None:
        from coup_fast.evaluation.state import differences

        changed = differences(begun, self.settings)
        if changed:
            more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
            raise CommandError(
                f"{self.target} holds results of other settings: {'; '.join(changed[:4])}{more}. "
                "Run it as it was begun, choose another folder, or start anew with --force"
            )

    def has(self, name: str) -> bool:
        """Whether the result of a picture is there. Raises CommandError if another file is."""
        path = self.target / name
        if not os.path.lexists(path):
            return False
        with reading(path, "a result"):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.results.get(name) != found:
            raise CommandError(
                f"{path} is there, and not as {RECORD} says that this run wrote it: move it away, "
                "or start anew with --force"
            )
        return True

    def write(self, path: Path, content: bytes) -> None:
        """Put a result into its place, `path` in the folder."""
        name = path.relative_to(self.target).as_posix()
        digest = hashlib.sha256(content).hexdigest()
        with whole_file(path) as file:
            file.write(content)
            append_text(self.path, json.dumps({"picture": name, "sha256": digest}) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder that results go to. Raises CommandError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder} cannot be made: {error.strerror}") from None
    check_folder(folder)
