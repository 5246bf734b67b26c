"""Where a run left the finite numbers: asked only once its result is wrong, and slowly."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from coup_fast.chain import AnyChain


def _bad_rows(x: Tensor) -> list[int]:
    return (~x.detach().isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


def diagnose(chain: AnyChain, images: Tensor, first: int = 0) -> str | None:
    """Run the chain again, waiting at every step, and say where it left the finite numbers.

    first: the position of images[0] in the caller's batch.
    None if it does not (all outputs finite, or models that do not repeat themselves).
    """
    state, reference = chain.start(images), chain.reference(images)
    batch, steps = images.shape[0], chain.num_steps

    def report(what: str, x: Tensor, when: str) -> str | None:
        rows = [first + row for row in _bad_rows(x)]
        if not rows:
            return None
        which = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        return (
            f"{chain.method}: the {what} is inf or NaN {when}, for {len(rows)} of {batch} images "
            f"(positions {which})"
        )

    if (message := report("state", state[0], "before the first step")) is not None:
        return message
    for k in range(steps):
        when = f"at step {k + 1} of {steps}"
        evaluated: Any = chain.evaluate(k, state[0])
        for name, value in zip(chain.evaluated, evaluated, strict=True):
            if value is not None and (message := report(name, value, when)) is not None:
                return message
        state = chain.advance(k, state, evaluated, reference)
        if (message := report("state", state[0], f"after step {k + 1} of {steps}")) is not None:
            return message
    return None
