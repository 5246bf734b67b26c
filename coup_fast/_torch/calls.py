"""What models are called with and what they give back, whatever form they have.

`called` calls a model, and where that fails says with what it was called. `output_of` and
`logits_of` pick the tensor out of what score networks and classifiers return. `NetworkForm` is a
score network that wants its time or its image in another form as one that takes (x, t). Knows torch
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from coup_fast._torch.modules import declared_channels, described, mode_of, module_of, name_of

# A function that calls a network: (network, x [B, C, H, W], t [B]) -> what the network returns.
Call = Callable[[Any, Tensor, Tensor], Any]

_HOW = "it was called with"
# What is made again with a longer message: these types themselves. What derives from them passes as
# it is (out of memory, signals of attacks and hooks).
_PLAIN = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
_SIZES = ("size", "shape", "dimension", "match")  # in errors of networks that halve odd sizes
_INDICES = ("indices", "scalar type", "scalar types", "used as indices", "dtype long")


class TooSmallToMirror(ValueError):
    """An image that cannot be mirrored as far as `size_multiple` wants; the network is not called.

    It passes `called` as it is: what that would add is about a network that failed.
    """


def called(name: str, model: Callable[..., Any], **tensors: Tensor) -> Any:
    """`model(*tensors)`; where that fails, an error of the same type that says how it was called.

    name: the model's part, as in "classifier". tensors: by what they are called in the message.
    """
    if torch.compiler.is_compiling():
        return model(*tensors.values())
    try:
        return model(*tensors.values())
    except _PLAIN as error:
        if type(error) not in _PLAIN or _HOW in str(error):
            raise
        _explain(name, model, error, tensors)


def _explain(
    name: str, model: Callable[..., Any], error: Exception, tensors: Mapping[str, Tensor]
) -> NoReturn:
    how = " and ".join(f"{key} = {_described(tensor)}" for key, tensor in tensors.items())
    hints = _hints(str(error), error, *tensors.values())
    text = f"the {name} {name_of(model)} failed: {error}\n{_HOW} {how}"
    raise type(error)("; ".join([text, *hints])) from error


def _described(tensor: Tensor) -> str:
    """A tensor in a few words; the value of a time, where asking for it is allowed."""
    words = [str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape))]
    if tensor.device.type != "cpu":
        words.append(f"on {tensor.device}")
    if tensor.ndim == 4 and not tensor.is_contiguous():
        words += ["channels_last"] * tensor.is_contiguous(memory_format=torch.channels_last)
    if tensor.ndim == 1 and tensor.numel() > 0 and tensor.device.type == "cpu":
        with suppress(Exception):  # tensors without values
            all_or_first = "all" if bool((tensor == tensor[0]).all()) else "first"
            words.append(f"({all_or_first} {tensor[0].item():g})")
    return " ".join(words)


def _hints(text: str, error: Exception, x: Tensor, *time: Tensor) -> list[str]:
    """What could be meant, judged by the error's text and the input."""
    hints, lower = [], text.lower()
    if x.ndim == 4 and x.shape[1] not in (1, 2, 3, 4) and x.shape[3] in (1, 3, 4):
        hints.append(
            "the images look like [B, H, W, C], and [B, C, H, W] is wanted: "
            "images.permute(0, 3, 1, 2)"
        )
    if not time:
        return hints
    if "out of range" in lower and not time[0].is_floating_point():
        hints.append(
            "if its table of times is shorter, describe it by a DiscreteSchedule of as many steps "
            "as the table has"
        )
    elif any(sign in lower for sign in _INDICES):
        hints.append(
            "a network that looks its time up takes ScoreModel(time_dtype=torch.int64), with "
            "schedule=DiscreteSchedule() for 1000 times"
        )
    elif any(size % 32 for size in x.shape[2:]) and any(sign in lower for sign in _SIZES):
        hints.append(
            "if it takes only sizes that a power of two divides, ScoreModel(size_multiple=32) "
            "mirrors the image's edges up to such a size and crops the answer"
        )
    shaped = not hints and any(sign in lower for sign in _SIZES)
    if shaped or isinstance(error, TypeError | IndexError | AttributeError | AssertionError):
        hints.append(
            "where it wants other arguments, such as a keyword, t as [B, 1] or a label, "
            "ScoreModel(call=lambda network, x, t: ...) makes the call"
        )
    return hints


