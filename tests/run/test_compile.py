"""compile=…: which callables are compiled, when they are called, what they change."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from helpers.tiny import images, short_purifier


class FakeCompile:
    """torch.compile by hand: notes what it is given, and counts calls of the results."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str | None]] = []
        self.calls: dict[str, int] = {}

    def __call__(self, function, mode=None):
        name = type(function).__name__
        self.made.append((name, mode))

        def compiled(*args):
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*args)

        return compiled


@pytest.fixture
def fake(monkeypatch) -> FakeCompile:
    fake = FakeCompile()
    monkeypatch.setattr(torch, "compile", fake)
    return fake


@pytest.mark.parametrize(("choice", "mode"), [(True, None), ("default", "default")])
def test_networks_are_compiled_once_and_called_at_every_step(fake, choice, mode) -> None:
    clean = short_purifier("coup", compile=choice)
    u = images()
    want = short_purifier("coup")(u)
    assert torch.equal(clean(u), want)
    assert torch.equal(clean(u), want)
    assert fake.made == [("TinyNetwork", mode), ("TinyClassifier", mode)]
    assert fake.calls == {"TinyNetwork": 6, "TinyClassifier": 6}
    assert len(list(clean.modules())) == len(list(short_purifier("coup").modules()))


def test_nothing_is_compiled_unless_asked_for_nor_what_is_not_called(fake) -> None:
    short_purifier("coup")(images())
    assert fake.made == []
    short_purifier("diffpure", compile=True)(images())
    assert fake.made == [("TinyNetwork", None)]


def test_copies_compile_for_themselves(fake) -> None:
    clean = short_purifier("adp", compile=True)
    want = clean(images())
    for other in (copy.deepcopy(clean), pickle.loads(pickle.dumps(clean))):
        fake.made.clear()
        assert torch.equal(other(images()), want)
        assert fake.made == [("TinyNetwork", None)]


def test_the_exact_gradient_differentiates_guidance_by_the_plain_classifier(fake) -> None:
    u = images().requires_grad_()
    out = short_purifier("coup", compile=True)(u)
    assert fake.calls == {"TinyNetwork": 3, "TinyClassifier": 3}
    out.sum().backward()
    assert fake.calls == {"TinyNetwork": 6, "TinyClassifier": 3}
    short_purifier("coup", compile=True, guidance_gradient="stopped")(u).sum().backward()
    assert fake.calls["TinyClassifier"] == 9


def test_results_and_gradients_through_the_compiler(monkeypatch) -> None:
    """The compiler's front end, without its code generation (tens of seconds)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    u, weight = images(), torch.randn(3, 3, 8, 8)
    results = []
    for choice in (False, True):
        clean = short_purifier("coup", compile=choice, num_steps=2)
        leaf = u.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((clean(leaf) * weight).sum(), leaf)
        results.append((clean(u), gradient))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_modes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compile .*True, False, default, reduce-ov.*'fast'"):
        short_purifier(compile="fast")
    assert "compile='default'" in repr(short_purifier(compile="default"))
