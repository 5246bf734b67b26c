"""Where a run left the finite numbers: asked only once its result is wrong, and slowly."""

from __future__ import annotations

from torch import Tensor

from coup_fast.run.loop import states
from coup_fast.run.steps import Run, State


def _bad_rows(x: Tensor) -> list[int]:
    finite = x.detach().isfinite().reshape(len(x), -1)
    return (~finite.all(1)).nonzero().flatten().tolist()


class _NotFiniteError(Exception):
    """The first tensor of a run that is not finite, in a sentence."""


def diagnose(run: Run, images: Tensor, first: int = 0) -> str | None:
    """Take the run again, waiting at every step, and say where it left the finite numbers.

    first: the position of images[0] in the caller's batch.
    None if it does not (all outputs finite, or models that do not repeat themselves).
    """

    def look(what: str, x: Tensor, when: str) -> None:
        rows = [first + row for row in _bad_rows(x)]
        if rows:
            which = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
            raise _NotFiniteError(
                f"{run.plan.method}: the {what} is inf or NaN {when}, for {len(rows)} of "
                f"{len(images)} images (positions {which})"
            )

    def watched(k: int, state: State, attacked: Tensor | None) -> State:
        evaluated = run.evaluate(k, state[0])
        for name, value in zip(run.evaluated, evaluated, strict=True):
            if value is not None:
                look(name, value, f"at step {k + 1} of {run.num_steps}")
        return run.advance(k, state, evaluated, attacked)

    try:
        for k, state in states(run, images, watched):
            when = f"after step {k} of {run.num_steps}" if k else "before the first step"
            look("state", state[0], when)
    except _NotFiniteError as found:
        return str(found)
    return None
