"""The rules of CONTRIBUTING.md that a program can check: what each place must not know."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers.scripts import ROOT

CODE = {".py", ".h", ".cuh", ".cpp", ".cu"}
TEXT = CODE | {".md", ".txt", ".toml", ".cmake", ".sh", ".in", ".yml", ".json", ""}


def project_files(suffixes: set[str]) -> list[Path]:
    """Files that git tracks or would track; without git, those outside of build folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        files = [ROOT / line for line in done.stdout.splitlines()]
    else:
        files = [p for p in ROOT.rglob("*") if not {"build", ".venv"} & set(p.parts)]
    return sorted(p for p in files if p.suffix in suffixes and p.is_file())


def includes_of(folder: str) -> Iterator[tuple[Path, str]]:
    place = ROOT / folder
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if path.suffix in CODE:
            for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
                yield path.relative_to(ROOT), name


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        # math/: C++ standard headers (no dot in the name) and its own files, nothing else.
        ("csrc/math", r"(?!math/)[\w/]*\..*|cuda.*|pybind11.*|torch.*"),
        ("csrc/host", r"torch/.*|ATen/.*|c10/.*|cuda(?!/index\.h).*"),
        ("csrc/params", r"(?!math/)[\w/]*\..*"),
        ("csrc/calls", r"cpu/.*|cuda.*|pybind11/.*|Python\.h|ATen/.*|c10/.*"),
        ("csrc/cpu/per_isa", r"torch/.*|calls/.*|cuda.*|pybind11/.*|Python\.h|ATen/.*|c10/.*"),
        ("csrc/cpu", r"cuda.*|cuda/.*|pybind11/.*|Python\.h|ATen/.*|c10/.*"),
        ("csrc/cuda/index.h", r"(?!math/)[\w/]*\..*"),
        ("csrc/cuda", r"cpu/.*|pybind11/.*|Python\.h|ATen/.*|c10/.*"),
    ],
)
def test_places_do_not_include_what_they_must_not_know(folder: str, forbidden: str) -> None:
    found = [f"{p}: {name}" for p, name in includes_of(folder) if re.fullmatch(forbidden, name)]
    assert not found
    assert list(includes_of(folder)), f"{folder} has no includes at all: has it moved?"


def runtime_imports(path: Path) -> Iterator[str]:
    """What importing this file imports: nothing that stands in functions or TYPE_CHECKING."""
    folder = path.relative_to(ROOT).parent.parts
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            module = ".".join(filter(None, [*above, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


CORE_FOLDERS = ("plan", "methods", "run", "_torch")
CORE = [
    path
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in CORE_FOLDERS))
    for path in (ROOT / "coup_fast").glob(pattern)
]


@pytest.mark.parametrize("path", sorted(CORE), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_core_imports_only_torch_numpy_and_itself(path: Path) -> None:
    if path.name == "__main__.py":
        return  # the command line's entry, which stands around the core
    outer = {p.parent.name for p in (ROOT / "coup_fast").glob("*/__init__.py")} - set(CORE_FOLDERS)
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "coup_fast"}
    for module in runtime_imports(path):
        first, _, rest = module.partition(".")
        assert first in allowed, f"{path.name} imports {module}"
        inner = rest.partition(".")[0]
        assert first != "coup_fast" or inner not in outer, f"{path.name} imports {module}"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("files", ("checks", "methods", "noise", "ops", "plan", "purifier", "run", "score_model")),
        ("_torch", ("checks", "methods", "noise", "ops", "plan", "purifier", "run", "score_model")),
        ("plan", ("methods", "purifier", "run")),
        ("methods", ("purifier", "run")),
        ("run", ("methods", "purified_classifier", "purifier")),
    ],
)
def test_the_core_is_in_layers(folder: str, forbidden: tuple[str, ...]) -> None:
    for path in sorted((ROOT / "coup_fast" / folder).glob("*.py")):
        for module in runtime_imports(path):
            first, _, rest = module.partition(".")
            known = first == "coup_fast" and rest.partition(".")[0] in forbidden
            assert not known, f"{folder}/{path.name} imports {module}"


def test_no_module_is_imported_in_a_circle() -> None:
    paths = sorted((ROOT / "coup_fast").rglob("*.py"))
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }
    graph = {
        name: {x if x in modules else x.rpartition(".")[0] for x in runtime_imports(path)}
        for name, path in modules.items()
    }
    assert "coup_fast.run.loop" in graph["coup_fast.purifier"], "imports are not found any more"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_benchmarks_import_what_is_there() -> None:
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coup_fast"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    known = hasattr(module, alias.name) or importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    )
                    assert known, f"{path.name}: {node.module} has no {alias.name}"


# Written so that the patterns do not match this file.
MACHINE = r"(?<![\w.])/(?:work|farm|root|home|opt/wheels|opt/py[p]i)(?:/|\b(?=[\"'\s]))"
INDEX = r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org"
# Those that users need: the CPU wheels, and in the hosted build of CUDA wheels torch's own.
TORCH_WHEELS = r"https://download\.py[t]orch\.org/whl/(?:cpu(?![\w/-])|\$\{\{ matrix\.name \}\})"


def names_a_host(line: str) -> bool:
    line = re.sub(TORCH_WHEELS, "", line)
    return bool(re.search(MACHINE, line) or re.search(INDEX, line))


def test_no_file_names_a_machine_or_a_package_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in project_files(TEXT)
        if path.name != "LICENSE"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if names_a_host(line)
    ]
    assert not found


def test_only_the_index_of_cpu_wheels_may_be_named() -> None:
    host = "https://download.py" + "torch.org"
    assert not names_a_host(f"pip install torch --index-url {host}/whl/cpu")
    for other in ("", "/whl", "/whl/cpu-cxx11", "/whl/cpu/torch", "/whl/cu126", "/whl/nightly/cpu"):
        assert names_a_host(f"pip install torch --index-url {host}{other}")
    assert names_a_host("pip install --index-url https://py" + "pi.org/simple x")


def test_nothing_is_left_unfinished() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImpl" + r"ementedError)\b")
    found = [str(p.relative_to(ROOT)) for p in project_files(CODE) if marks.search(p.read_text())]
    assert not found


def test_the_version_is_stated_once() -> None:
    stated = re.compile(r"^\s*(__version__|version|VERSION)\s*=\s*[\"']\d+\.\d+", re.M)
    files = project_files({".py", ".toml", ".cfg", ".txt", ".cmake"})
    found = [str(p.relative_to(ROOT)) for p in files if stated.search(p.read_text())]
    assert found == ["coup_fast/_version.py"]


def test_nothing_newer_than_the_headers_of_torch_2_11_is_used() -> None:
    """TORCH_TARGET_VERSION hides newer functions, but not this macro of torch 2.13."""
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b")
    sources = project_files(CODE - {".py"})
    assert not [str(p.relative_to(ROOT)) for p in sources if newer.search(p.read_text())]
