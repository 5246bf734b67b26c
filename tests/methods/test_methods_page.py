"""docs/methods.md against the package: its example, its tables, and that no method is missing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import SHORT

from coup_fast import methods
from coup_fast.plan import C, D, V, W
from coup_fast.schedules import DiscreteSchedule, VPSchedule

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE, re.M | re.S)


def section(title: str) -> str:
    """The text below a heading, as far as the next one."""
    (text,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of the table in a text, without its two head rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


SETTINGS = {cells[0].strip("`"): cells[1:] for cells in rows(section("Published settings"))}


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_the_examples_print_what_follows(code: str, printed: str, capsys) -> None:
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_there_is_an_example() -> None:
    assert len(EXAMPLES) == len(re.findall(r"^```python", PAGE, re.M)) > 0


def test_every_method_has_its_settings_and_its_algorithm() -> None:
    assert set(SETTINGS) == set(methods.METHODS)
    _, _, algorithms = PAGE.partition("\n## COUP\n")
    assert not [name for name in methods.METHODS if f"`{name}`" not in algorithms]


@pytest.mark.parametrize("name", methods.METHODS)
def test_published_settings(name: str) -> None:
    t_star, calls, noise_tensors, scale, forward_noise, clamped = SETTINGS[name]
    plan = methods.plan(name, VPSchedule(), SHORT[name][0])
    options = methods.options(name)
    assert (plan.num_network_calls, plan.num_noise) == (int(calls), int(noise_tensors))
    assert options.get("t_star") == (float(t_star) if t_star else None)
    assert options.get("guidance_scale") == (float(scale) if scale else None)
    assert plan.start_noisy == (forward_noise == "yes")
    bound = re.search(r"\b(out_)?hi=1\b", plan.table().splitlines()[-1])
    assert (bound is not None) == (clamped == "yes")


def test_coefficients() -> None:
    plan = methods.coup(VPSchedule(), t_star=0.15)
    table = rows(section("Numbers to check an implementation by").partition("Forward")[0])
    assert len(table) == 5
    for cells in table:
        t, expected = float(cells[0]), [float(cell) for cell in cells[1:]]
        row = plan.coeffs[int(np.argmin(np.abs(plan.times - t)))]
        share = 0.99 if t == 0.001 else 1.0  # of h, that the last step of a run has
        whole = [1 + (row[V] - 1) / share, row[W] / share, row[C] / share, row[D] / share**0.5]
        np.testing.assert_allclose(whole, expected, rtol=0, atol=5.1e-9)


def test_forward_diffusion() -> None:
    chain = DiscreteSchedule()
    table = rows(section("Numbers to check an implementation by").partition("Forward")[2])
    assert len(table) == 4
    for cells in table:
        t_star, signal, noise = (float(cell) for cell in cells)
        index = round(1000 * t_star) - 1
        got = [chain.alpha_bar(index) ** 0.5, chain.sigma(index)]
        np.testing.assert_allclose(got, [signal, noise], rtol=0, atol=5.1e-9)


def test_links_lead_to_headings() -> None:
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
