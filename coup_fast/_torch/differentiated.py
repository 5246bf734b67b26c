"""Models that are differentiated: what PyTorch says instead of a gradient, as one sentence.

Knows torch only. Where nothing is wrong, nothing is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# What PyTorch's error holds -> the cause, and what to do.
_CAUSES = {
    "use_reentrant=True": (
        "uses torch.utils.checkpoint with use_reentrant=True, through which torch.autograd.grad "
        "cannot pass; say use_reentrant=False there"
    ),
    "Inference tensors cannot be saved for backward": (
        "has parameters that were made under torch.inference_mode, and autograd does not take "
        "those; make or load it outside of inference mode"
    ),
    "derivative for aten::_scaled_dot_product": (
        "has attention in a fused kernel that cannot be differentiated twice, called out of "
        "Python's sight (by a scripted module, for example); give its plain module, put "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the call and the backward pass, or "
        "use guidance_gradient='stopped'"
    ),
    "does not currently support double backward": (
        "went through torch.compile, and what that makes cannot be differentiated twice; give the "
        "module as it was (the option compile does the compiling), or use "
        "guidance_gradient='stopped'"
    ),
    "torch.utils.checkpoint: ": (
        "uses torch.utils.checkpoint, whose second run saved other tensors than the first: it "
        "found parameters that require grad where the first had none (a defence freezes them while "
        "it runs; call .requires_grad_(False) on it before), or the classifier has attention, "
        "whose second derivatives need its checkpointing turned off"
    ),
}

_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def explain(error: RuntimeError, what: str) -> None:
    """Raises an error's cause as a sentence about `what`; returns if it is another one."""
    text = str(error)
    for sign, cause in _CAUSES.items():
        if sign in text:
            raise RuntimeError(f"{what} {cause}") from error


@contextmanager
def differentiated(what: str) -> Iterator[None]:
    """Within it `what`, as in "the classifier", is called with a graph and differentiated."""
    try:
        yield
    except RuntimeError as error:
        explain(error, what)
        raise


def in_backward() -> bool:
    """Whether this code runs within a backward pass: `torch.utils.checkpoint` calls models so."""
    return _task_id() != -1
