"""The pictures of a folder: looked through, recorded, and shared by processes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from coup_fast.cli import common
from coup_fast.cli.batches import Job
from coup_fast.cli.common import CommandError
from coup_fast.cli.folders import RECORD, Record, find_images, make_folder
from coup_fast.cli.image_files import ImageFile, read_image, warn_of_loss
from coup_fast.files import FileError, lock

if TYPE_CHECKING:
    from torch import Tensor

    from coup_fast.evaluation.distributed import World

_PATIENCE = 86400.0  # seconds that processes wait for the last one
_LATER = "The finished results are kept: run the same command with --resume to go on."


def run_folder(
    args: argparse.Namespace, job: Job, broken: list[str], ranks: World
) -> tuple[int, int]:
    """Purify the pictures of a folder; returns the numbers of pictures and of clipped values.

    What is wrong with those that cannot be read is added to `broken`. Process 0 looks through the
    folder and begins its record, and then every process purifies each `ranks.size`-th batch. So the
    batches, and with them the bits, are those of one process.
    """
    from coup_fast.evaluation.state import differences

    with ExitStack() as stack:
        work = ranks.from_first(lambda: _begin(args, job, broken, stack))
        if work is None:
            return 0, 0  # process 0 says why
        if args.fast and ranks.rank:
            job.be_as_fast(work["settings"])
        record = Record(args.target, job.settings | _made_with(job))
        changed = differences(work["settings"], record.settings)
        if changed:
            raise CommandError(
                f"process {ranks.rank} has other models or versions than process 0: {changed[0]}"
            )
        shapes = [tuple(shape) for shape in work["shapes"]]
        own = job.parts(shapes)[ranks.rank :: ranks.size]
        counts = _purify(args, job, record, work["names"], shapes, own)
        found = [json.loads(message) for message in ranks.gather(json.dumps(counts))]
        if ranks.rank == 0:
            warn_of_loss([args.target / name for name in work["names"]])
    return sum(count for count, _ in found), sum(clipped for _, clipped in found)


def _begin(
    args: argparse.Namespace, job: Job, broken: list[str], stack: ExitStack
) -> dict[str, Any]:
    """Look through the folder, lock and begin the record; returns what there is to do."""
    source, target = args.source, args.target
    names = find_images(source, target, args.recursive)
    make_folder(target)
    if not args.resume:
        files = [target / name for name in names]
        common.refuse_to_overwrite([*files, target / RECORD], args.force)
    if args.fast:
        begun = Record(target, {}).begun_with() if args.resume else None
        if begun is None:
            _choose_fast(args, job, names)
        else:
            job.be_as_fast(begun)
    record = Record(target, job.settings | _made_with(job))
    stack.enter_context(lock(record.path))
    if args.resume:
        record.resume()
        todo = [name for name in names if not record.has(name)]
        common.say(f"{len(names) - len(todo)} of {len(names)} results are there")
    else:
        todo = names
    names, shapes = _looked_through(args, job, todo, broken)
    for name in names:
        make_folder((target / name).parent)
    record.begin()
    return {"names": names, "shapes": shapes, "settings": record.settings}


@contextmanager
def launched(job: Job) -> Iterator[World]:
    """The processes that share a folder; where they lose one another, a `CommandError`."""
    from coup_fast.evaluation.distributed import world
    from coup_fast.evaluation.state import EvaluationError

    try:
        with world(_PATIENCE, job.device, _LATER) as ranks:
            yield ranks
    except EvaluationError as error:
        raise CommandError(str(error)) from error


def _choose_fast(args: argparse.Namespace, job: Job, names: Sequence[str]) -> None:
    """`_choose_fast` on copies of the first picture that can be read: speed knows no content."""
    for name in names:
        try:
            picture = read_image(args.source / name, args.target / name, args.alpha, quiet=True)
        except FileError:
            continue  # told of when the folder is looked through
        job.fit.check(picture.pixels.shape, str(picture.source))
        copies = min(job.batch_size, len(names))
        job.choose_fast(picture.pixels[None].expand(copies, -1, -1, -1), len(names))
        return


def _looked_through(
    args: argparse.Namespace, job: Job, names: Sequence[str], broken: list[str]
) -> tuple[list[str], list[tuple[int, ...]]]:
    """The pictures that can be purified, and their shapes; nothing is kept of their pixels.

    So what needs another option is said before the first picture is purified.
    """
    good: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for name in names:
        source, target = args.source / name, args.target / name
        try:
            picture = read_image(source, target, args.alpha)
        except FileError as error:
            broken.append(str(error))
            continue
        job.fit.check(picture.pixels.shape, str(source))
        good.append(name)
        shapes.append(tuple(picture.pixels.shape))
    return good, shapes


def _made_with(job: Job) -> dict[str, Any]:
    """The models and versions that decide a result."""
    from coup_fast.evaluation.fingerprints import fingerprint
    from coup_fast.evaluation.provenance import package_versions

    versions = package_versions()
    return {
        "score_model": fingerprint(job.purifier.score_model),
        "classifier": fingerprint(job.purifier.classifier),
        "versions": {name: versions[name] for name in ("coup_fast", "torch")},
    }


def _purify(
    args: argparse.Namespace,
    job: Job,
    record: Record,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    parts: Sequence[range],
) -> tuple[int, int]:
    """Purify and write the pictures of these batches; returns as `run_folder`."""
    from coup_fast.integrations.pictures import picture_id

    pending: list[ImageFile] = []  # of the present batch

    def read(i: int) -> Tensor:
        picture = read_image(args.source / names[i], args.target / names[i], args.alpha, quiet=True)
        if tuple(picture.pixels.shape) != shapes[i]:
            raise FileError(f"{picture.source} was changed while the folder was being purified")
        picture.record = record
        pending.append(picture)
        return picture.pixels

    clipped = done = 0
    try:
        for purified in job.run(shapes, [picture_id(name) for name in names], read, parts):
            clipped += pending.pop(0).write(purified)
            done += 1
    except KeyboardInterrupt:
        total = sum(map(len, parts))
        common.say(f"{done} of {total} results are written; --resume continues from there")
        raise
    return done, clipped
