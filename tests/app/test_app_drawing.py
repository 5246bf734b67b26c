"""What the page shows, as HTML."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.experiments import run, tiny_bench
from PIL import Image

from coup_fast.app import drawing
from coup_fast.app.experiment import Choices, Progress
from coup_fast.app.pictures import Chosen

PICTURE = Chosen("<b>&", tiny.images(1)[0])


def shown(html: str) -> list[np.ndarray]:
    """The pictures in a piece of HTML, decoded."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_each_step_is_shown_with_what_the_classifier_sees() -> None:
    bench = tiny_bench(classes=("A<", "B", "C"))
    _, result = run(bench, Choices("coup", {"num_steps": 3}, epsilon=0.1), PICTURE)
    for k in range(4):
        html = drawing.stage(bench, result, k)
        expected = [PICTURE.pixels, result.attacked, result.states[k]]
        for picture, pixels in zip(shown(html), expected, strict=True):
            assert np.array_equal(picture, as_bytes(pixels))
        headings = re.findall(r"<figcaption>(.*?)</figcaption>", html)
        last = {0: "Start", 3: "Purified"}.get(k, f"After step {k} of 3")
        assert headings == ["Input", "Attacked", last]
        views = [result.views.original, result.views.attacked, result.views.states[k]]
        names = ["A&lt;", "B", "C", "class 3"]
        first = re.findall(r'<p class="cf-view[^"]*"><b>(.*?)</b> (\d+) %', html)
        assert first == [
            (names[int(view.argmax())], f"{100 * float(view.max()):.0f}") for view in views
        ]
        rows = re.findall(r"<li .*?<span>(.*?)</span><span>(\d+) %</span>", html)
        assert len(rows) == 3 * 4
        listed = [names.index(name) for name, _ in rows[8:]]
        assert [int(share) for _, share in rows[8:]] == [
            round(100 * float(views[2][number])) for number in listed
        ]
    assert PICTURE.name not in html  # only escaped


def test_a_class_is_marked_by_whether_it_is_the_inputs() -> None:
    bench = tiny_bench()
    _, result = run(bench, Choices("coup", {"num_steps": 1}, epsilon=0.1))
    same = result.views.original
    other = same.roll(1)
    views = replace(result.views, attacked=other, states=torch.stack([same, same]))
    html = drawing.stage(bench, replace(result, views=views), 1)
    marks = re.findall(r'class="cf-view([^"]*)"', html)
    assert marks == ["", " cf-other", " cf-same"]


def test_without_a_classifier_there_are_pictures_only() -> None:
    bench = tiny_bench(classifier=False)
    _, result = run(bench, Choices("diffpure", {"num_steps": 2}))
    html = drawing.stage(bench, result, 2)
    assert len(shown(html)) == 2
    assert "%" not in html


def test_a_run_is_summed_up() -> None:
    _, result = run(tiny_bench(), Choices("coup", {"num_steps": 3}, seed=5, epsilon=0.1))
    words = drawing.summary(replace(result, seconds=(0.5, 0.002, 0.004)))
    assert "4 ms a step" in words  # the median
    assert "506 ms for 3 steps" in words
    assert "coup: num_steps 3, seed 5." in words
    assert "weak" in words
    assert "ε = 0.1" in words
    assert "weak" not in drawing.summary(replace(result, epsilon=None))
    early = drawing.summary(replace(result, states=result.states[:3], seconds=(1.5, 2.5)))
    assert "2.00 s a step" in early
    assert "1 fewer than planned" in early


def test_a_picture_is_shown_while_it_is_made() -> None:
    state = tiny.images(1)[0] * 3 - 1  # values outside [0, 1] are shown as the nearest
    html = drawing.running(PICTURE, True, Progress(2, 9, state, PICTURE.pixels))
    assert len(shown(html)) == 3
    assert np.array_equal(shown(html)[2], as_bytes(state))
    assert "After step 2 of 9" in html
    assert "Step 2 of 9" in drawing.status(Progress(2, 9, state))
    assert "Attacking" in drawing.status(Progress(0, 40))
    assert len(shown(drawing.running(PICTURE, True, Progress(0, 40)))) == 1


@pytest.mark.parametrize("attack", [True, False])
def test_places_are_kept_for_what_will_come(attack: bool) -> None:
    for chosen in (None, PICTURE):
        html = drawing.preview(chosen, attack)
        assert html.count("<figure>") == 2 + attack
        assert html.count("cf-empty") == 2 + attack - (chosen is not None)


def test_messages_are_escaped_and_end() -> None:
    assert "&lt;x&gt; is none.</div>" in drawing.problem("<x> is none")
    assert "none.</div>" in drawing.problem("it is none.")
    assert drawing.remarks(["<x>"]).count("&lt;x&gt;") == 1


def test_a_grey_picture_is_grey() -> None:
    assert drawing.picture(torch.zeros(1, 4, 5)).mode == "L"
    assert drawing.picture(torch.zeros(3, 4, 5)).size == (5, 4)
