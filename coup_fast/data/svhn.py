"""SVHN from its standard files of cropped digits, checked by MD5 before use.

The files are MATLAB's, which SciPy reads; it is imported inside the function.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.files import reading

_MD5 = {
    "train": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test": "eb5a983be6a315427106f1b164d9cef3",
    "extra": "a93ce644f1a588dc4d68dda5feec44a7",
}


def load_svhn(folder: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Cropped house numbers (Netzer et al. 2011) and their digits, of one split.

    Args:
        folder: where `train_32x32.mat`, `test_32x32.mat` and `extra_32x32.mat` are.
        split: "train" (73,257), "test" (26,032) or "extra" (531,131).

    Returns:
        images [N, 3, 32, 32] uint8 and labels [N] int64; the digit 0, which the files call 10, is
        class 0.

    Raises:
        ValueError: unknown split, or a file that is not the published one.
        FileNotFoundError: if the file is missing.
        ImportError: SciPy is missing.
    """
    checks.choice("split", split, _MD5)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("SVHN's files need SciPy: pip install scipy") from error
    path = Path(folder) / f"{split}_32x32.mat"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {folder}; give the folder of SVHN's files.")
    with reading(path, "SVHN's file"):
        whole = path.read_bytes()
    digest = hashlib.md5(whole, usedforsecurity=False).hexdigest()
    if digest != _MD5[split]:
        raise ValueError(
            f"{path} is not SVHN's {path.name}: MD5 {digest}, expected {_MD5[split]}; download it "
            "again."
        )
    with reading(path, "SVHN's file"):
        arrays = loadmat(io.BytesIO(whole), variable_names=["X", "y"])
    images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))  # from [H, W, C, N]
    labels = arrays["y"].reshape(-1).astype(np.int64) % 10
    return torch.from_numpy(images), torch.from_numpy(labels)


def holds_svhn(folder: Path) -> bool:
    """Whether a folder has SVHN's files, by their names."""
    return any((folder / f"{split}_32x32.mat").is_file() for split in ("train", "test"))
