"""Functions around modules lose no protection: what a callable calls is found."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images
from torch import Tensor, nn

from coup_fast import Purifier, ScoreModel
from coup_fast._torch.reachable import modules_behind, reachable

GLOBAL = TinyClassifier(seed=3)
first = TinyClassifier(seed=4)  # the name of an attribute below, and of a global that is not read


class Caller:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, u: Tensor) -> Tensor:
        return self.module(u)


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.others = module, [TinyClassifier(seed=5)]

    def classify(self, u: Tensor) -> Tensor:
        return self.module(u)


def through_default(u: Tensor, module: nn.Module = GLOBAL) -> Tensor:
    return module(u)


def ways(module: nn.Module) -> dict:
    def inner(u: Tensor) -> Tensor:
        return module(u)

    def keyword(u: Tensor, *, called: nn.Module = module) -> Tensor:
        return called(u)

    return {
        "module": module,
        "bound method": module.forward,
        "closure": lambda u: module(2 * u - 1),
        "closure in a closure": lambda u: inner(u),
        "keyword default": keyword,
        "partial": partial(lambda net, u: net(u), module),
        "partial's keyword": partial(lambda u, net: net(u), net=module),
        "partial of a closure": partial(inner),
        "callable object": Caller(module),
        "method of an object": Caller(module).__call__,
        "method of an object that is not called": Holder(module).classify,
        "callable object in a closure": partial(lambda call, u: call(u), Caller(module)),
        "function in a function": lambda u: (lambda: module)()(u),
        "closure over a callable object's method": partial(Caller(module).__call__),
    }


@pytest.mark.parametrize("way", ways(GLOBAL))
def test_the_module_is_found(way: str) -> None:
    module = TinyClassifier()
    assert module in modules_behind(ways(module)[way])


def test_globals_are_found_and_attributes_of_their_name_are_not() -> None:
    network = TinyNetwork()
    assert modules_behind(lambda u: GLOBAL(u)) == (GLOBAL,)
    assert modules_behind(through_default) == (GLOBAL,)
    assert modules_behind(lambda u: network.first(u)) == (network,)
    assert modules_behind(torch.sigmoid) == modules_behind(None) == ()
    assert modules_behind(lambda u: (lambda: GLOBAL(u))()) == (GLOBAL,)


def test_attacks_look_into_containers_and_protections_do_not() -> None:
    holder = Holder(GLOBAL)
    assert modules_behind(holder.classify) == (GLOBAL,)
    assert modules_behind(GLOBAL) == (GLOBAL,)  # its parts belong to it
    found = [thing for thing in reachable(holder.classify) if isinstance(thing, nn.Module)]
    assert holder.others[0] in found
    assert GLOBAL.conv in found
    assert list(reachable(GLOBAL, stop=lambda thing: thing is GLOBAL)) == [GLOBAL]


@pytest.mark.parametrize("way", ways(GLOBAL))
def test_autograd_leaves_no_gradient_in_parameters(way: str) -> None:
    network, classifier = TinyNetwork(), TinyClassifier()
    purifier = Purifier(
        ScoreModel(lambda x, t: network(x, t)),
        ways(classifier)[way],
        num_steps=2,
        gradient="autograd",
    )
    u = images().requires_grad_()
    purifier(u).sum().backward()
    assert u.grad is not None
    for parameter in (*network.parameters(), *classifier.parameters()):
        assert parameter.grad is None
        assert parameter.requires_grad


def test_a_function_inside_a_module_is_looked_into() -> None:
    from coup_fast.score_model import EnergyModel

    network = TinyNetwork()
    energy = EnergyModel(lambda x, t: network(x, t).square().sum((1, 2, 3)))
    purifier = Purifier(
        ScoreModel(energy, kind="score"), method="diffpure", num_steps=2, gradient="autograd"
    )
    purifier(images().requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
