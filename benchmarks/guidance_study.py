"""What guidance does: right labels that flip, attacked labels that stay, against λ = 0, paired.

    python benchmarks/guidance_study.py --data DIR --test TEST.npz --classifiers DIR --out study

benchmarks/guidance_study.toml states the settings, the tests and the families: a family is a pair
of models with its images. `--data` is the folder of CIFAR-10's files, `--test` a file of test
images, and `--classifiers` the folder of public_classifiers.py. `--models NAME=FILE.py:function`
gives a family other models, and `--only NAME` runs it alone, in a process beside others.

The images of a family are attacked in parts, and each part is purified under all settings before
the next begins. What is finished is in OUT at once, and the same command continues where it
stopped. OUT/report.json is written after each part, from the parts that every setting has finished,
and OUT/figures at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import guidance_counts as counts
import guidance_figures
import numpy as np
import public_classifiers
import torch
from guidance_config import Family, Study, chosen
from guidance_counts import Answers, Setting
from guidance_states import labels_along
from torch import Tensor
from tqdm import tqdm

from coup_fast import Purifier
from coup_fast.attacks import PGD
from coup_fast.data import Source, read_images
from coup_fast.evaluation.config import read_toml
from coup_fast.evaluation.provenance import environment, source_commit, write_json
from coup_fast.evaluation.sources import model_loader, tensor_digest
from coup_fast.files import append_text, lock, read_json, write_tensors, write_text
from coup_fast.malloc import keep_freed_memory
from coup_fast.reference import confidence_cotangent
from coup_fast.stiffness import stiffness
from coup_fast.training.data import load_data

CONFIG = Path(__file__).with_suffix(".toml")
Part = tuple[int, int]  # the first of its images, and the first that is not in it


class Log:
    """A file of finished units, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[tuple[Part, str], Any] = {}
        for line in self._whole_lines().splitlines():
            part, unit, content = json.loads(line)
            self._found[(part[0], part[1]), unit] = content

    def _whole_lines(self) -> str:
        """Without the half line of a process that was killed, or that is writing now."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return text[: text.rfind("\n") + 1]

    def begin(self) -> None:
        """Make the file ready for `add`; only for who holds the folder's lock."""
        write_text(self.path, self._whole_lines())

    def add(self, part: Part, unit: str, content: Any) -> None:
        """Keep what a unit came to."""
        append_text(self.path, json.dumps([part, unit, content]) + "\n")
        self._found[part, unit] = content

    def get(self, part: Part, unit: str) -> Any:
        """What it came to; None if it is not finished."""
        return self._found.get((part, unit))


