"""The loop over a run's steps: the only one, whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from torch import Tensor

from coup_fast.run.progress import Tell
from coup_fast.run.steps import Run, State

Step = Callable[[int, State, Tensor | None], State]


def states(
    run: Run, images: Tensor, step: Step | None = None, tell: Tell | None = None
) -> Iterator[tuple[int, State]]:
    """(k, the state after k steps) from the start, k = 0, to the result.

    step: how step k is taken: `run.step`, the default, which makes each state anew and is
    differentiable where grad is on; or `run.step_`, which writes over the state before.

    tell: receives the number of finished steps after each; of all steps where the last ones would
    change nothing.
    """
    step = step or run.step
    state, attacked = run.start(images), run.attacked(images)
    yield 0, state
    for k in range(run.num_steps):
        if run.finished(state):
            if tell is not None:
                tell(run.num_steps)
            return
        state = step(k, state, attacked)
        if tell is not None:
            tell(k + 1)
        yield k + 1, state


def final_state(
    run: Run, images: Tensor, step: Step | None = None, tell: Tell | None = None
) -> State:
    """The last of `states`."""
    for _, state in states(run, images, step, tell):
        final = state
    return final


def states_of_parts(parts: Sequence[tuple[Run, Tensor]]) -> Iterator[tuple[int, list[State]]]:
    """`states` of the batch's parts side by side: (k, the state of each).

    parts: (run, images), at least one. The state of a part that has finished stays as it is.
    """
    latest: dict[int, State] = {}
    for k, row in enumerate(zip_longest(*(states(run, images) for run, images in parts))):
        latest |= {i: item[1] for i, item in enumerate(row) if item is not None}
        yield k, list(latest.values())


def parts_of(images: Tensor, max_batch: int | None) -> list[tuple[slice, Tensor]]:
    """The batch in parts of at most `max_batch` images, with their place in it."""
    size = max_batch or len(images)
    if len(images) <= size:
        return [(slice(0, len(images)), images)]
    places = [slice(first, first + size) for first in range(0, len(images), size)]
    return [(rows, images[rows]) for rows in places]
