"""The state of an evaluation on disk: one small file for each finished batch of each row.

A file appears whole or not at all (written beside, fsync, rename, fsync of the folder), so a
process may be killed at any moment and loses what it was computing, no more. Every file carries
the identity of its evaluation and a checksum; what does not fit is refused with the reason and left
as it is. Knows nothing of what a result means.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
from pathlib import Path
from typing import IO, Any

from coup_fast.files import UNFINISHED, write_text

FORMAT = 2
_UNIT_FILE = re.compile(r"batch-(\d{5,})-row-(\d{3,})\.json")

Unit = tuple[int, int]  # number of the batch, number of the row


class EvaluationError(Exception):
    """An evaluation that cannot go on; the message says why and what to do."""


class StateError(EvaluationError):
    """A state on disk that does not belong to this evaluation or is damaged."""


def canonical(data: object) -> str:
    """JSON with one spelling for the same data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: object) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, as "place: old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place}[{i}]")]
    short = [text if len(text) < 60 else f"{text[:57]}..." for text in map(repr, (old, new))]
    return [] if old == new else [f"{place}: {short[0]}, now {short[1]}"]


def _read(path: Path) -> dict[str, Any]:
    """A file of ours, its checksum and format checked."""
    cure = "It was left as it is; delete it to have that part computed again."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stated = data.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StateError(f"{path} is damaged: not a whole state file ({reason}). {cure}") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}.") from None
    if digest(data) != stated:
        raise StateError(f"{path} is damaged: its checksum does not fit its content. {cure}")
    if data.get("format") != FORMAT:
        raise StateError(
            f"{path} has format {data.get('format')!r}; this coup_fast reads format {FORMAT}. "
            "Finish that evaluation with the version that began it, or choose another folder."
        )
    return dict(data)


class State:
    """The finished batches of one evaluation, in `folder`; opened by one process at a time.

    identity: everything that can change a number, as JSON data. read_only: change nothing, also
    while another process adds to it.

    Raises StateError if the folder holds another evaluation, a damaged file or one of another
    format, or is in use by another process.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], read_only: bool = False) -> None:
        self.folder = folder
        identity = json.loads(canonical(identity))  # as it will be read again
        self.identity = digest(identity)
        self._lock: IO[str] | None = None
        self.done: dict[Unit, dict[str, Any]] = {}
        try:
            self._open(identity, read_only)
        except OSError as error:
            self.close()
            raise StateError(f"{folder} cannot be used: {error.strerror or error}.") from error
        except StateError:
            self.close()
            raise

    def _open(self, identity: dict[str, Any], read_only: bool) -> None:
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for left_over in self.folder.glob(UNFINISHED):  # of a process that was killed
                left_over.unlink(missing_ok=True)
        self._check_identity(identity, read_only)
        for path in sorted(self.folder.glob("batch-*.json")):
            self._load(path)

    def _take_lock(self) -> None:
        lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StateError(
                f"another process is running the evaluation in {self.folder}; wait for it, or "
                "choose another folder."
            ) from None
        self._lock = lock

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_identity(self, identity: dict[str, Any], read_only: bool) -> None:
        path = self.folder / "identity.json"
        if path.exists():
            begun = _read(path)["identity"]
            changed = differences(begun, identity)
            if changed:
                more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
                raise StateError(
                    f"{self.folder} holds another evaluation: {'; '.join(changed[:4])}{more}. "
                    "Choose another folder, or run it as it was begun."
                )
            return
        if any(self.folder.glob("batch-*.json")):
            raise StateError(
                f"{self.folder} holds results but no identity.json, so nobody knows of what; "
                "choose another folder."
            )
        if not read_only:
            self._save(path, {"identity": identity})

    def _load(self, path: Path) -> None:
        match = _UNIT_FILE.fullmatch(path.name)
        data = _read(path)
        if data.get("identity") != self.identity:
            raise StateError(
                f"{path} belongs to another evaluation. It was left as it is; move it away."
            )
        unit = (data["batch"], data["row"])
        if match is None or unit != (int(match[1]), int(match[2])):
            raise StateError(f"{path} is not called as its content; it was renamed.")
        self.done[unit] = data

    def add(self, unit: Unit, result: dict[str, Any], run: dict[str, Any]) -> None:
        """Keep the result of a unit. run: what says how it was computed (host, seconds).

        Raises EvaluationError if the disk does not take it; what was there stays.
        """
        batch, row = unit
        data = {"identity": self.identity, "batch": batch, "row": row, "result": result, "run": run}
        self._save(self.folder / f"batch-{batch:05d}-row-{row:03d}.json", data)
        self.done[unit] = data

    def _save(self, path: Path, data: dict[str, Any]) -> None:
        data["format"] = FORMAT
        try:
            content = {**data, "checksum": digest(data)}
            text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
            write_text(path, text + "\n")
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "no space is left on the disk" if full else error.strerror or str(error)
            raise EvaluationError(
                f"{path} could not be written: {reason}. The finished batches are intact; "
                f"{'make space and ' if full else ''}run the same command again to go on."
            ) from error