class FamilyRun:
    """The work on a family, and what is finished of it."""

    def __init__(self, study: Study, family: Family, folder: Path) -> None:
        self.study, self.family, self.folder = study, family, folder
        starts = range(0, family.count, study.part)
        self.parts: list[Part] = [(i, min(i + study.part, family.count)) for i in starts]
        self.log = Log(folder / "units.jsonl")

    def load(self, images: Tensor, labels: Tensor) -> None:
        """Read the models, for these images [N, C, H, W] in [0, 1] with labels [N]."""
        self.images, self.labels = images, labels
        self.score_model, classifier = model_loader(self.family.models, torch.device("cpu"))("vp")
        if not isinstance(classifier, torch.nn.Module):
            given = type(classifier).__name__
            raise ValueError(
                f"{self.family.models} must return a module as classifier, got {given}"
            )
        self.classifier = classifier
        weights = [*self.score_model.state_dict().values(), *classifier.state_dict().values()]
        identity = {
            "rules": self.study.numbers,
            "family": {**asdict(self.family), "count": None},  # more images may be asked for later
            "networks": tensor_digest(*weights),
            "first image": tensor_digest(images[:1], labels[:1]),
        }
        path = self.folder / "identity.json"
        known = read_json(path) if path.exists() else None
        if known not in (None, identity):
            changed = [name for name in identity if known.get(name) != identity[name]]
            raise SystemExit(f"{self.folder} was begun with other {', '.join(changed)}; use --out")
        write_json(path, identity)
        self.log.begin()

    @cached_property
    def purifiers(self) -> dict[Setting, Purifier]:
        """Of each setting, in the study's precision."""
        base = Purifier(
            self.score_model,
            self.classifier,
            method="coup",
            seed=self.study.seed,
            precision=self.study.precision,
            num_steps=self.study.steps,
            solver=self.study.solver,
        )
        return {
            setting: base.with_options(
                t_star=setting.t_star,
                forward_noise=setting.forward_noise,
                guidance_scale=setting.scale,
                guidance_solver=setting.guidance_solver or "explicit",
            )
            for setting in self.study.settings
        }

    def ids(self, part: Part) -> Tensor:
        """The images' places in the data set, which name them to the noise."""
        return torch.arange(*part) + self.family.first

    def attacked(self, part: Part) -> Tensor:
        """The part's attacked images, which `bare` has made."""
        kept: Tensor = torch.load(self._attacked_file(part), weights_only=True)
        return kept

    def _attacked_file(self, part: Part) -> Path:
        return self.folder / f"attacked-{part[0]}-{part[1]}.pt"

    def says(self, images: Tensor) -> list[int]:
        """The classifier's labels for images."""
        with torch.no_grad():
            found: list[int] = self.classifier(images).argmax(1).tolist()
        return found

    def units(self, part: Part) -> dict[str, Callable[[], Any]]:
        """Everything there is to do for a part, by name; `bare` comes first."""
        study, begin = self.study, part[0]
        work: dict[str, Callable[[], Any]] = {"bare": partial(self._bare, part)}
        for setting in study.settings:
            work[str(setting)] = partial(self._purified, part, setting)
        if begin == 0:
            for setting in study.settings:
                if setting.scale:
                    work[f"stiff {setting}"] = partial(self._stiff, part, setting)
        if begin < study.states["images"]:
            for setting in chosen(study.states):
                work[f"states {setting}"] = partial(self._states, part, setting)
        if begin < study.check["images"] and study.precision != "fp32":
            for setting in chosen(study.check):
                work[f"check {setting}"] = partial(self._check, part, setting)
        return work

    def _bare(self, part: Part) -> dict[str, Any]:
        images, labels = self.images[slice(*part)], self.labels[slice(*part)]
        with torch.no_grad():
            logits = self.classifier(images)
        margin, _ = confidence_cotangent(logits, "margin")
        attack = PGD(loss="margin", eot=1, **self.study.attack)
        attacked = attack(self.classifier, images, labels, sample_ids=self.ids(part)).detach()
        write_tensors(self._attacked_file(part), attacked)
        return {
            "truth": labels.tolist(),
            "bare": logits.argmax(1).tolist(),
            "margin": margin.tolist(),
            "attacked": self.says(attacked),
            "commit": source_commit(),
        }

    def _purified(self, part: Part, setting: Setting) -> dict[str, list[int]]:
        purifier, ids = self.purifiers[setting], self.ids(part)
        kinds = {"clean": self.images[slice(*part)], "attacked": self.attacked(part)}
        with torch.no_grad():
            return {name: self.says(purifier(images, ids)) for name, images in kinds.items()}

    def _stiff(self, part: Part, setting: Setting) -> dict[str, Any]:
        some = slice(0, self.study.stiff_images)
        images, ids = self.images[slice(*part)][some], self.ids(part)[some]
        return stiffness(self.purifiers[setting], images, ids).as_dict()

    def _states(self, part: Part, setting: Setting) -> dict[str, dict[str, list[list[int]]]]:
        purifier, ids = self.purifiers[setting], self.ids(part)
        kinds = {"clean": self.images[slice(*part)], "attacked": self.attacked(part)}
        return {
            name: labels_along(purifier, images, ids, self.says) for name, images in kinds.items()
        }

    def _check(self, part: Part, setting: Setting) -> list[int]:
        purifier = self.purifiers[setting].with_options(precision="fp32")
        with torch.no_grad():
            return self.says(purifier(self.images[slice(*part)], self.ids(part)))

    @property
    def finished(self) -> list[Part]:
        """The parts of which nothing is missing."""
        return [
            part
            for part in self.parts
            if all(self.log.get(part, unit) is not None for unit in self.units(part))
        ]

    def answers(self) -> Answers:
        """Everything that the classifier said in the finished parts."""
        parts = self.finished

        def joined(unit: str, name: str) -> Any:
            return np.array([value for part in parts for value in self.log.get(part, unit)[name]])

        bare = {name: joined("bare", name) for name in ("truth", "bare", "margin", "attacked")}
        return Answers(
            **bare,
            clean={s: joined(str(s), "clean") for s in self.study.settings},
            purified={s: joined(str(s), "attacked") for s in self.study.settings},
        )

    def report(self) -> dict[str, Any]:
        """Of the finished parts, of which there is at least one."""
        study, parts = self.study, self.finished
        answers = self.answers()
        found = {
            "name": self.family.name,
            "models": self.family.models,
            "source": self.family.images,
            "first": self.family.first,
            "planned": self.family.count,
            "commits": sorted({str(self.log.get(p, "bare")["commit"]) for p in parts}),
            **counts.count(answers, study.tests["outcome"], study.tests["scales"], study.lowest),
        }
        for row in found["settings"]:
            setting = Setting(*(row[name] for name in Setting.__dataclass_fields__))
            row["stiffness"] = self.log.get(parts[0], f"stiff {setting}")
        found["states"], found["agreement"] = [], []
        for setting in chosen(study.states):
            seen = [self.log.get(part, f"states {setting}") for part in parts]
            steps = counts.along(answers, [labels for labels in seen if labels is not None])
            found["states"].append({**asdict(setting), **steps})
        for setting in chosen(study.check):
            found["agreement"].append({**asdict(setting), **self._agreement(setting)})
        return found

    def _agreement(self, setting: Setting) -> dict[str, Any]:
        """How the labels in the study's precision compare with those in fp32, on clean images."""
        bare, fast, exact = [], [], []
        for part in self.finished:
            if (labels := self.log.get(part, f"check {setting}")) is not None:
                bare.append(self.log.get(part, "bare"))
                fast += self.log.get(part, str(setting))["clean"]
                exact += labels
        return counts.agreement(bare, fast, exact)


