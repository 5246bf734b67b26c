"""The files around the code stay true: workflows, hooks, templates, citation, release."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # comes with diffusers
from helpers.scripts import ROOT, load_script

import coup_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
CONSTRAINTS = dict(
    line.split("==", 1)
    for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    if "==" in line.partition("#")[0]
)
check_release = load_script(".ci/check_release.py")


def read(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def jobs_of(path: Path) -> dict[str, dict[str, Any]]:
    return dict(read(path)["jobs"])


def commands(path: Path) -> list[str]:
    steps = [step for job in jobs_of(path).values() for step in job.get("steps", [])]
    return [step["run"] for step in steps if "run" in step]


def named_files(text: str) -> set[str]:
    """The files of the repository that a text names."""
    return set(re.findall(r"(?<![\w/])(?:\.ci|benchmarks|requirements|csrc)/[\w./-]*\w", text))


def test_there_are_the_workflows_that_the_release_needs() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "gpu", "release", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_name_targets_and_files_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))
    for command in commands(path):
        for words in re.findall(r"\bmake ([^\n&|;]*)", command):
            named = {word for word in words.split() if re.fullmatch(r"[a-z][\w-]*", word)}
            assert named, command
            assert named <= targets, f"{path.name}: {named - targets} is no target of Makefile"
    used = [job["uses"] for job in jobs_of(path).values() if "uses" in job]
    for file in [*named_files(path.read_text()), *used]:
        assert (ROOT / file).exists(), f"{path.name} names {file}"
    for file in used:  # YAML reads the key "on" as true
        assert "workflow_call" in read(ROOT / file)[True]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_may_do_little_and_end(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"].startswith(path.stem)  # a called one has another
    for name, job in jobs_of(path).items():
        assert "uses" in job or job["timeout-minutes"] <= 180, name
        for step in job.get("steps", []):
            action, _, version = step.get("uses", "none@v0").partition("@")
            assert re.fullmatch(r"v\d+|release/v\d+", version), step
            if action == "actions/checkout":
                assert step["with"]["persist-credentials"] is False, name


def test_the_matrix_is_what_the_package_promises() -> None:
    matrix = jobs_of(ROOT / ".github/workflows/ci.yml")["test"]["strategy"]["matrix"]
    promised = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if ":: 3." in c]
    assert matrix["python"] == promised
    assert PROJECT["project"]["requires-python"] == f">={promised[0]}"
    oldest = PROJECT["project"]["dependencies"][0].replace(">=", "==") + ".*"
    assert matrix["torch"] == [oldest, f"{default_torch().rpartition('.')[0]}.*", "torch"]


def default_torch() -> str:
    found = re.search(r"^TORCH \?= (\S+)$", MAKEFILE, re.M)
    assert found is not None
    return found[1]


def test_one_torch_is_the_default_everywhere() -> None:
    for path in (".ci/run", ".ci/try_wheel.sh", "pyproject.toml", "CONTRIBUTING.md"):
        text = (ROOT / path).read_text()
        for version in re.findall(r"\btorch==[\d.]+\d", text):
            assert version == default_torch(), path
    assert default_torch() in PROJECT["tool"]["cibuildwheel"]["before-test"]


def test_wheels_are_built_with_the_oldest_torch_that_is_served() -> None:
    (oldest,) = re.findall(r"^torch>=(\d+)\.(\d+)", PROJECT["project"]["dependencies"][0])
    script = (ROOT / ".ci" / "wheel_requirements.sh").read_text()
    assert f"torch=={oldest[0]}.{oldest[1]}.0" in script
    target = f"0x{int(oldest[0]):02x}{int(oldest[1]):02x}000000000000"
    assert target in (ROOT / "CMakeLists.txt").read_text()
    assert target in (ROOT / ".ci" / "check_wheel.py").read_text()


def test_cibuildwheel_runs_scripts_that_exist() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    text = " ".join(str(value) for value in settings.values())
    files = re.findall(r"\{project\}/(\S+)", text)
    assert len(files) == 3
    assert all((ROOT / file).is_file() for file in files)
    assert settings["build"][0] == "cp310-manylinux_x86_64"  # the tag of the wheel


def test_the_gpu_job_cannot_skip() -> None:
    (job,) = jobs_of(ROOT / ".github/workflows/gpu.yml").values()
    assert job["env"]["COUP_FAST_FAIL_WITHOUT_CUDA"] == "1"
    assert job["env"]["COUP_FAST_CUDA"] == "on"
    assert "pull_request" not in read(ROOT / ".github/workflows/gpu.yml")[True]
    assert not any("continue-on-error" in step for step in job["steps"])


def test_tools_that_are_installed_have_one_version() -> None:
    texts = [
        MAKEFILE,
        *(p.read_text() for p in WORKFLOWS),
        (ROOT / ".ci/wheel_requirements.sh").read_text(),
    ]
    tools = set()
    for text in texts:
        for line in re.findall(r"(?:PIP_INSTALL\)|constraints\.txt|pip\[@\]\}\") +([a-z].*)", text):
            tools |= {word for word in line.split() if re.fullmatch(r"[a-z][\w-]*", word)}
    assert {"ruff", "mypy", "auditwheel", "abi3audit", "cibuildwheel", "build"} <= tools
    assert tools <= CONSTRAINTS.keys()


def test_hooks_run_the_tools_of_make() -> None:
    config = read(ROOT / ".pre-commit-config.yaml")
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {".venv/bin/ruff", ".venv/bin/clang-format", ".venv/bin/mypy"}
    assert all(tool.rpartition("/")[2] in CONSTRAINTS for tool in tools)


def test_the_citation_is_of_this_version_and_place() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == coup_fast.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]
    readme = " ".join((ROOT / "README.md").read_text().replace("\\_", "_").split())
    for cited in [citation, *citation["references"]]:
        assert cited["title"] in readme  # its BibTeX


def test_every_file_names_one_repository() -> None:
    here = PROJECT["project"]["urls"]["Repository"]
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / ".github").rglob("*.yml")]
    for path in files:
        for found in re.findall(r"https://github\.com/[\w-]*coup[\w-]*/[\w-]+", path.read_text()):
            assert found == here, path.name


@pytest.mark.parametrize("name", ["RELEASING.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_guides_name_files_and_workflows_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for file in named_files(text):
        if "<" not in text[text.index(file) :][: len(file) + 2]:
            assert (ROOT / file).exists(), f"{name} names {file}"
    for workflow in re.findall(r"`(\w+)\.yml`", text):
        places = [ROOT, ROOT / ".github" / "workflows"]
        assert any((place / f"{workflow}.yml").exists() for place in places)
    for link in re.findall(r"\]\(([\w./-]+)", text):
        assert (ROOT / link).exists() or link.startswith("http"), f"{name} links to {link}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_issue_templates_are_read(path: Path) -> None:
    form = read(path)
    if path.stem != "config":
        assert {"name", "description", "body"} <= form.keys()
        for field in form["body"]:
            assert field["attributes"]["label"]


# --- .ci/check_release.py


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "coup_fast").mkdir()
    (tmp_path / "coup_fast" / "_version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("title: x\nversion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n\n- New.\n\n"
        "## [1.1.0] - 2025-01-31\n\n- Old.\n\n[1.2.0]: https://example.org\n"
    )
    return tmp_path


def test_a_release_is_one_version_everywhere(tree: Path) -> None:
    assert check_release.problems("v1.2.0", tree) == []
    changelog = (tree / "CHANGELOG.md").read_text()
    assert check_release.notes_of(changelog, "1.2.0") == "- New."
    assert check_release.notes_of(changelog, "1.1.0") == "- Old."
    assert check_release.notes_of(changelog, "1.2") is None


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("coup_fast/_version.py", '__version__ = "1.2.1"\n', "the tag is v1.2.0"),
        ("CITATION.cff", "version: 1.1.0\n", "CITATION.cff"),
        ("CHANGELOG.md", "## [1.2.0] - 2026-01-31\n\n## [1.1.0] - 2025-01-31\n", "CHANGELOG.md"),
        ("CHANGELOG.md", "## [Unreleased]\n\n- New.\n", "CHANGELOG.md"),
    ],
)
def test_a_release_with_two_versions_is_refused(
    file: str, text: str, named: str, tree: Path
) -> None:
    (tree / file).write_text(text)
    assert any(named in problem for problem in check_release.problems("v1.2.0", tree))


def test_a_wrong_tag_ends_the_script() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "check_release.py"), "v0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"of version {coup_fast.__version__}" in done.stderr
