"""Pictures through a purifier, batch by batch: what is in memory at a time, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coup_fast.cli import common
from coup_fast.cli.common import CommandError
from coup_fast.cli.fitting import Fit
from coup_fast.files import memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from coup_fast.purifier import Purifier


@dataclass
class Job:
    """The purifier with what applies to all of its batches.

    settings: all that decides a result, for reports and for the record of a folder.
    """

    purifier: Purifier
    fit: Fit
    device: torch.device
    draw: int
    batch_size: int
    progress: bool
    settings: dict[str, Any]

    def run(
        self,
        shapes: Sequence[tuple[int, ...]],
        ids: Sequence[int],
        read: Callable[[int], Tensor],
        parts: Sequence[range] | None = None,
    ) -> Iterator[Tensor]:
        """Purify pictures; yields them in order, [c, h, w] each in its own shape.

        shapes: (c, h, w) of each. ids: the sample id of each. read: the pixels [c, h, w] in [0, 1]
        of a picture by its number; called for the pictures of a batch when it begins. parts: the
        batches to purify, of those that `parts` returns; by default all.
        """
        import torch

        parts = self.parts(shapes) if parts is None else parts
        for rows in parts:
            self.check_memory(len(rows), *shapes[rows.start][1:])
        steps = self.purifier.plan.num_steps
        bar = common.progress_bar(
            len(parts) * steps, self.purifier.method, "step", shown=self.progress
        )
        with bar:
            for number, rows in enumerate(parts):

                def tell(step: int, total: int, before: int = number * steps) -> None:
                    bar.update(before + step * steps // total - bar.n)

                batch = torch.cat([self.fit.to_network(read(i)[None]) for i in rows])
                own = [ids[i] for i in rows]
                with torch.no_grad(), self._plain_errors(batch):
                    clean = self.purifier(batch.to(self.device), own, self.draw, progress=tell)
                for i, result in zip(rows, clean.cpu(), strict=True):
                    yield self.fit.from_network(result[None], shapes[i])[0]

    def choose_fast(self, pixels: Tensor, count: int) -> None:
        """Take the fastest setting for `count` pictures, measured on [n, c, h, w] in [0, 1]."""
        from coup_fast.benchmarking.fast_setting import fast_setting

        batch = self.fit.to_network(pixels).to(self.device)
        with common.plain_errors():
            found = fast_setting(self.purifier, batch, num_images=count)
        common.say(str(found))
        self.purifier = found.purifier
        self.settings["fast"] = found.options

    def be_as_fast(self, begun: dict[str, Any]) -> None:
        """Take the setting that a run of these settings chose when it began."""
        options = begun.get("fast")
        if isinstance(options, dict):
            with common.plain_errors():
                self.purifier = self.purifier.with_options(**options)
            self.settings["fast"] = options

    def check_memory(self, count: int, height: int = 1, width: int = 1) -> None:
        """Refuse a batch of pictures that does not fit into memory even before the network."""
        height, width = self.fit.height or height, self.fit.width or width
        size = 4 * count * self.fit.channels * height * width
        if size > memory():
            raise CommandError(
                f"{count} picture{'s' * (count != 1)} of {height}x{width} take {size / 2**30:.0f} "
                "GiB, more than the memory of this machine: choose a smaller --size or --batch-size"
            )

    @contextmanager
    def _plain_errors(self, batch: Tensor) -> Iterator[None]:
        """`common.plain_errors`; also of a network that cannot take a picture's own size."""
        try:
            with common.plain_errors():
                yield
        except (CommandError, RuntimeError) as error:
            if self.fit.height is not None:
                raise
            size = "x".join(map(str, batch.shape[2:]))
            raise CommandError(
                f"a network failed on {size}, the picture's own size (--size HxW --resize shows "
                f"it another): {' '.join(str(error).split())}"
            ) from error

    def parts(self, shapes: Sequence[tuple[int, ...]]) -> list[range]:
        """Positions of the batches: at most batch_size pictures, of one shape for the network."""
        parts: list[range] = []
        for i, shape in enumerate(shapes):
            last = parts[-1] if parts else range(0)
            fits = self.fit.height is not None or shape == shapes[i - 1]
            if parts and fits and len(last) < self.batch_size:
                parts[-1] = range(last.start, i + 1)
            else:
                parts.append(range(i, i + 1))
        return parts
