"""What an evaluation consists of, from a dictionary or a TOML file; pure data, checked.

docs/evaluation.md shows a file with all its keys. Anything that can change a number is here and
becomes part of the identity of a run's state: the batch size too, because convolution libraries
choose their order of summation by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from coup_fast import checks, files
from coup_fast.attacks import PRESETS, WEAK_GRADIENTS, AdaptiveGuided, Attack, preset, units
from coup_fast.attacks.options import AttackGradient
from coup_fast.evaluation import reading
from coup_fast.evaluation.defences import UNDEFENDED, Defence, read_defences

SWEPT_BY_ATTACKS = ("eps", "eot", "steps")


@dataclass(frozen=True)
class Data:
    """Which images are evaluated.

    Args:
        name: what `coup_fast.data.Source` takes: "digits" (the held-out MNIST digits), "mnist",
            "fashion-mnist", "cifar10", "svhn", a folder of pictures, a .npz file with `images`
            [N, C, H, W] (uint8, or floats in [0, 1]) and `labels` [N], "huggingface:…" or
            "torchvision:…".
        images: how many, the first of a permutation by `seed`.
        seed: of that permutation.
        split: "report" or "validation" of the digits, "test" or "train" of the others; by default
            "report" and "test", and all images of a source without splits.
        folder: where the files of a named set are.
        size: (height, width) that images are resized to; None: as they are.
        color: "grey" or "rgb", which images are converted to; "": as they are.
    """

    name: str = "digits"
    images: int = 64
    seed: int = 0
    split: str = ""
    folder: str = ""
    size: tuple[int, int] | None = None
    color: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the report: a defence under an attack, or on clean images."""

    defence: Defence
    attack: Attack | None

    @property
    def name(self) -> str:
        """For progress and errors."""
        what = "clean images" if self.attack is None else self.attack.name
        return f"{self.defence.name}, {what}"


_TABLES = ("data", "rows", "compare")  # fields of the configuration that are no single value


