"""The tutorials and the front page, each run from top to bottom in an empty folder."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import pages
from helpers.scripts import ROOT
from PIL import Image

from coup_fast.methods import METHODS

TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = {path.stem: path for path in sorted(TUTORIALS.glob("*.md"))}
PAGES["index"] = ROOT / "docs" / "index.md"


@pytest.mark.parametrize("name", PAGES)
def test_a_tutorial_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGES[name].read_text()
    least = 1 if name == "index" else 3
    assert sum(block.language == "python" for block in pages.blocks(page)) >= least
    with warnings.catch_warnings(), mock.patch.dict(METHODS):
        warnings.simplefilter("error")  # a tutorial shows nothing that the package warns of
        warnings.filterwarnings("default", category=DeprecationWarning)
        warnings.filterwarnings("default", category=FutureWarning)
        pages.run(page)
    for figure in re.findall(r"figures/tutorial_(\w+\.png)", page):
        check_figure(ROOT / "docs" / "figures" / f"tutorial_{figure}", tmp_path / figure)


def check_figure(shown: Path, made: Path) -> None:
    """The figure of a page against what the page makes."""
    with Image.open(shown) as first, Image.open(made) as second:
        one, two = (np.asarray(image.convert("L"), dtype=float) for image in (first, second))
    assert one.shape == two.shape
    assert np.abs(one - two).mean() < 2  # grey levels; another processor rounds otherwise
