"""Models that are not ours, under numbered draws: what lets an attack average over their noise.

Any module or callable from pixels to scores. Its randomness is driven in three ways, all at once:

- A `Purifier` or `PurifiedClassifier` anywhere inside it gets its sample ids and draws from here
  (`coup_fast.run.driver`).
- An object inside it with a method `set_draw(draw, sample_ids)` is told, before each forward, which
  draw comes (an int in [0, 2^63)) and for which images (int64 [B]). Its noise in that forward has
  to be a function of these two.
- Torch's global generator is seeded by draw and sample ids around the forward, and put back.

What this cannot see: noise from generators that the model owns, from NumPy or Python's `random`,
and from other processes. Such noise is fresh in every forward, so averages over it are right, but
it cannot be repeated. With torch's global generator an image's noise goes by its place in the
batch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import getattr_static
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_fast._torch.calls import logits_of
from coup_fast._torch.differentiated import differentiated
from coup_fast._torch.frozen import frozen_parameters
from coup_fast._torch.modules import in_dtype_of, name_of
from coup_fast._torch.reachable import reachable
from coup_fast.purified_classifier import PurifiedClassifier
from coup_fast.purifier import Purifier
from coup_fast.run.driver import Driver, driven
from coup_fast.run.warn import warn

Defence = PurifiedClassifier | Purifier


def _is_purifier(thing: Any) -> bool:
    return isinstance(thing, Purifier)


class Foreign:
    """A model that is called with images only, [B, C, H, W] -> scores [B, K].

    model: the module or callable, or a `Foreign`, whose model and seed are then taken. sample_ids:
    int64 [B] of the images that it will be called with. seed: mixed into that of the generator, so
    an attack sees the noise of its judge at the same draw only if both have the same seed.

    defences: those of ours that it holds. variants: what takes the place of each in a call, by
    default its like. modules: all that it holds. hooks: objects with `set_draw`. stride: how many
    draws a forward was seen to take. calls: images that went through.
    """

    def __init__(self, model: Any, sample_ids: Tensor, seed: int = 0) -> None:
        given = model if isinstance(model, Foreign) else None
        self.model: Any = model if given is None else given.model
        self.seed: int = seed if given is None else given.seed
        found = list(reachable(self.model, _is_purifier))
        # A PurifiedClassifier and its purifier too: a model may call the two parts by themselves.
        self.defences = [t for t in found if isinstance(t, PurifiedClassifier | Purifier)]
        # Statically: an attribute that is made when it is asked for may import, or raise, anything.
        self.hooks = [t for t in found if callable(getattr_static(t, "set_draw", None))]
        self.modules = [thing for thing in found if isinstance(thing, nn.Module)]
        self.variants: dict[Defence, Any] = {d: _like(d) for d in self.defences}
        self.stride = 1
        self.calls = 0
        self._drivers: dict[nn.Module, Driver] = {}  # of the last call
        self.call_with(sample_ids)

    def call_with(self, sample_ids: Tensor) -> None:
        """From now on it will be called with these images, int64 [B]."""
        self.sample_ids = sample_ids
        name = f"{self.seed} {sample_ids.tolist()}"
        self._name = hashlib.sha256(name.encode()).digest()

    @property
    def seeding(self) -> str:
        """What drives its noise, in words."""
        ways = ["draws of coup_fast"] if self.defences else []
        ways += ["its set_draw"] if self.hooks else []
        return " and ".join(ways) or "torch's global generator"

    def scores(self, images: Tensor, draw: int) -> Tensor:
        """Scores [B, K] under a draw; differentiable if the model is. Raises ValueError, TypeError.

        Call it within `frozen`.
        """
        return self._call(images, draw)[0]

    def frozen(self) -> Any:
        """A context in which no parameter that can be found requires grad."""
        return frozen_parameters(*self.modules)

    def gradient(self, images: Tensor, labels: Tensor, loss: Any, draw: int) -> tuple[Tensor, ...]:
        """Gradient [B, C, H, W] of the summed losses, losses [B] and scores [B, K] under a draw."""
        what = f"a model of {name_of(self.model)}"
        with torch.enable_grad(), self.frozen(), differentiated(what):
            leaf = images.detach().requires_grad_()
            scores = self.scores(leaf, draw)
            losses = loss(scores, labels)
            if losses.shape != labels.shape:
                raise ValueError(
                    f"loss must return one number per image, [{len(labels)}], got "
                    f'{list(losses.shape)} (reduction="none")'
                )
            with driven(self._drivers, again=True):
                gradient = image_gradient(losses, leaf, name_of(self.model))
        return gradient, losses.detach(), scores.detach()

    def _call(self, images: Tensor, draw: int, watch: bool = False) -> tuple[Tensor, bool]:
        """Scores under a draw; with `watch`, whether the model was seen to use any randomness."""
        drivers: dict[nn.Module, Driver] = {
            defence: Driver(
                variant,
                self.sample_ids,
                draw,
                getattr(variant, "num_draws", 1),
                getattr(defence, "fresh_draws", False),
            )
            for defence, variant in self.variants.items()
        }
        self._drivers = drivers
        for hook in self.hooks:
            hook.set_draw(draw, self.sample_ids)
        with ExitStack() as stack:
            stack.enter_context(driven(drivers))
            generators = stack.enter_context(_seeded(self._seed(draw), images.device))
            before = _states(generators) if watch else None
            scores = logits_of(self.model(in_dtype_of(self.model, images)))
            used = watch and _states(generators) != before
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{name_of(self.model)} must return scores [{len(images)}, K]; got {got}"
            )
        self.calls += len(images)
        taken = max((driver.used for driver in drivers.values()), default=0)
        self.stride = max(self.stride, taken)
        return scores, used or taken > 0 or bool(self.hooks)

    def _seed(self, draw: int) -> int:
        """64 bits. Bit 31 tells an attack's draws (from 2^32 on) from a judge's: torch's CPU
        generator reads the lower half only, and no attack may see the noise of its judge."""
        mixed = hashlib.sha256(self._name + draw.to_bytes(8, "little")).digest()
        seed = int.from_bytes(mixed[:8], "little") & ~(1 << 31)
        return seed | (int(draw >= 2**32) << 31)

    def repeats(
        self, images: Tensor, draw: int, draws: int, *, fixed: bool, quiet: bool = False
    ) -> bool:
        """Whether one forward is enough for a mean over `draws` draws from `draw` on. It takes two.

        One is enough for a model that is seen to use no random number and gives the same scores
        twice, bit for bit; a warning says so where draws > 1, unless quiet. fixed: the draws will
        be repeated, so the model has to give the same scores under the same draw; ValueError if
        not.
        """
        with torch.no_grad(), self.frozen():
            first, used = self._call(images, draw, watch=True)
            again = draw if fixed else draw + self.stride
            other, used_again = self._call(images, again, watch=True)
        same = torch.equal(first, other)
        if fixed and not same:
            raise ValueError(
                f'noise="fixed" needs noise that can be repeated, and {name_of(self.model)} gave '
                "other scores under the same draw: it draws from a generator that is not torch's "
                "global one; give it a method set_draw(draw, sample_ids), or use "
                'noise="fresh"'
            )
        if used or used_again or not same:
            return False
        if draws > 1 and not quiet:
            warn(
                f"eot={draws} does nothing for {name_of(self.model)}: it gave the same scores "
                "twice, bit for bit, and was seen to use no random number, so each gradient is "
                "that of one forward; say eot=1"
            )
        return True


def image_gradient(losses: Tensor, leaf: Tensor, name: str) -> Tensor:
    """The gradient of the summed losses [B]; ValueError where autograd knows none."""
    gradient: Tensor | None = None
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"the scores of {name} do not depend on the images in a way that autograd can follow "
            "(torch.no_grad, detach, quantised layers or NumPy inside?), so there is no gradient "
            "to attack with"
        )
    return gradient


def _like(defence: Defence) -> Defence:
    """The same defence as an object that nobody drives."""
    if isinstance(defence, Purifier):
        return defence.with_options()
    purifier = defence.purifier.with_options()
    return PurifiedClassifier(purifier, defence.classifier, defence.num_draws, defence.vote)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[list[torch.Generator]]:
    """Torch's global generators of the CPU and this device, seeded within, put back afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        generators = [torch.default_generator]
        if cuda:
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
        for generator in generators:
            generator.manual_seed(seed)
        yield generators


def _states(generators: list[torch.Generator]) -> list[Any]:
    """Of these, NumPy's and Python's: equal as long as nobody draws."""
    of_numpy = [str(part) for part in np.random.get_state(legacy=True)]  # noqa: NPY002
    return [[g.get_state().tolist() for g in generators], random.getstate(), of_numpy]
