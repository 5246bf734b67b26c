"""What DiffPure's scripts keep on disk: checkpoints in pretrained/, pictures of the first runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coup_fast.files import whole_file, write_tensors
from coup_fast.schedules import DiscreteSchedule
from coup_fast.score_model import ScoreModel

CHECKPOINTS = {
    "score_sde": Path("pretrained/score_sde/checkpoint_8.pth"),
    "guided_diffusion": Path("pretrained/guided_diffusion/256x256_diffusion_uncond.pt"),
}
_COLUMNS, _GAP = 8, 2  # of a picture grid


def load_score_model(kind: str, config: Any, model_dir: str | Path | None) -> ScoreModel:
    """The network of a checkpoint in the place the scripts look for it, under the current folder.

    kind: a key of `CHECKPOINTS`, or "ddpm" (CelebA-HQ), which torch.hub keeps in its own folder.
    config: the scripts'; `model` holds guided-diffusion's flags, `diffusion` DDPM's betas.
    model_dir: another folder for the same file name.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    path = CHECKPOINTS[kind] if kind in CHECKPOINTS else hub / "celeba_hq.ckpt"
    if model_dir is not None:
        path = Path(model_dir) / path.name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; put the checkpoint in its place, or pass model_dir= or "
            "score_model="
        )
    if kind == "score_sde":
        from coup_fast.models.score_sde import load_score_sde

        return load_score_sde(path)
    if kind == "ddpm":
        from coup_fast.models.ddpm import load_ddpm

        betas = config.diffusion
        schedule = DiscreteSchedule.linear(
            betas.beta_start, betas.beta_end, betas.num_diffusion_timesteps
        )
        return load_ddpm(path, schedule=schedule)
    from coup_fast.models.guided_diffusion import load_guided_diffusion

    flags = vars(config.model) if hasattr(config, "model") else {}
    return load_guided_diffusion(path, dict(flags) or "imagenet256")


def grid(images: Tensor) -> Tensor:
    """Images [B, C, H, W] as one picture [C, h, w], eight in a row, two black pixels between."""
    count, channels, height, width = images.shape
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    picture = images.new_zeros(
        channels, rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP
    )
    for i in range(count):
        top = _GAP + i // columns * (height + _GAP)
        left = _GAP + i % columns * (width + _GAP)
        picture[:, top : top + height, left : left + width] = images[i]
    return picture


class RunFolder:
    """A folder for the pictures and tensors of a run; needs Pillow."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def picture(self, name: str, x: Tensor) -> None:
        """Save images [B, C, H, W] in [-1, 1] as one PNG."""
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError(
                "the pictures of a run need Pillow: pip install 'coup-fast[cli]', or pictures=False"
            ) from error
        values = grid(0.5 * x.detach().float().cpu() + 0.5).clamp(0, 1).mul(255).round()
        array = values.to(torch.uint8).permute(1, 2, 0).numpy()
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        with whole_file(self.path / f"{name}.png") as file:
            image.save(file, format="PNG")

    def tensor(self, name: str, x: Tensor) -> None:
        """Save images as a tensor."""
        write_tensors(self.path / f"{name}.pth", x.detach())
