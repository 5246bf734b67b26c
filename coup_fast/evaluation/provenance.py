"""What every report records about where its numbers come from, and how it is written."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from coup_fast.files import write_text

_PACKAGES = ("torch", "numpy", "scipy", "foolbox", "mlxtend", "torchsde", "diffusers")


def package_versions() -> dict[str, str]:
    """Installed versions of coup_fast, Python and the packages that can influence a result."""
    import coup_fast

    versions = {"coup_fast": coup_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import torch

    versions["torch"] = torch.__version__  # with its +cpu / +cu suffix
    return versions


def source_commit() -> str | None:
    """Commit of the source tree coup_fast runs from, `-dirty` if changed; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


@cache
def package_code() -> dict[str, str | None]:
    """What code this process runs: the commit, and a digest of the package's files.

    The digest is of every Python file and compiled library, so that it tells changes apart that
    no commit and no version does. It is taken once: a process does not load what changes later.
    """
    folder = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so")):
        total.update(f"{path.relative_to(folder).as_posix()} ".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return {"commit": source_commit(), "sources": total.hexdigest()[:16]}


def processor_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, commit, device, instruction set and thread count of this process."""
    import torch

    import coup_fast

    name = processor_name()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(torch.device(device))
    return {
        "versions": package_versions(),
        "commit": source_commit(),
        "system": platform.platform(terse=True),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "build": coup_fast.build_info(),
    }


def to_json(data: object) -> str:
    """Indented JSON; NaN and infinities are an error, not text that other readers refuse."""
    return json.dumps(data, indent=2, allow_nan=False)


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON in one step: a reader never sees half a file."""
    write_text(path, to_json(data) + "\n")
