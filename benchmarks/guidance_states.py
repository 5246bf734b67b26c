"""What a classifier says of each state of a purification, and of what the network takes it for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coup_fast import Purifier
from coup_fast._torch.frozen import frozen_parameters
from coup_fast.methods.network_and_guidance import eps_of
from coup_fast.plan import Plan, Prediction, V, W, network_row
from coup_fast.run.loop import states
from coup_fast.run.steps import State


def denoising(purifier: Purifier) -> list[tuple[float, float]]:
    """(v, w) of each step k: the denoised image is x̂0 = v x + w m, m the network's output.

    For plans whose steps all call the network, as those of COUP do.
    """
    plan, model = purifier.plan, purifier.score_model
    assert isinstance(plan, Plan)
    found = []
    for time in plan.times.tolist():
        alpha_bar = float(model.schedule.alpha_bar_told(time))  # type: ignore[union-attr]
        noise_in = eps_of(model.schedule, model.kind, time)
        row = network_row(Prediction(x0=1.0), alpha_bar, model.kind, noise_in)
        found.append((float(row[V]), float(row[W])))
    return found


def labels_along(
    purifier: Purifier, images: Tensor, ids: Tensor, says: Callable[[Tensor], list[int]]
) -> dict[str, list[list[int]]]:
    """The labels along the run `purifier(images, ids)`.

    Args:
        purifier: of a method whose state is 2u - 1 until its last step maps it to pixels.
        images: [B, C, H, W] pixels in [0, 1].
        ids: [B], their sample ids.
        says: pixels to labels.

    Returns:
        state: of the state before each step, and of the result; [steps + 1][B].
        denoised: of the denoised image x̂0 at each step; [steps][B].
    """
    run = purifier.prepare(images, ids)
    rows = denoising(purifier)
    found: dict[str, list[list[int]]] = {"state": [], "denoised": []}

    def watched(k: int, state: State, attacked: Tensor | None) -> State:
        evaluated = run.evaluate(k, state[0])
        (v, w), output = rows[k], evaluated[0]
        assert output is not None
        denoised = v * state[0] + w * output
        for name, x in (("state", state[0]), ("denoised", denoised)):
            found[name].append(says(0.5 * x + 0.5))
        return run.advance(k, state, evaluated, attacked)

    with frozen_parameters(*run.models), run.calls.flags(), torch.no_grad():
        for _, state in states(run, images, watched):
            last = state[0]
    found["state"].append(says(last))
    return found
