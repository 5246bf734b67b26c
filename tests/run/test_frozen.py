"""Parameters are frozen while a run lasts, all of them, and afterwards as they were."""

from __future__ import annotations

import pytest
import torch
from helpers.forks import child_can_take, needs_fork
from helpers.tiny import TinyClassifier, TinyNetwork, flags, images
from torch import nn

from coup_fast import Purifier, ScoreModel
from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.locks import ForkLock


def nested() -> nn.Sequential:
    """Parameters at three depths; one layer occurs twice, one parameter never requires grad."""
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.Sequential(nn.Sequential(nn.Linear(2, 2)), shared))
    module[1].scale = nn.Parameter(torch.ones(2), requires_grad=False)
    module[1].register_parameter("none", None)
    return module


@pytest.mark.parametrize("inner", [False, True])
def test_every_parameter_and_back(inner: bool) -> None:
    module = nested()
    before = flags(module)
    assert len(before) == 5
    assert not all(before)
    called = (module, module[1], module.forward) if inner else (module.forward, None, len)
    with frozen_parameters(*called):
        assert not any(flags(module))
        with pytest.raises(KeyError), frozen_parameters(module):
            raise KeyError
        assert not any(flags(module))
    assert flags(module) == before


def test_networks_of_a_run_see_frozen_parameters() -> None:
    network, classifier = TinyNetwork(), TinyClassifier()
    seen: list[bool] = []
    for module in (network, classifier):
        module.register_forward_hook(lambda *_: seen.extend(flags(network, classifier)))
    Purifier(ScoreModel(network), classifier, num_steps=2)(images(1))
    assert len(seen) > 0
    assert not any(seen)
    assert all(flags(network, classifier))


def test_computed_parameters_are_refused() -> None:
    module = nn.Linear(2, 2)
    del module.weight
    module._parameters["weight"] = nn.Parameter(torch.ones(2, 2)) * 2  # type: ignore[assignment]
    with pytest.raises(ValueError, match="computed from other tensors"), frozen_parameters(module):
        pass


def test_parameters_inside_torch_func_are_refused() -> None:
    module = nn.Linear(2, 2)
    values = {name: p.detach() for name, p in module.named_parameters()}

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:
        def inside(_: nn.Module, __: tuple) -> None:
            with frozen_parameters(module):
                pytest.fail("not refused")

        handle = module.register_forward_pre_hook(inside)
        try:
            return torch.func.functional_call(module, values, (torch.ones(2),)).sum()
        finally:
            handle.remove()

    with pytest.raises(ValueError, match="does not differentiate parameters"):
        torch.func.grad(run)(values)


@needs_fork
def test_a_forked_process_does_not_find_the_lock_held() -> None:
    """Workers of data loaders are forked while other threads may be purifying."""
    lock = ForkLock()
    assert child_can_take(lambda: lock)
