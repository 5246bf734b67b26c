"""What a run writes while it runs: a table of numbers, strips of pictures, TensorBoard's files.

A folder gets `metrics.csv`, one row each time, and `strip-STEP.png`; where TensorBoard is
installed, its event files too. A run that resumes drops the rows that its checkpoint does not know.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coup_fast.files import FileError, reading, whole_file, write_text

_FIRST = ("step", "seconds", "loss")


class Log:
    """Writes what `measure` and `draw` find.

    Args:
        folder: it is made.
        measure: numbers of a network, by name, always the same names.
        draw: a picture [C, H, W] in [0, 1] of it; None: there is none.

    Raises:
        FileError: `metrics.csv` is there and is none of ours.
    """

    def __init__(
        self,
        folder: Path,
        measure: Callable[[nn.Module], dict[str, float]],
        draw: Callable[[nn.Module], Tensor] | None = None,
    ) -> None:
        self.folder, self.measure, self.draw = folder, measure, draw
        self.table = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self._board: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Keep the rows of earlier runs up to a step."""
        if self.table.exists():
            with reading(self.table, "metrics of coup-fast train"):
                rows = list(csv.DictReader(self.table.read_text(encoding="utf-8").splitlines()))
                if rows and not set(_FIRST) <= rows[0].keys():
                    raise FileError(f"{self.table} is no table of coup-fast train: move it away")
                self.rows = [row for row in rows if int(row["step"]) <= step]
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder), purge_step=step + 1)

    def write(self, step: int, seconds: float, loss: float, network: nn.Module) -> str:
        """Measure a network, write what was found, and say it in a few words."""
        found = self.measure(network)
        row: dict[str, Any] = {"step": step, "seconds": round(seconds, 1), "loss": loss, **found}
        self.rows.append(row)
        text = io.StringIO()
        columns = list(dict.fromkeys(key for one in self.rows for key in one))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.table, text.getvalue())
        picture = None if self.draw is None else self.draw(network)
        if picture is not None:
            _write_picture(self.folder / f"strip-{step:07d}.png", picture)
        if self._board is not None:
            for name, value in {"loss": loss, **found}.items():
                self._board.add_scalar(name.replace(", ", "/"), value, step)
            if picture is not None:
                self._board.add_image("strip", picture, step)
            self._board.flush()
        return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def _write_picture(path: Path, pixels: Tensor) -> None:
    from PIL import Image

    from coup_fast.integrations.pictures import to_whole_numbers

    array = to_whole_numbers(pixels)[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3])
    with whole_file(path) as file:
        image.save(file, format="PNG")