def images_of(family: Family, data: Path | None, test: Path | None) -> tuple[Tensor, Tensor]:
    """The family's images, float32 in [0, 1], and their labels. ValueError if there are too few."""
    if family.images == "test" and test is not None:
        found = read_images(Source(str(test)))
    elif data is None:
        raise ValueError(f"{family.name} needs --data" + " or --test" * (family.images == "test"))
    elif family.images == "test":
        found = read_images(Source("cifar10", str(data)), "test")
    else:
        found = load_data(Source("cifar10", str(data)), "classifier").held_out
    rows = slice(family.first, family.first + family.count)
    if found.labels is None or len(found.images) < rows.stop:
        raise ValueError(f"{family.name} needs {rows.stop} labelled images")
    images = found.images[rows]
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images, found.labels[rows].long()


def write_report(study: Study, families: Sequence[Family], out: Path) -> dict[str, Any]:
    """OUT/report.json, of every family that has a finished part; and what it says."""
    runs = [FamilyRun(study, f, out / f.name) for f in families if (out / f.name).is_dir()]
    report = {
        "study": study.rules,
        "environment": environment(),
        "families": [run.report() for run in runs if run.finished],
    }
    text = json.dumps(report, allow_nan=False)
    short: dict[str, Any] = json.loads(text, parse_float=lambda x: float(f"{float(x):.6g}"))
    write_text(out / "report.json", json.dumps(short) + "\n")
    return short


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Study, list[Family]]:
    """The arguments, the configuration and its families, with what the arguments change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10's files")
    parser.add_argument("--test", type=Path, metavar="FILE", help="test images and labels, .npz")
    parser.add_argument("--classifiers", metavar="DIR", help="files of public_classifiers.py")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FILE.py:function")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families to run")
    parser.add_argument("--images", type=int, help="of each family, at most")
    arguments = parser.parse_args(argv)
    try:
        study = Study(**read_toml(arguments.config))
        families = [Family(**table) for table in study.family]
    except (TypeError, ValueError, FileNotFoundError) as error:
        parser.error(f"--config {arguments.config}: {error}")
    names = [family.name for family in families]
    other = dict(text.partition("=")[::2] for text in arguments.models)
    for option, given in (("--models", list(other)), ("--only", arguments.only or [])):
        if unknown := set(given) - set(names):
            parser.error(f"{option} names {', '.join(sorted(unknown))}; there are {names}")
    most = max(f.count for f in families) if arguments.images is None else arguments.images
    if most < 1:
        parser.error(f"--images must be at least 1, got {most}")
    families = [
        replace(f, models=other.get(f.name, f.models), count=min(f.count, most)) for f in families
    ]
    return arguments, study, families


def main(argv: Sequence[str] | None = None) -> int:
    arguments, study, families = parse(argv)
    if arguments.classifiers:
        os.environ[public_classifiers.FOLDER] = arguments.classifiers
    keep_freed_memory()
    warnings.filterwarnings("ignore", "explicit steps of guidance overshoot", UserWarning)
    for family in families:
        if arguments.only and family.name not in arguments.only:
            continue
        folder = arguments.out / family.name
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            run = FamilyRun(study, family, folder)
            try:
                run.load(*images_of(family, arguments.data, arguments.test))
            except (ValueError, FileNotFoundError) as error:
                raise SystemExit(f"{family.name}: {error}") from error
            for part in run.parts:
                work = run.units(part)
                todo = [unit for unit in work if run.log.get(part, unit) is None]
                title = f"{family.name}, images up to {part[1]} of {family.count}"
                for unit in tqdm(todo, desc=title, unit="unit", disable=not todo):
                    run.log.add(part, unit, work[unit]())
                if todo:
                    write_report(study, families, arguments.out)
    guidance_figures.draw(write_report(study, families, arguments.out), arguments.out / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
