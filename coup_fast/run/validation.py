"""What callers hand to the purifier, checked before any network is called.

One sentence per mistake: what is wrong, what was got, what to do. Only `check_values` waits for
the device, once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coup_fast import checks
from coup_fast._torch.modules import declared_channels, first_parameter
from coup_fast._torch.transforms import refuse_transforms
from coup_fast.run.sample_ids import content_ids
from coup_fast.schedules import DiscreteSchedule, FlowSchedule
from coup_fast.score_model import ScoreModel

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RANGE_TOLERANCE = 1e-4  # rounding of callers' own pixel maps, not a licence to leave [0, 1]


def check_times(times: NDArray[np.float64], t_max: float | None, method: str) -> None:
    """A plan's network times [N] (nan: no call) are among those trained for. ValueError."""
    if t_max is None or np.isnan(times).all():
        return
    latest = float(np.nanmax(times))
    if latest > t_max + 1e-6:  # room for the rounding of a time grid
        raise ValueError(
            f"{method} with these options calls the score model at t = {latest:g}; it was trained "
            f"for t up to {t_max:g} (t_max): use a smaller t_star, or another model"
        )


def check_whole_times(times: NDArray[np.float64], score_model: ScoreModel, method: str) -> None:
    """A plan's times [N] are whole numbers for a network that takes such. ValueError."""
    dtype, schedule = score_model.time_dtype, score_model.schedule
    if dtype is None or dtype.is_floating_point:
        return
    asked = times[np.isfinite(times)] * score_model.time_scale
    broken = asked[np.abs(asked - np.rint(asked)) > 1e-3]
    if len(broken) == 0:
        return
    cure = "describe a network of N indices by schedule=DiscreteSchedule() and time_scale=N"
    if isinstance(schedule, DiscreteSchedule):
        cure = (
            f"this schedule has {schedule.num_steps} indices, so use "
            f"time_scale={schedule.num_steps}"
            if score_model.time_scale != schedule.num_steps
            else "take steps that end at them, or a schedule without exact_index=True"
        )
    elif isinstance(schedule, FlowSchedule):
        cure = "a flow is asked at all times between them, so leave time_dtype out"
    raise ValueError(
        f"{method} with these options calls the score model at time {broken[0]:g}, and "
        f"time_dtype={dtype} takes whole numbers: {cure}"
    )


def check_images(images: Any) -> None:
    """images: [B, C, H, W], floating, strided; TypeError or ValueError otherwise.

    RuntimeError inside transforms that a run cannot follow (`coup_fast._torch.transforms`).
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor, got {type(images).__name__}")
    if images.dtype not in IMAGE_DTYPES:
        hint = "; divide 8-bit images by 255" if images.dtype == torch.uint8 else ""
        raise TypeError(
            f"images must be float32, float16, bfloat16 or float64, got {images.dtype}{hint}"
        )
    if images.ndim != 4:
        hint = "; add the batch dimension with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"images must be [B, C, H, W], got shape {list(images.shape)}{hint}")
    if images.layout != torch.strided:
        raise TypeError(f"images must be a dense tensor, got layout {images.layout}")
    refuse_transforms(images)


def check_values(images: Tensor) -> None:
    """Pixels in [0, 1] and no NaN, in one reduction and one wait. Raises ValueError."""
    if images.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if low != low or high != high:
        raise ValueError("images contain NaN")
    if low < -RANGE_TOLERANCE or high > 1.0 + RANGE_TOLERANCE:
        raise ValueError(
            f"images must be pixels in [0, 1], got values from {low:g} to {high:g}; map them "
            "first ((images + 1) / 2 for [-1, 1], images / 255 for 8 bits)"
        )


def check_model(name: str, function: Any, images: Tensor) -> None:
    """The model's device and, where it declares them, channels fit the images. ValueError."""
    parameter = first_parameter(function)
    if parameter is not None and parameter.device not in (images.device, torch.device("meta")):
        raise ValueError(
            f"images are on {images.device} and the {name} is on {parameter.device}; "
            "move one to the other"
        )
    check_channels(name, function, images)


def check_channels(name: str, function: Any, images: Tensor) -> None:
    """The channels that the model declares, if it does, are the images'. ValueError."""
    channels = declared_channels(function)
    if channels is not None and channels != images.shape[1]:
        last = images.ndim == 4 and images.shape[3] == channels
        raise ValueError(
            f"the {name} takes images of {channels} channels, got {images.shape[1]} "
            f"(images {list(images.shape)})"
            + ("; [B, C, H, W] is wanted: images.permute(0, 3, 1, 2)" if last else "")
        )


def sample_ids_of(images: Tensor, sample_ids: Any) -> Tensor:
    """Sample ids as int64 [B] on the images' device.

    None means position in the batch, "content" a hash of each image (`content_ids`).
    """
    if sample_ids is None:
        return torch.arange(len(images), device=images.device)
    if isinstance(sample_ids, str):
        checks.choice("sample_ids that are a word", sample_ids, ("content",))
        return content_ids(images)
    return checks.ids("sample_ids", sample_ids, len(images), images.device)


def check_labels(labels: Any, images: Tensor) -> None:
    """labels: int64 [B], on the images' device; TypeError or ValueError otherwise."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor [{len(images)}], got {labels!r}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"labels must be int64 [{len(images)}], got {got}")
    if labels.device != images.device:
        raise ValueError(f"labels are on {labels.device}, images are on {images.device}")


def check_classes(labels: Tensor, scores: Tensor) -> None:
    """Every label is a class of the scores [B, K]; waits for the device once. ValueError."""
    if bool(((labels < 0) | (labels >= scores.shape[1])).any()):
        raise ValueError(
            f"labels must be in [0, {scores.shape[1] - 1}] for scores of {scores.shape[1]} "
            f"classes, got {labels.tolist()}"
        )


def check_noise(noise: Any, needed: int, images: Tensor, method: str) -> None:
    """noise: [>= needed, B, C, H, W] on the images' device, no wider than the state."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a torch tensor, got {type(noise).__name__}")
    want = f"[{needed}, {', '.join(map(str, images.shape))}]"
    if noise.ndim != 5 or noise.shape[1:] != images.shape:
        raise ValueError(
            f"noise must be [num_draws, B, C, H, W], {want} for {method}, got {list(noise.shape)}"
        )
    if noise.shape[0] < needed:
        raise ValueError(
            f"{method} needs {needed} noise tensors with these options, noise holds "
            f"{noise.shape[0]}; it must be {want}"
        )
    widest = images.dtype == torch.float64
    if noise.dtype not in IMAGE_DTYPES or (noise.dtype == torch.float64 and not widest):
        allowed = "float32, float16 or bfloat16 (float64 for float64 images)"
        raise TypeError(f"noise must be {allowed}, got {noise.dtype}")
    if noise.device != images.device:
        raise ValueError(f"noise is on {noise.device}, images are on {images.device}")
