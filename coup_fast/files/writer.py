"""Files that appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNFINISHED = ".new-*.tmp"  # what a process that was killed may leave beside them


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes `path`'s place when it is whole and on the disk.

    Until then `path` is what it was, and after an error it still is. The new file stands beside it
    under a name that no file has and nobody can foresee, so that it destroys nothing and no link
    that somebody has put there is followed. A link at `path` is replaced, not followed. The mode
    is that of any new file.

    Raises OSError, which names `path`.
    """
    start, end = UNFINISHED.split("*")
    beside = path.parent / f"{start}{secrets.token_hex(8)}{end}"
    try:
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        if error.filename in (None, os.fspath(beside)):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 as a `whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode())


def append_text(path: Path, text: str) -> None:
    """Add `text`, in one piece, to a file that is there. A link is not followed."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    with os.fdopen(handle, "ab", buffering=0) as file:
        file.write(text.encode())


def write_tensors(path: Path, content: Any) -> None:
    """`torch.save` to a `whole_file`."""
    import torch

    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch's writer hides why
                raise error.__context__ from None
            raise


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """A figure as a `whole_file` in the format that the ending of `path` names."""
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), **options)


def _sync(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Be the one process and thread that works on the file or folder `path`.

    The lock is a hidden file beside it, which is there meanwhile and is held no longer than its
    process lives. wait: for others to finish; by default BlockingIOError, which names `path`, is
    raised.
    """
    beside = path.parent / f".{path.name}.lock"
    while True:
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(handle, beside):
                break
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(
                error.errno, "another process is writing it", os.fspath(path)
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who held it has removed the file meanwhile
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
