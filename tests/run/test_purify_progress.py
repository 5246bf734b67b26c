"""`progress=`: every loop tells of its steps, at no cost in bits, and stops where it is told to."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from helpers.tape import TapeGraphs
from helpers.tiny import SHORT, defended, flags, images, short_purifier
from torch import Tensor, nn

from coup_fast import Purifier, ScoreModel, purify
from coup_fast.attacks import PGD


class Told:
    """A callback that remembers; raises KeyboardInterrupt at step `stop`."""

    def __init__(self, stop: int = 0) -> None:
        self.calls: list[tuple[int, int]] = []
        self.stop = stop

    def __call__(self, step: int, num_steps: int) -> None:
        self.calls.append((step, num_steps))
        if step == self.stop:
            raise KeyboardInterrupt


def every(count: int) -> list[tuple[int, int]]:
    return [(k, count) for k in range(1, count + 1)]


def taped(method: str, **options: Any) -> Purifier:
    clean = short_purifier(method, cuda_graph=True, **options)
    clean._kept.graphs = TapeGraphs()
    return clean


@pytest.mark.parametrize("gradient", ["none", "exact", "autograd", "bpda"])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("method", ["coup", "gdmp", "gradual", "adp", "one-shot"])
def test_every_loop_tells_of_every_step(method: str, backend: str, gradient: str) -> None:
    clean = short_purifier(method, backend=backend, gradient=gradient)
    told, u = Told(), images()
    assert torch.equal(clean(u, progress=told), clean(u))
    assert told.calls == every(clean.plan.num_steps)
    told, leaf = Told(), images().requires_grad_()
    result = clean(leaf, progress=told)
    assert torch.equal(result, clean(u))
    if gradient != "none":
        result.sum().backward()
        want = images().requires_grad_()
        clean(want).sum().backward()
        assert torch.equal(leaf.grad, want.grad)
    assert told.calls == every(clean.plan.num_steps)  # backward passes tell nothing


@pytest.mark.parametrize("states", ["device", "host", "sqrt"])
def test_steps_that_are_taken_again_are_not_told(states: str) -> None:
    clean = short_purifier("coup", states=states, verify_states=True)
    told, leaf = Told(), images().requires_grad_()
    clean(leaf, progress=told).sum().backward()
    assert told.calls == every(3)


@pytest.mark.parametrize("method", sorted(SHORT))
def test_captured_loops_tell_of_every_replay(method: str) -> None:
    clean = taped(method)
    for _ in range(2):
        told = Told()
        assert torch.equal(clean(images(), progress=told), short_purifier(method)(images()))
        assert clean.graph_reason is None
        assert told.calls == every(clean.plan.num_steps)


def test_parts_of_a_batch_are_counted_together() -> None:
    told = Told()
    clean = short_purifier("coup", max_batch=2)
    clean(images(5), progress=told)
    assert told.calls == every(9)
    told = Told()
    clean(images(5)[:0], progress=told)
    assert told.calls == []


def test_a_run_that_ends_early_tells_of_its_last_step() -> None:
    pull = ScoreModel(lambda x, t: 0.0 * x, kind="ncsn")  # nothing to follow: all samples stop
    clean = Purifier(pull, method="adp", num_steps=7, check_values=False)
    told = Told()
    clean(images(), progress=told)
    assert len(told.calls) < 7
    assert told.calls[-1] == (7, 7)


def test_the_defended_model_and_the_function_take_it_too() -> None:
    model = defended("coup", num_draws=2)
    model.purifier.max_batch = 3
    told = Told()
    assert torch.equal(model(images(), progress=told), model(images()))
    assert told.calls == every(6)
    told = Told()
    clean = short_purifier("coup")
    purify(images(), clean.score_model, clean.classifier, num_steps=3, progress=told)
    assert told.calls == every(3)


@pytest.mark.parametrize("gradient", ["exact", "classifier"])
def test_a_driven_defence_tells_its_caller(gradient: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clean, self.told = short_purifier("coup"), Told()
            self.head = self.clean.classifier

        def forward(self, u: Tensor) -> Tensor:
            return self.head(self.clean(u, progress=self.told))

    model = Around()
    PGD(steps=1, eot=1, gradient=gradient)(model, images(), torch.zeros(3, dtype=torch.int64))
    assert (model.told.calls[:3] == every(3)) == (gradient == "exact")


@pytest.mark.parametrize("captured", [False, True])
def test_what_it_raises_ends_the_call_and_leaves_the_purifier_whole(captured: bool) -> None:
    clean = taped("coup") if captured else short_purifier("coup")
    want = clean(images())
    for gradient in (False, True):
        told = Told(stop=2)
        with pytest.raises(KeyboardInterrupt):
            clean(images().requires_grad_(gradient), progress=told)
        assert told.calls == every(3)[:2]
        assert all(flags(clean))
        assert torch.equal(clean(images()), want)


@pytest.mark.parametrize("choice", [True, "auto"])
def test_it_may_purify_between_the_steps_of_a_captured_loop(choice: bool | str) -> None:
    clean = taped("coup")
    want = clean(images())
    clean.cuda_graph = choice
    inner = []

    def nested(step: int, num_steps: int) -> None:
        inner.append(clean(images().flip(0)))

    if choice is True:
        with pytest.raises(ValueError, match="between the steps of another run"):
            clean(images(), progress=nested)
    else:
        clean(images())
        assert torch.equal(clean(images(), progress=nested), want)
        assert len(inner) == 3
        assert torch.equal(inner[0], short_purifier("coup")(images().flip(0)))


@pytest.mark.parametrize("wrong", ["bar", 1, lambda step: None, lambda a, b, c: None])
def test_what_is_no_callback_is_refused_before_the_work(wrong: Any) -> None:
    clean = short_purifier("coup")
    clean.score_model.network.forward = None  # which a call would fail on
    with pytest.raises(TypeError, match=r"progress must be True, False or a function progress\("):
        clean(images(), progress=wrong)


def test_it_belongs_to_a_call() -> None:
    clean = short_purifier("coup")
    for build in (
        lambda: short_purifier("coup", progress=True),
        lambda: clean.with_options(progress=1),
    ):
        with pytest.raises(TypeError, match=r"purifier\(images, progress=…\)"):
            build()


def test_true_shows_a_bar_where_there_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # other tests run a notebook
    clean = short_purifier("coup")
    clean(images(), progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clean(images(), progress=True)
    shown = capsys.readouterr().err
    assert "coup" in shown
    assert "/3" in shown
    clean(images(), progress=False)
    assert capsys.readouterr().err == ""


def test_without_tqdm_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name)
    )
    with pytest.raises(ImportError, match=r"pip install tqdm, or give a function"):
        short_purifier("coup")(images(), progress=True)
