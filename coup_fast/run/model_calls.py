"""How a run calls its networks: precision, memory format, compiled or as they are.

All of this concerns the networks alone: state, step and noise are float32 (float64 for float64
images) whatever is chosen here. The user's modules are called, never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from coup_fast._torch.calls import called, logits_of
from coup_fast._torch.modules import dtype_of, in_dtype, module_of, no_wider
from coup_fast.run.options import SELF_CAPTURING
from coup_fast.score_model import ClassifierFunction, ScoreModel, answer_of


@dataclass(frozen=True)
class ModelCalls:
    """The networks of a run and the way they are called.

    precision: "bf16": under autocast to bfloat16; "tf32": under `tf32_allowed`, which the run
    enters; "fp32": as PyTorch is set. channels_last: the state's memory format, which the networks
    get to see. compile: the purifier's option. compiled_network, compiled_classifier: called
    instead, where given.
    """

    score_model: ScoreModel
    classifier: ClassifierFunction | None = None
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool | str = False
    compiled_network: Callable[..., Any] | None = None
    compiled_classifier: Callable[..., Any] | None = None

    def layout(self, images: Tensor) -> Tensor:
        """The images in the memory format that the run is to have; itself where they are in it."""
        if not self.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def score(self, x: Tensor, time: Tensor) -> Tensor:
        """The score network's output at x [B, C, H, W] and time [B] in the network's units."""
        state, x = x.dtype, in_dtype(self._network_dtype, x)
        with self._cast(x):
            if self.compiled_network is not None:
                out = answer_of(self.compiled_network, x, time)
            else:
                out = self.score_model(x, time, converted=True)
        return no_wider(out, state)

    def classify(self, pixels: Tensor) -> Tensor:
        """The classifier's logits [B, K], with a graph where grad is on."""
        classifier = self.classifier
        if self.compiled_classifier is not None:
            classifier = self.compiled_classifier
        assert classifier is not None
        with self._cast(pixels):
            pixels = in_dtype(self._classifier_dtype, pixels)
            logits: Tensor = logits_of(called("classifier", classifier, pixels=pixels))
            return logits

    def classify_alone(self, pixels: Tensor) -> Tensor:
        """`classify` by the classifier as it is: compiled ones have no second derivatives."""
        return replace(self, compiled_classifier=None).classify(pixels)

    def network_alone(self, x: Tensor, time: Tensor) -> Tensor:
        """`score` by the network as it is, past the hooks of its `ScoreModel`."""
        with self._cast(x):
            out = answer_of(self.score_model.network, in_dtype(self._network_dtype, x), time)
        return no_wider(out, x.dtype)

    def flags(self) -> AbstractContextManager[None]:
        """For the time of a run, and of its backward pass: the process-wide flags it wants."""
        return tf32_allowed() if self.precision == "tf32" else nullcontext()

    @property
    def autocast(self) -> torch.dtype | None:
        """What the networks are cast to, if they are."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def captures_graphs(self) -> bool:
        """Whether the compiled networks are CUDA graphs by themselves."""
        return self.compile in SELF_CAPTURING

    @cached_property
    def _network_dtype(self) -> torch.dtype | None:
        """What the network takes, looked up once a run."""
        return dtype_of(self.score_model.network)

    @cached_property
    def _classifier_dtype(self) -> torch.dtype | None:
        return dtype_of(self.classifier)

    def _cast(self, x: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext()


class Compiled:
    """torch.compile'd forms of callables, one per callable and mode; copies start without any."""

    def __init__(self) -> None:
        self._forms: dict[tuple[int, str | None], tuple[Any, Callable[..., Any]]] = {}

    def form(self, function: Any, choice: bool | str) -> Callable[..., Any] | None:
        """The compiled form, None for None or where `choice`, the purifier's option, is False."""
        if function is None or choice is False:
            return None
        mode = None if choice is True else str(choice)
        key = (id(function), mode)
        if key not in self._forms:
            self._forms[key] = (function, torch.compile(function, mode=mode))
        return self._forms[key][1]

    def __reduce__(self) -> tuple[type[Compiled], tuple[()]]:
        return Compiled, ()


def check_precision(precision: str, images: Tensor) -> None:
    """Raises ValueError where these images cannot be run in this precision."""
    if precision == "tf32" and images.device.type != "cuda":
        raise ValueError(
            f"precision='tf32' is an arithmetic of NVIDIA GPUs, and images are on {images.device}; "
            "move them, or use 'fp32' ('bf16' is for CPUs with bfloat16 instructions)"
        )
    if precision != "fp32" and images.dtype == torch.float64:
        raise ValueError(
            f"float64 images run in float64, which precision={precision!r} contradicts; use 'fp32'"
        )


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """TF32 in cuBLAS products and cuDNN convolutions, for the process; flags as found afterwards.

    PyTorch keeps each flag twice, in an older and a newer form, and refuses to read the older one
    where they disagree: so it is set in the older, which sets both, and put back in both.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts = (matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    found = [part.fp32_precision for part in parts]
    change_matmul, change_cudnn = found[0] != "tf32", found[1] != "tf32"
    if change_matmul:
        matmul.allow_tf32 = True
    if change_cudnn:
        cudnn.allow_tf32 = True
    try:
        yield
    finally:
        if change_matmul:
            matmul.allow_tf32 = False
        if change_cudnn:
            cudnn.allow_tf32 = False
        for part, precision in zip(parts, found, strict=True):
            if part.fp32_precision != precision:
                part.fp32_precision = precision


def wants_channels_last(choice: bool | str, network: Any) -> bool:
    """Whether a run is to keep its state in channels_last; `choice` is the purifier's option.

    "auto": where the network's convolutions store their weights so. On a CPU the format is worth
    little where they do not (docs/design.md has the measurement), on a GPU each call would copy
    the weights first.
    """
    if choice != "auto":
        return bool(choice)
    module = module_of(network)
    weights = (
        part.weight
        for part in (() if module is None else module.modules())
        if isinstance(part, nn.Conv2d)
    )
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in weights
    )
