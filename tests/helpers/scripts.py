"""Scripts that are no part of the package, as modules, and processes that know the tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """Of a process that imports `coup_fast`, the helpers of the tests, and what is in `folders`."""
    path = os.pathsep.join(map(str, [*folders, TESTS, ROOT]))
    return os.environ | {"PYTHONPATH": path} | more


def load_script(path: str) -> ModuleType:
    """The module of a file, named from the top of the repository; it may import its neighbours."""
    file = ROOT / path
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
