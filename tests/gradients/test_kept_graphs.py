"""Graphs kept within `graph_memory`: the same bits, fewer calls, no more memory than was given."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers.tiny import SHORT, TinyClassifier, TinyNetwork, images, short_purifier
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel
from coup_fast.attacks import PGD
from coup_fast.attacks.eot import MemoryModel, eot_gradient
from coup_fast.attacks.peak_memory import peak_bytes

METHODS = sorted(SHORT)
ALL = 10**9


def gradient(clean: Purifier, u: Tensor) -> tuple[Tensor, Tensor]:
    leaf = u.clone().requires_grad_()
    out = clean(leaf)
    weights = torch.linspace(-1.0, 2.0, out.numel()).view_as(out)
    return out.detach(), torch.autograd.grad((weights * out).sum(), leaf)[0]


def calls_of(clean: Purifier, u: Tensor) -> int:
    """Calls of the score network that a gradient takes."""
    calls: list[int] = []
    handle = clean.score_model.network.register_forward_hook(lambda *_: calls.append(1))
    gradient(clean, u)
    handle.remove()
    return len(calls)


def step_bytes(clean: Purifier) -> list[float]:
    return sorted(clean._kept.graph_bytes.values())


@pytest.mark.parametrize("states", ["device", "sqrt"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bits_do_not_depend_on_what_is_kept(method: str, states: str) -> None:
    u = images()
    value, want = gradient(short_purifier(method, states=states, check_values=False), u)
    everything = short_purifier(method, states=states, graph_memory=ALL, check_values=False)
    for _ in range(2):  # the first measures, the second knows
        assert all(map(torch.equal, gradient(everything, u), (value, want)))
    sizes = step_bytes(everything)
    for memory in (1, int(sizes[0]), int(2.5 * sizes[-1])):
        some = everything.with_options(graph_memory=memory)
        assert all(map(torch.equal, gradient(some, u), (value, want)))


@pytest.mark.parametrize("method", ["coup", "diffpure", "adp"])
def test_what_is_kept_is_not_computed_again(method: str) -> None:
    u = images()
    clean = short_purifier(method, graph_memory=ALL, check_values=False)
    gradient(clean, u)  # measures
    (size,) = step_bytes(clean)
    steps = clean.plan.num_steps
    a_step = calls_of(clean, u) // steps
    assert calls_of(clean, u) == a_step * steps
    for kept in (0, 1, 2):
        some = clean.with_options(graph_memory=int((kept + 0.5) * size))
        assert calls_of(some, u) == a_step * (2 * steps - kept)


def test_no_more_memory_than_was_given() -> None:
    """Beyond what the run takes anyway; and most of it is used."""
    u = images(batch=64)
    clean = short_purifier("coup", graph_memory=ALL, check_values=False)
    gradient(clean, u)
    (size,) = step_bytes(clean)

    def peak(memory: int) -> int:
        some = clean.with_options(graph_memory=memory)
        return peak_bytes(lambda: gradient(some, u), u.device)

    least = peak(0)
    for steps in (1, 2):
        memory = int(steps * size)
        # The graph of the step under way is one of those that are kept, where steps are.
        assert 0.5 * (memory - size) <= peak(memory) - least <= memory
    parts = clean.with_options(max_batch=32, graph_memory=int(size))
    assert peak_bytes(lambda: gradient(parts, u), u.device) - least <= size


class Rounding(nn.Module):
    """Rounds differently where gradients are recorded, as some operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNetwork()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.network(x, t)
        return out * (1 + 1e-6) if out.requires_grad else out


def test_a_step_that_rounds_differently_keeps_no_graph() -> None:
    kind, short = SHORT["diffpure"]
    clean = Purifier(ScoreModel(Rounding(), kind), method="diffpure", **short)
    u = images()
    value, want = gradient(clean, u)
    kept = clean.with_options(graph_memory=ALL)
    assert all(map(torch.equal, gradient(kept, u), (value, want)))
    assert torch.equal(value, clean(u))
    assert step_bytes(kept) == [math.inf]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNetwork()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t) + 0.1 * torch.randn_like(x)


def test_a_network_that_does_not_repeat_itself_is_found() -> None:
    kind, short = SHORT["diffpure"]
    clean = Purifier(ScoreModel(Noisy(), kind), method="diffpure", graph_memory=ALL, **short)
    with pytest.raises(RuntimeError, match="differs from the forward pass"):
        gradient(clean, images())


def test_every_kept_step_is_compared_when_asked() -> None:
    """A network that rounds differently from its second gradient on, which measuring cannot see."""

    class Later(Rounding):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out = self.network(x, t)
            self.calls += out.requires_grad
            return out * (1 + 1e-6) if out.requires_grad and self.calls > 1 else out

    kind, short = SHORT["diffpure"]
    options = {"graph_memory": ALL, "verify_states": True, "check_values": False}
    clean = Purifier(ScoreModel(Later(), kind), method="diffpure", **options, **short)
    value, _ = gradient(clean, images())
    assert torch.equal(value, clean(images()))