def output_of(returned: Any, like: Tensor) -> Tensor:
    """The tensor in what a score network returned for `like` [B, C, ...]. Raises TypeError.

    That is the answer itself, its `.sample` or `.logits`, the entry "sample" of a mapping, or of a
    tuple or list the one tensor that has the shape of `like` or twice its channels.
    """
    if isinstance(returned, Tensor):
        return returned
    found = _member(returned, "sample", "logits")
    if found is not None:
        return found
    kind, held = type(returned).__name__, ""
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        doubled = (*like.shape[:1], 2 * like.shape[1], *like.shape[2:])
        tensors = [item for item in returned if isinstance(item, Tensor)]
        fitting = [item for item in tensors if tuple(item.shape) in (tuple(like.shape), doubled)]
        if len(fitting) == 1:
            return fitting[0]
        held = f" of tensors {[list(item.shape) for item in tensors]}"
    raise TypeError(
        f"the score network returned {kind}{held}; a tensor of the input's shape "
        f"{list(like.shape)} is needed: ScoreModel(call=lambda network, x, t: ...) can pick it out"
    )


def logits_of(returned: Any) -> Any:
    """The `.logits` of what a classifier returned, where it has such a tensor; else all of it."""
    found = None if isinstance(returned, Tensor) else _member(returned, "logits")
    return returned if found is None else found


def _member(returned: Any, *names: str) -> Tensor | None:
    """The first tensor among these attributes, or entries, of an output object."""
    for name in names:
        held = returned.get(name) if isinstance(returned, Mapping) else None
        held = getattr(returned, name, None) if held is None else held
        if isinstance(held, Tensor):
            return held
    return None


class NetworkForm(nn.Module):
    """A score network in whatever form as f(x, t), with x [B, C, H, W] and t [B].

    Args:
        network: module or callable.
        call: how it is called; None: network(x, t).
        time_dtype: of the t that it gets; whole numbers are rounded to, in integer types.
        size_multiple: height and width that it takes are divisible by this. Others are mirrored at
            their edges up to the next such size, and the answer is cropped.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        call: Call | None = None,
        time_dtype: torch.dtype | None = None,
        size_multiple: int | None = None,
    ) -> None:
        super().__init__()
        self.training = mode_of(network)
        self.network = network
        owner = module_of(network)
        if owner is not network:
            self.owner = owner  # of a bound method, whose parameters are this module's too
        self.call = call
        self.time_dtype = time_dtype
        self.size_multiple = size_multiple

    @property
    def in_channels(self) -> int | None:
        """Image channels the network declares, or None."""
        return declared_channels(self.network)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output [B, C or 2C, H, W]."""
        if self.time_dtype is not None:
            t = (t if self.time_dtype.is_floating_point else t.round()).to(self.time_dtype)
        network = self.network if self.call is None else partial(self.call, self.network)
        given = x if self.size_multiple is None else mirrored(x, self.size_multiple)
        out = output_of(called("score network", network, x=given, t=t), given)
        return cropped(out, x) if out.shape[2:] == given.shape[2:] != x.shape[2:] else out

    def facts(self) -> str:
        """What `repr` of the ScoreModel says of the form."""
        said = {"time_dtype": self.time_dtype, "size_multiple": self.size_multiple}
        known = [f", {key}={value}" for key, value in said.items() if value is not None]
        known += [] if self.call is None else [f", call={described(self.call)}"]
        return "".join(known)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self.network)}{self.facts()})"


def _edges(size: int, multiple: int) -> tuple[int, int]:
    """What is added before and after `size` to make it divisible by `multiple`."""
    missing = -size % multiple
    return missing // 2, missing - missing // 2


def mirrored(x: Tensor, multiple: int) -> Tensor:
    """x [B, C, H, W] with its edges mirrored up to sizes that `multiple` divides; itself if so.

    As `F.pad(mode="reflect")`, whose backward pass on CUDA adds in no fixed order; slices do.
    Raises TooSmallToMirror for an image that is too small to be mirrored so far.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        before, after = _edges(size, multiple)
        if after == 0:
            continue
        if after >= size:
            raise TooSmallToMirror(
                f"size_multiple={multiple} would add {before + after} to an image of "
                f"{x.shape[2]}x{x.shape[3]}, more than it can mirror; use a smaller multiple"
            )
        first = x.narrow(dim, 1, before).flip(dim)
        last = x.narrow(dim, size - 1 - after, after).flip(dim)
        x = torch.cat([first, x, last], dim)
    return x


def cropped(out: Tensor, x: Tensor) -> Tensor:
    """The part of an answer to the mirrored x that belongs to x."""
    for dim in (2, 3):
        out = out.narrow(dim, (out.shape[dim] - x.shape[dim]) // 2, x.shape[dim])
    return out
