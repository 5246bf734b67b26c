"""CIFAR-10 from its standard files, checked by checksum before they are parsed.

Two versions are published and both are read: binary (`data_batch_1.bin` …) and Python
(`data_batch_1` …, pickles). A pickle is opened only after its checksum matched, and then by an
unpickler that can build NumPy arrays and nothing else.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coup_fast import checks
from coup_fast.files import reading

_NAMES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

# SHA-1 of the binary version, MD5 of the Python version: the sums that are published for each.
_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_LARGEST = 2**25  # bytes; the files have 30 to 31 million
_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")


def load_cifar10(folder: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of one split, in the order of the files.

    Args:
        folder: where the batch files are, or the folder above it.
        split: "train" (50,000) or "test" (10,000).

    Returns:
        images [N, 3, 32, 32] uint8 and labels [N] int64.

    Raises:
        ValueError: unknown split, or a file that is not the published one.
        FileNotFoundError: if a file is missing.
    """
    checks.choice("split", split, _NAMES)
    parts = [_batch(Path(folder), name) for name in _NAMES[split]]
    images = np.concatenate([pixels for pixels, _ in parts])
    labels = np.concatenate([classes for _, classes in parts])
    return torch.from_numpy(images), torch.from_numpy(labels)


def holds_cifar10(folder: Path) -> bool:
    """Whether a folder has CIFAR-10's files, by their names."""
    names = ("data_batch_1.bin", "data_batch_1", "test_batch.bin", "test_batch")
    return any((folder / place / name).is_file() for place in _FOLDERS for name in names)


def _batch(folder: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    for place in _FOLDERS:
        binary, pickled = folder / place / f"{name}.bin", folder / place / name
        if binary.is_file():
            rows = np.frombuffer(_checked(binary, "sha1", _SHA1[binary.name]), np.uint8)
            rows = rows.reshape(-1, 1 + 3 * 32 * 32)
            return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)
        if pickled.is_file():
            content = _checked(pickled, "md5", _MD5[name])
            batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
            pixels = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
            return pixels, np.asarray(batch[b"labels"], np.int64)
    raise FileNotFoundError(
        f"no {name}.bin or {name} in {folder}; give the folder of CIFAR-10's binary or Python "
        "version."
    )


def _checked(path: Path, algorithm: str, expected: str) -> bytes:
    with reading(path, f"CIFAR-10's {path.name}"), path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    digest = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if digest != expected:
        raise ValueError(
            f"{path} is not CIFAR-10's {path.name}: {algorithm.upper()} {digest}, expected "
            f"{expected}; download it again."
        )
    return content


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dictionaries, lists, numbers, strings, bytes and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]  # the same function under any NumPy
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles that Python 3 wrote
            return codecs.encode
        raise pickle.UnpicklingError(f"a CIFAR-10 batch has no use for {module}.{name}")
