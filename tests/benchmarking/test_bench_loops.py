"""Whole loops under the benchmark: the rivals compute what ours computes, or are not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coup_fast import _extension
from coup_fast.benchmarking import catalogue, components, loop_rivals, loops, networks
from coup_fast.benchmarking.catalogue import FAMILIES, family
from coup_fast.cli import main

CPU = torch.device("cpu")
LOOPS = [f.name for f in FAMILIES if f.group == "loops" and f.batches]

pytestmark = pytest.mark.skipif(
    not _extension.available(), reason="the compiled operators are not there"
)


@pytest.fixture(autouse=True)
def _rivals() -> None:
    pytest.importorskip("torchsde")
    pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_computes_the_same(name: str) -> None:
    family(name).make(2, CPU).check()


@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("coup-mnist", loops, "plain_loop"),
        ("coup-mnist", loops, "torchsde_loop"),
        ("ddpm-mnist", loops, "diffusers_loop"),
        ("gradient-mnist", loops, "plain_loop"),
    ],
)
def test_a_wrong_loop_is_not_timed(
    name: str, owner: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(owner, function)

    def wrong(*args: Any, **options: Any) -> loop_rivals.Loop:
        loop = right(*args, **options)
        return lambda images: 1.003 * loop(images)

    monkeypatch.setattr(owner, function, wrong)
    with pytest.raises(AssertionError, match="is off by"):
        family(name).make(1, CPU).check()


class _Count(TorchDispatchMode):
    """Operators dispatched, and those that draw normals."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.normals = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.operators += 1
        self.normals += "normal" in str(function) or "randn" in str(function)
        return function(*args, **(kwargs or {}))


def test_the_released_code_costs_what_it_is_known_to() -> None:
    """DiffPure's own code dispatches 77 operators and draws two normal tensors a step."""
    case = family("diffpure-none").make(1, CPU)
    variant = next(v for v in case.variants if v.name == loops.RELEASED)
    run = variant.build()
    with _Count() as count:
        run()
    assert count.operators / case.steps == pytest.approx(77, abs=4)
    assert count.normals / case.steps == pytest.approx(2, abs=0.1)


def test_trainable_weights_collect_gradients_that_nobody_asked_for() -> None:
    models = networks.load("mnist", CPU)
    images, constant = torch.rand(1, 1, 28, 28), torch.zeros(1, 1, 28, 28)
    for trainable in (False, True):
        loop = loop_rivals.torchsde_loop(
            models, 2, True, constant, released=True, trainable=trainable
        )
        loop(images)
        sde = next(c.cell_contents for c in loop.__closure__ if hasattr(c.cell_contents, "guide"))
        grads = [p.grad is not None for p in sde.classifier.parameters()]
        assert all(grads) if trainable else not any(grads)
    assert not any(p.requires_grad for p in models.network.parameters())


def test_components_add_up_to_the_run() -> None:
    models = networks.load("mnist", CPU)
    images = torch.rand(2, 1, 28, 28)
    spec = loops.LoopSpec("coup", "mnist", 3)
    watch = components.Watch(CPU)
    network = components.WatchedNetwork(models.network, watch)
    classifier = components.WatchedClassifier(models.classifier, watch)
    seen = networks.Models("", models.shape, network, classifier)
    run = loops.our_loop(spec, seen, images)
    run(images)  # the first run also looks at the models
    watch.marks.clear()
    watch.mark("start")
    result = run(images)
    watch.mark(components.REST)
    names = [name for name, _ in watch.marks]
    step = [components.REST, components.NETWORK, components.REST]
    step += [components.FORWARD, components.VJP]
    assert names == ["start", *step * 3, components.REST]
    total = watch.marks[-1][1] - watch.marks[0][1]
    seconds = watch.seconds()
    assert sum(seconds.values()) == pytest.approx(total)
    assert seconds[components.NETWORK] > 0 < seconds[components.VJP]
    assert torch.equal(result, loops.our_loop(spec, models, images)(images))


def test_without_a_rivals_package_its_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchsde", None)
    case = family("coup-none").make(1, CPU)
    case.check()
    variant = next(v for v in case.variants if v.name == loops.TORCHSDE)
    with pytest.raises(loops.VariantUnavailable, match="torchsde is not installed"):
        variant.build()


def test_loop_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = catalogue.loop_family("coup", "mnist", 2, (1,))
    monkeypatch.setattr(catalogue, "FAMILIES", (short,))
    table, plot = tmp_path / "loops.json", tmp_path / "loops.png"
    argv = ["bench", "--loop", "--quick", "--threads", "1"]
    assert main([*argv, "--json", str(table), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "2 steps; a step's limits: its network calls alone" in out
    assert "where a step's time goes" in out
    rows = json.loads(table.read_text())["rows"]
    assert [row["variant"] for row in rows] == [
        loops.OURS,
        loops.PLAIN,
        loops.TORCHSDE,
        loops.RELEASED,
        loops.TRAINABLE,
    ]
    for row in rows:
        assert row["steps"] == 2
        assert row["seconds_per_step"] == pytest.approx(row["timing"]["median"] / 2)
        assert set(row["components"]) == set(components.COMPONENTS)
        assert min(row["components"].values()) >= 0
        assert row["limits"][loops.CALLS] > 0
    assert plot.stat().st_size > 10_000


def test_drawn_weights_are_not_zero() -> None:
    models = networks.load("cifar", CPU)
    x = networks.random_tensor((2, 3, 32, 32), 0, CPU)
    out: Tensor = models.network(x, torch.full((2,), 50.0))
    assert 0.05 < float(out.std()) < 20.0
