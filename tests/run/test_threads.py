"""Options of one purifier that several threads set, and calls that are under way meanwhile."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from helpers.tiny import TinyNetwork, images, short_purifier
from torch import Tensor

from coup_fast import Purifier, ScoreModel
from coup_fast.run import options


def test_options_that_two_threads_set_are_both_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = short_purifier("coup")
    replace = options.replace

    def slow(*args: Any, **changed: Any) -> Any:
        time.sleep(0.05)  # between reading the options and putting the new ones in their place
        return replace(*args, **changed)

    monkeypatch.setattr(options, "replace", slow)
    changes = {"gradient": "bpda", "states": "sqrt", "max_batch": 2, "verify_states": True}
    threads = [threading.Thread(target=setattr, args=(clean, *one)) for one in changes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: getattr(clean, name) for name in changes} == changes


def test_a_value_that_is_refused_leaves_the_others_settable() -> None:
    clean = short_purifier("coup")
    with pytest.raises(ValueError, match="gradient must be one of"):
        clean.gradient = "exakt"
    clean.gradient = "bpda"
    assert clean.gradient == "bpda"


class Setting(TinyNetwork):
    """Sets options of its purifier at its second call, as another thread might."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes, self.calls = changes, 0
        self.holders: list[Purifier] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            for name, value in self.changes.items():
                setattr(self.holders[0], name, value)
        return super().forward(x, t)


def with_network(network: Setting, **chosen: Any) -> Purifier:
    clean = Purifier(ScoreModel(network), method="diffpure", num_steps=3, **chosen)
    network.holders.append(clean)
    return clean


@pytest.mark.parametrize("gradient", ["exact", "autograd", "bpda"])
def test_a_call_goes_by_the_options_it_began_with(gradient: str) -> None:
    changes = {"gradient": "none", "max_batch": 1, "states": "sqrt", "precision": "bf16"}
    clean, plain = (with_network(Setting(**c), gradient=gradient) for c in (changes, {}))
    u, v = images().requires_grad_(), images().requires_grad_()
    result, want = clean(u), plain(v)
    assert clean.gradient == "none"
    assert torch.equal(result, want)
    result.sum().backward()
    want.sum().backward()
    assert torch.equal(u.grad, v.grad)


def test_values_are_checked_to_the_end_of_a_call() -> None:
    class Bad(Setting):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out = super().forward(x, t)
            return out / 0 if self.calls >= 3 else out

    with pytest.raises(FloatingPointError):
        with_network(Bad(check_values=False))(images())
