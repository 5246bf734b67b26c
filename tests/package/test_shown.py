"""How objects show themselves: in a few short lines, and as tables in notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from helpers import tiny
from torch import nn

import coup_fast
from coup_fast import attacks, methods
from coup_fast.plan import AnyPlan
from coup_fast.run.options import RunOptions

PARAMETERS = sum(p.numel() for p in tiny.TinyNetwork().parameters())
NETWORK = f"<TinyNetwork: {PARAMETERS} parameters, float32, cpu>"


@pytest.fixture(params=methods.METHODS)
def plan(request) -> AnyPlan:
    kind, _ = tiny.SHORT[request.param]
    return methods.plan(request.param, coup_fast.VPSchedule(), kind)


def short(shown: object) -> str:
    text = repr(shown)
    assert len(text) < 800
    assert text.count("\n") < 8
    return text


def test_plans(plan: AnyPlan) -> None:
    text = short(plan)
    assert repr(plan.method) in text
    assert f"{plan.num_steps} step" in text
    assert f"{plan.num_noise} noise tensor" in text
    assert ("guided" in text) == plan.needs_classifier
    t_star = methods.options(plan.method).get("t_star")
    assert (t_star is None or plan.method == "ldsde") or f"{t_star}]" in text


def test_a_plan_whose_times_go_up_again_shows_the_latest() -> None:
    assert "t in [0.001, 0.125]" in repr(methods.gradual(coup_fast.VPSchedule()))


def test_purifiers() -> None:
    clean = tiny.short_purifier("coup", seed=3)
    method, *parts = short(clean).split("\n  ")
    assert method == "Purifier(method='coup', seed=3, num_steps=3, t_star=0.1, gradient='exact')"
    assert parts[0] == f"plan: {clean.plan!r}"
    assert parts[1] == f"score_model: {clean.score_model!r}"
    assert parts[2].startswith("classifier: <TinyClassifier: ")
    other = clean.with_options(t_star=0.2, gradient="none", precision="bf16")
    assert "num_steps=3, t_star=0.2, gradient='none', precision='bf16')" in short(other)


def test_of_the_options_of_a_run_those_that_differ_are_shown() -> None:
    for name in vars(RunOptions()):
        assert (f"{name}=" in repr(tiny.short_purifier())) == (name == "gradient")
    assert "max_batch=7" in repr(tiny.short_purifier(max_batch=7))


def test_long_options_are_cut_short() -> None:
    clean = coup_fast.Purifier(tiny.score_model(), method="gradual", rounds=(1,) * 5000)
    assert "rounds=(1, 1, " in short(clean)
    assert short(clean).endswith("classifier: None")


def test_score_models_and_energy_models() -> None:
    assert short(tiny.score_model()).startswith(f"ScoreModel({NETWORK}, kind='eps', ")
    assert "VPSchedule(beta_min=0.1, beta_max=20.0), time_scale=999)" in short(tiny.score_model())
    energy = coup_fast.EnergyModel(tiny.TinyNetwork())
    assert short(energy) == f"EnergyModel({NETWORK})"
    assert "t_max=0.5" in short(coup_fast.ScoreModel(energy, "ncsn", t_max=0.5))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda x, t: x, "<lambda>"),
        (tiny.images, "<images>"),
        (nn.Identity(), "<Identity: no parameters>"),
        (nn.Linear(2, 1).to("meta", torch.float16), "<Linear: 3 parameters, float16, meta>"),
        (
            nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1).double()),
            "5 parameters, float32, float64",
        ),
        (nn.LazyLinear(3), "<LazyLinear: 0 parameters, float32, cpu>"),
        (nn.Linear(1, 1).forward, "<Linear.forward: 2 parameters, float32, cpu>"),
    ],
)
def test_networks_of_every_sort(network, said: str) -> None:
    assert said in short(coup_fast.ScoreModel(network))


def test_purified_classifiers() -> None:
    model = tiny.defended(num_draws=4, vote="majority")
    text = short(model)
    assert "num_draws=4, vote='majority', fresh_draws=False" in text
    assert "classifier: <TinyClassifier: " in text
    assert repr(model.purifier).replace("\n", "\n  ") in text
    assert text in repr(nn.ModuleList([model])).replace("\n  ", "\n")


@pytest.mark.parametrize("name", attacks.PRESETS)
def test_attacks_are_shown_as_they_could_be_written(name: str) -> None:
    for attack in (attacks.PRESETS[name], attacks.PRESETS[name].replace(eps=0.3, seed=4)):
        text = short(attack)
        assert "\n" not in text
        assert eval(text, vars(attacks)) == attack
        assert all(f"{said}=" in text for said in ("norm", "eps", "steps", "eot", "gradient"))
    assert ("eps=8/255" in repr(attacks.PRESETS[name])) == (name != "pgd-l2")


def rows(html: str) -> Iterator[list[str]]:
    """The cells of the table in some HTML, which has to be well formed."""
    assert "color" not in html
    assert "background" not in html
    for row in ElementTree.fromstring(html).iter("tr"):
        yield ["".join(cell.itertext()) for cell in row]


def test_a_plan_in_a_notebook(plan: AnyPlan) -> None:
    head, start, *body = rows(plan._repr_html_())
    assert head == ["row", "t", "noisy", "guided", "coefficients"]
    assert start[2] == ("yes" if plan.start_noisy else "")
    text = [line.split(maxsplit=1) for line in plan.table().splitlines()[1:]]
    coefficients = {k: line.split("  ")[-1] for k, line in text}
    assert start[-1] == coefficients["start"]
    numbers = [k for k, *_ in body]
    count = plan.num_steps
    if count > 15:
        assert numbers == [*map(str, range(5)), "…", *map(str, range(count - 5, count))]
        assert body[5][-1] == f"{count - 10} more rows"
    else:
        assert numbers == [str(k) for k in range(count)]
    for number, time, noisy, guided, described in body:
        if number != "…":
            k = int(number)
            told = plan.times[k]
            assert time == (f"{told:.6g}" if told == told else "no network")
            assert noisy == ("yes" if plan.noise_index[k] is not None else "")
            assert guided == ("yes" if plan.guided[k] else "")
            assert described == coefficients[number]


def test_a_plans_name_is_escaped_in_a_notebook() -> None:
    plan = replace(methods.one_shot(coup_fast.VPSchedule()), method="<script>&\"'</table>")
    caption = ElementTree.fromstring(plan._repr_html_()).find("caption")
    assert caption is not None
    assert repr(plan.method) in (caption.text or "")
