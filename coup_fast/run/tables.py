"""A plan's numbers on a device, and a run's noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coup_fast.plan import AnyPlan, start_row
from coup_fast.score_model import in_network_units


class RowTable(Protocol):
    """What can be asked for its rows: a tensor, a tuple of them, or a look-up on the device."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Noise:
    """A run's noise tensors, numbered in order of need: generated from keys, or given."""

    keys: RowTable | None = None  # int64 [M, B, 2]
    tensors: Tensor | None = None  # [M, B, C, H, W]

    def at(self, index: int | None) -> tuple[Tensor | None, Tensor | None]:
        """(keys, noise) of noise tensor `index` as the operators take them; None: no noise."""
        if index is None:
            return None, None
        keys = None if self.keys is None else self.keys[index]
        return keys, None if self.tensors is None else self.tensors[index]

    def of(self, images: slice) -> Noise:
        """The noise of these images of the batch."""
        keys = None if self.keys is None else self.keys[:, images]
        return Noise(keys, None if self.tensors is None else self.tensors[:, images])


@dataclass(frozen=True)
class Tables:
    """A plan's numbers on a device, one row each."""

    start: Tensor  # [8], perturb
    pixel_map: Tensor  # [8], perturb: the attacked image in diffusion space
    rows: RowTable  # reverse_step [19] each, or adaptive_step [8] each
    look_ahead: Tensor | None  # reverse_step [19]: x + δ m, ADP's second point
    times: RowTable  # [1] each, as the network is called with them; nan where the row calls none


def tables_of(
    plan: AnyPlan, device: torch.device, dtype: torch.dtype, time_scale: float = 1.0
) -> Tables:
    """The plan's tables, rounded once from float64 to the state's dtype.

    time_scale: of the `ScoreModel` that will be called at these times.
    """

    def host(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")

    def put(values: object) -> Tensor:
        return host(values).to(dtype).to(device)

    times = in_network_units(host(plan.times).reshape(-1, 1), time_scale, dtype).to(device)
    return Tables(
        start=put(plan.start),
        pixel_map=put(start_row()),
        rows=put(plan.coeffs).unbind(0),
        look_ahead=None if plan.look_ahead is None else put(plan.look_ahead),
        times=times.unbind(0),
    )
