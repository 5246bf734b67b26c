"""Importing coup_fast: quiet, light, and usable with a missing or broken extension."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import coup_fast

PACKAGE = Path(coup_fast.__file__).parent
LIBRARY = "_C.abi3.so"


def run_python(code: str, *, path: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that takes coup_fast from `path`."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=path,
        check=False,
        timeout=120,
    )


def test_import_is_quiet_and_brings_only_torch_and_numpy() -> None:
    done = run_python(
        "import json, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import coup_fast\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "outer = [n for n in sys.modules if n.startswith('coup_fast.') and n.count('.') > 1]\n"
        "outer = [n for n in outer if not n.startswith('coup_fast._torch.')]\n"
        "allowed = {*sys.stdlib_module_names, 'torch', 'numpy', 'coup_fast'}\n"
        "assert not new - allowed, new - allowed\n"
        "assert not outer, outer\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_costs_little_beyond_torch() -> None:
    code = (
        "import time, torch, numpy\n"
        "start = time.process_time()\n"
        "import coup_fast\n"
        "print(time.process_time() - start)\n"
    )
    seconds = min(float(run_python(code).stdout) for _ in range(3))
    assert seconds < 0.25  # torch itself takes one to two seconds


def test_public_names_resolve() -> None:
    missing = [name for name in coup_fast.__all__ if getattr(coup_fast, name, None) is None]
    assert not missing
    with pytest.raises(AttributeError, match="no_such_name"):
        coup_fast.no_such_name  # noqa: B018


def test_build_info_is_complete_and_plain() -> None:
    info = json.loads(json.dumps(coup_fast.build_info()))
    assert info["version"] == coup_fast.__version__
    assert info["extension"]["loaded"] is True, info["extension"]["error"]
    assert info["extension"]["error"] is None
    assert info["cpu_capability"] in ("avx512", "avx2", "baseline")
    assert info["compiler"]
    assert "-ffp-contract=off" in info["flags"]
    assert "baseline" in info["isas"]
    known = {"compiled", "loaded", "error", "toolkit", "archs", "ptx", "torch_cuda"}
    assert set(info["cuda"]) == known


def remove(library: Path) -> None:
    library.unlink()


def fill_with_garbage(library: Path) -> None:
    library.write_bytes(b"not a library\n" * 100)


def truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])


def need_a_symbol_that_torch_lacks(library: Path) -> None:
    data = library.read_bytes()
    changed = data.replace(b"\0aoti_torch_library_init_def\0", b"\0aoti_torch_library_init_xyz\0")
    assert changed != data
    library.write_bytes(changed)


def come_from_another_version(library: Path) -> None:
    data = library.read_bytes()
    here = f'"version": "{coup_fast.__version__}"'.encode()
    assert here in data
    library.write_bytes(data.replace(here, b'"version": "' + b"9" * (len(here) - 13) + b'"'))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (remove, "is not in"),
        (fill_with_garbage, "invalid ELF header"),
        (truncate, "is incomplete"),
        (need_a_symbol_that_torch_lacks, "undefined symbol"),
        (come_from_another_version, "is of version 9"),
    ],
)
def test_reference_path_survives_a_broken_extension(damage, cause, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    copy = shutil.copytree(PACKAGE, tmp_path / "coup_fast", ignore=ignored)
    damage(copy / LIBRARY)
    done = run_python(
        "import re, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import coup_fast, torch\n"
        f"assert coup_fast.__file__.startswith({str(tmp_path)!r})\n"
        "assert len(caught) == 1, [str(w.message) for w in caught]\n"
        "text = str(caught[0].message)\n"
        f"assert re.search({cause!r}, text) and 'pip install' in text, text\n"
        "info = coup_fast.build_info()\n"
        "assert info['extension']['loaded'] is False and info['extension']['error'] in text\n"
        "assert info['cpu_capability'] is None\n"
        "keys = torch.tensor([[3, 0]])\n"
        "assert coup_fast.reference.normal(keys, (1, 5)).shape == (1, 5)\n",
        path=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
