"""Reading files that may be damaged, of another kind or made to do harm: one error for all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_LENGTH = 300  # characters of a reader's own words


class FileError(ValueError):
    """A file that is not what it should be: one sentence that begins with its path."""


@contextmanager
def reading(path: Path | str, kind: str, cure: str = "") -> Iterator[None]:
    """Turn whatever a reader raises about the file `path` into a `FileError`.

    kind: what it was read as ("a NumPy file"). cure: what else the user could do. Readers of
    formats do not list what they raise: a damaged file meets any assertion and any index in them.
    A file that is not there stays FileNotFoundError, and a library that is not installed
    ImportError.
    """
    try:
        yield
    except (FileError, FileNotFoundError, ImportError):
        raise
    except Exception as error:
        reason = _reason(error)
        if not reason.startswith(str(path)):
            reason = f"{path} cannot be read as {kind}: {reason}"
        raise FileError(f"{reason}. {cure}" if cure else reason) from error


def _reason(error: Exception) -> str:
    """Why a reader failed, on one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    words = " ".join(said.split()).removesuffix(".") or type(error).__name__
    return words if len(words) <= _LENGTH else f"{words[: _LENGTH - 1]}…"


def read_json(path: Path, kind: str = "JSON") -> Any:
    """The value that a JSON file holds. Raises FileError."""
    with reading(path, kind):
        return json.loads(path.read_text(encoding="utf-8"))


def read_arrays(path: Path) -> np.ndarray | Mapping[str, np.ndarray]:
    """The array of a .npy file, or the arrays of a .npz file by name; no pickles.

    An archive whose arrays would not fit into this machine's memory is refused before any of them
    is read. Raises FileError, FileNotFoundError.
    """
    import numpy as np

    with reading(path, "a NumPy file"):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            size = sum(member.file_size for member in loaded.zip.infolist())
            if size > memory():
                raise FileError(
                    f"{path} cannot be read as a NumPy file: its arrays take "
                    f"{size / 2**30:.1f} GiB, more than the memory of this machine"
                )
            arrays = {name: loaded[name] for name in loaded.files}
            others = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
            if others:
                raise FileError(f"{path} holds {', '.join(others)}, which are no arrays")
            return arrays


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