@dataclass(frozen=True)
class EvalConfig:
    """The whole configuration of an evaluation; `from_dict` makes one from the tables of a file.

    Args:
        data: which images.
        models: "mnist" or "cifar10" (bundled), or "module:function" or "./file.py:function", a
            function that is called with "vp" or (for ADP) "ncsn" and returns (ScoreModel,
            classifier). Defences that name their own have those.
        rows: the work, in order: each a defence on clean images or under an attack.
        draws: how many fresh draws each image is classified under.
        batch_size: images at once.
        seed: of the defences' noise.
        threads: of each process.
        memory_budget: bytes that an attack's gradients may take at once.
        compare: pairs of defences' names that are compared image by image, stated before the run.
    """

    data: Data
    models: str
    rows: tuple[Row, ...]
    draws: int = 10
    batch_size: int = 16
    seed: int = 0
    threads: int = 1
    memory_budget: int = 2**31
    compare: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON and for the identity of a state."""
        rows = [
            {
                "defence": row.defence.as_dict(),
                "attack": None if row.attack is None else row.attack.as_dict(),
            }
            for row in self.rows
        ]
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TABLES}
        compare = [list(pair) for pair in self.compare]
        stated = {"compare": compare} if compare else {}
        return {**plain, "data": asdict(self.data), "rows": rows, **stated}

    def batches(self) -> list[range]:
        """Sample ids of each batch. They do not depend on the number of processes."""
        step, total = self.batch_size, self.data.images
        return [range(i, min(i + step, total)) for i in range(0, total, step)]


def _data(given: Any) -> Data:
    """The [data] table."""
    data = Data(**reading.known("[data]", given, [f.name for f in fields(Data)]))
    for name in ("name", "split", "folder", "color"):
        reading.text(f"{name} of [data]", getattr(data, name))
    return replace(
        data,
        images=checks.integer("images of [data]", data.images, 1),
        seed=checks.integer("seed of [data]", data.seed, 0),
        size=_size(data.size),
    )


def _size(given: Any) -> tuple[int, int] | None:
    """Height and width, of one number for a square or of two."""
    if given is None:
        return None
    sides = [given, given] if isinstance(given, int) else given
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise TypeError(f"size of [data] must be a number, or [height, width], got {given!r}")
    height, width = (checks.integer("each size of [data]", side, 1) for side in sides)
    return height, width


def _applies(attack: Attack, defence: Defence) -> bool:
    """Whether an attack says something about a defence that another one does not."""
    if attack.gradient in ("stopped", "unguided"):
        return defence.guided
    if defence.foreign:
        return not _needs_purifier(attack)
    honest = any(gradient not in WEAK_GRADIENTS for gradient in _gradients(attack))
    return defence.method != UNDEFENDED or (honest and attack.deviation == 0)


def _needs_purifier(attack: Attack) -> bool:
    """Whether a part of an attack can be asked for only where a purifier of ours is."""
    return attack.deviation > 0 or any(one in WEAK_GRADIENTS for one in _gradients(attack))


def _gradients(attack: Attack) -> tuple[AttackGradient, ...]:
    """The gradients that an attack takes of a defence without guidance."""
    if isinstance(attack, AdaptiveGuided):
        return tuple(attack.unguided().gradients)
    return (attack.gradient,)


def _for(attack: Attack, defence: Defence) -> Attack:
    """The attack as it runs on this defence, so that a row says what was done."""
    if isinstance(attack, AdaptiveGuided) and not defence.guided:
        attack = attack.unguided()
    return _on_classifier(attack) if defence.method == UNDEFENDED else attack


def _on_classifier(attack: Attack) -> Attack:
    """The attack on a classifier without a purifier, which has one gradient, draw and state."""
    own: dict[AttackGradient, None] = {
        "exact" if one in WEAK_GRADIENTS else one: None for one in _gradients(attack)
    }
    if isinstance(attack, AdaptiveGuided):
        attack = attack.replace(gradients=list(own))
    else:
        attack = attack.replace(gradient=next(iter(own)))
    return attack.replace(eot=1, draw_weights="uniform", deviation=0.0)


def met(row: Row, other: Row) -> bool:
    """Whether two rows are about one attack, as it runs on the defence of each."""
    one, another = row.attack, other.attack
    if one is None or another is None or one == another:
        return one == another
    ways = ((one, other.defence, another), (another, row.defence, one))
    return any(_known_to(a, defence) and _for(a, defence) == b for a, defence, b in ways)


def _known_to(attack: Attack, defence: Defence) -> bool:
    """Whether the attack means something for a defence; that on its classifier does for that."""
    bare = attack.gradient == "classifier" and defence.method == UNDEFENDED
    return bare or _applies(attack, defence)


def _rows(defences: list[Defence], tables: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    """Clean images for every defence, then every attack on every defence it applies to."""
    rows = [Row(defence, None) for defence in defences]
    for given in tables:
        if "preset" not in given:
            raise ValueError('an [[attack]] needs a preset, as in preset = "pgd40"')
        name = checks.choice("preset of [[attack]]", given["preset"], PRESETS)
        keys = [f.name for f in fields(PRESETS[name])]
        table = reading.known("[[attack]]", given, ["preset", "defences", *keys])
        targets = table.pop("defences", None)
        del table["preset"]
        if targets is not None:
            targets = reading.texts("defences of [[attack]]", targets)
        names = {d.name for d in defences} | {d.base for d in defences}
        for target in targets or ():
            checks.choice("each of defences of [[attack]]", target, sorted(names))
        for key in table.keys() & {"eps", "step_size"}:
            table[key] = units.numbers(key, table[key])
        for options, _ in reading.expand(table, SWEPT_BY_ATTACKS):
            attack = preset(name, **options)
            for defence in defences:
                wanted = targets is None or {defence.name, defence.base} & set(targets)
                if wanted and (targets is not None or _applies(attack, defence)):
                    if _needs_purifier(attack) and defence.foreign:
                        ways = "/".join(_gradients(attack))
                        what = "deviation" if attack.deviation else f"{ways} gradient"
                        raise ValueError(
                            f"attack {name!r} ({what}) needs a purifier of coup_fast, and "
                            f"{defence.name!r} is {defence.method}"
                        )
                    row = Row(defence, _for(attack, defence))
                    if row not in rows:
                        rows.append(row)
    return tuple(rows)


def _compared(tables: Iterable[Mapping[str, Any]], names: list[str]) -> tuple[tuple[str, str], ...]:
    """The pairs of defences that the [[compare]] tables name."""
    pairs: list[tuple[str, str]] = []
    for given in tables:
        table = reading.known("[[compare]]", given, ["a", "b"])
        if {*table} != {"a", "b"}:
            raise ValueError('a [[compare]] needs two names of defences, as in a = "X", b = "Y"')
        a, b = (checks.choice(f"{key} of [[compare]]", table[key], names) for key in ("a", "b"))
        if a == b:
            raise ValueError(f"a [[compare]] must name two defences, got {a!r} twice")
        if (a, b) in pairs or (b, a) in pairs:
            raise ValueError(f"[[compare]] names {a!r} and {b!r} twice; it would count as two")
        pairs.append((a, b))
    return tuple(pairs)


def from_dict(given: Mapping[str, Any]) -> EvalConfig:
    """The configuration that a dictionary describes, with the keys of a TOML file.

    Args:
        given: tables and values as docs/evaluation.md lists them; a list of `eps`, `eot`, `steps`,
            `t_star`, `num_steps` or `guidance_scale` becomes one row for each value.

    Raises:
        ValueError: a key or value is unknown or out of range; the message says what is possible.
        TypeError: a value is of the wrong kind.
    """
    plain = [f.name for f in fields(EvalConfig) if f.name not in _TABLES]
    known = [*plain, "data", "defence", "attack", "controls", "compare"]
    table = reading.known("the configuration", given, known)
    data = _data(table.get("data", {}))
    models = reading.text("models", table.get("models", "mnist"))
    defences = read_defences(
        reading.tables("defence", table.get("defence", [])),
        models if "models" in table else None,
        checks.flag("controls", table.get("controls", True)),
    )
    numbers = {
        name: checks.integer(name, table[name], low, high)
        for name, low, high in (
            ("draws", 1, None),
            ("batch_size", 1, None),
            ("seed", 0, None),
            ("threads", 1, checks.MAX_THREADS),
            ("memory_budget", 1, None),
        )
        if name in table
    }
    names = [defence.name for defence in defences]
    rows = _rows(defences, reading.tables("attack", table.get("attack", [])))
    compare = _compared(reading.tables("compare", table.get("compare", [])), names)
    return EvalConfig(data, models, rows, compare=compare, **numbers)


def read_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file, for `from_dict`.

    Raises:
        FileError: the file is not TOML; this is a ValueError.
        FileNotFoundError: there is no such file.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with files.reading(path, "TOML"):
        tables: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    return tables
