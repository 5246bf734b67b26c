"""Check that a tag, the package, CHANGELOG.md and CITATION.cff name the same version.

    python3 .ci/check_release.py v0.1.0
    python3 .ci/check_release.py v0.1.0 --notes     what CHANGELOG.md says of it

Needs nothing but Python, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes_of(changelog: str, version: str) -> str | None:
    """The section "## [version] - date" without its heading; None if there is none."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$\n"
    found = re.search(heading + r"(.*?)(?=^## \[|^\[|\Z)", changelog, re.M | re.S)
    return found and found[1].strip()


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What keeps this tag from being released, one sentence each."""
    version = str(runpy.run_path(str(root / "coup_fast" / "_version.py"))["__version__"])
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and the package is of version {version}")
    if not notes_of((root / "CHANGELOG.md").read_text(), version):
        found.append(f"CHANGELOG.md has no text under a heading '## [{version}] - YYYY-MM-DD'")
    citation = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(), re.M)
    if citation is None or citation[1] != version:
        found.append(f"CITATION.cff does not say 'version: {version}'")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--notes", action="store_true", help="print the notes of this version")
    arguments = parser.parse_args()
    found = problems(arguments.tag)
    if found:
        sys.exit("\n".join(["this is not ready for a release:", *found]))
    if arguments.notes:
        print(notes_of((ROOT / "CHANGELOG.md").read_text(), arguments.tag.removeprefix("v")))
    else:
        print(f"{arguments.tag} is the version everywhere")


if __name__ == "__main__":
    main()