def test_twice_backwards_and_results_that_are_written_over() -> None:
    clean = short_purifier("coup", graph_memory=ALL)
    u = images()
    gradient(clean, u)
    leaf = u.clone().requires_grad_()
    out = clean(leaf)
    first = torch.autograd.grad(out.square().sum(), leaf, retain_graph=True)[0]
    again = torch.autograd.grad(out.square().sum(), leaf)[0]  # the graphs are gone: recomputed
    assert torch.equal(first, again)
    out = clean(leaf)
    weights = torch.ones_like(out)
    with torch.no_grad():
        out.mul_(2)
    (written,) = torch.autograd.grad(out, leaf, weights)
    assert torch.equal(written, torch.autograd.grad(clean(leaf), leaf, weights)[0])


def test_weights_that_changed_are_refused() -> None:
    clean = short_purifier("diffpure", graph_memory=ALL)
    gradient(clean, images())
    leaf = images().requires_grad_()
    out = clean(leaf)
    with torch.no_grad():
        next(clean.score_model.parameters()).mul_(1.1)
    with pytest.raises(RuntimeError, match="changed between the forward and the backward pass"):
        torch.autograd.grad(out.sum(), leaf)


@pytest.mark.parametrize("given", [-1, 1.5, "auto", True])
def test_bad_budgets(given: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"graph_memory.*{given}"):
        short_purifier("coup", graph_memory=given)


def test_a_budget_goes_to_graphs_before_it_goes_to_larger_micro_batches() -> None:
    model = MemoryModel(fixed=100, one_step=50, states=10)
    assert model.shared(10**6, runs=8, steps=5, enough=2) == (8, 10**6 - 580)
    assert model.shared(100 + 60 * 8, runs=8, steps=5, enough=2) == (2, 60 * 6)
    assert model.shared(100 + 60 * 8, runs=8, steps=5, enough=8) == (8, 0)
    assert model.shared(100 + 310 * 4, runs=8, steps=5, enough=2) == (4, 100 + 310 * 4 - 340)


def test_eot_fills_its_budget_with_graphs() -> None:
    u, labels = images(), torch.tensor([0, 1, 2])
    clean = short_purifier("coup", check_values=False)
    defence = PurifiedClassifier(clean, TinyClassifier())
    want = eot_gradient(defence, u, labels, draws=2, micro_batch=6)
    plain = calls_of(clean, u)
    calls: list[int] = []
    clean.score_model.network.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):  # the first measures
        calls.clear()
        got = eot_gradient(defence, u, labels, draws=2, memory_budget=ALL)
    assert got.micro_batch == 6
    assert torch.equal(got.gradient, want.gradient)
    assert len(calls) == plain // 2  # one forward of each step, and no other
    assert clean.graph_memory == 0
    least = got.memory.bytes(1)
    small = eot_gradient(defence, u, labels, draws=2, memory_budget=least)
    assert small.micro_batch == 1


def test_every_iterate_of_an_attack_keeps_its_graphs() -> None:
    u, labels = images(), torch.tensor([0, 1, 2])
    clean = short_purifier("coup", check_values=False)
    defence = PurifiedClassifier(clean, TinyClassifier())
    calls: list[int] = []
    clean.score_model.network.register_forward_hook(lambda *_: calls.append(1))

    def calls_of_attack(steps: int) -> int:
        calls.clear()
        PGD(eps=0.1, steps=steps, eot=2)(defence, u, labels, memory_budget=ALL)
        return len(calls)

    calls_of_attack(1)  # measures the graphs
    a_step = clean.plan.num_network_calls // clean.plan.num_steps
    assert calls_of_attack(5) - calls_of_attack(2) == 3 * a_step * clean.plan.num_steps


@pytest.mark.parametrize("method", ["coup", "diffpure"])
def test_an_eot_gradient_stays_within_its_budget(method: str) -> None:
    u, labels = images(), torch.tensor([0, 1, 2])
    defence = PurifiedClassifier(short_purifier(method), TinyClassifier())
    memory = eot_gradient(defence, u, labels, draws=8, memory_budget=ALL).memory
    least, run = memory.bytes(1), memory.per_run + 3 * memory.one_step
    for budget in (least, least + run, 2 * least + 8 * run, memory.fixed + 30 * run):
        take = partial(eot_gradient, defence, u, labels, draws=8, memory_budget=budget)
        found = take()  # measures the graphs of this micro-batch
        parts = (found.gradient, found.losses, found.scores)
        result = sum(part.numel() * part.element_size() for part in parts)
        assert peak_bytes(take, u.device) - result <= budget
