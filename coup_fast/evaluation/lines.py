"""A line of a report: a defence, an attack, and the numbers that they came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from coup_fast.attacks import Attack
from coup_fast.evaluation.config import Row
from coup_fast.evaluation.defences import UNDEFENDED
from coup_fast.evaluation.intervals import Proportion
from coup_fast.evaluation.metrics import Numbers

_NORMS = {"linf": "ℓ∞", "l2": "ℓ₂"}


def radius(attack: Attack) -> str:
    """The ball of an attack, as in "ℓ∞ 8/255"."""
    in_bytes = attack.eps * 255
    exact = attack.norm == "linf" and abs(in_bytes - round(in_bytes)) < 1e-9
    return f"{_NORMS[attack.norm]} {f'{round(in_bytes)}/255' if exact else f'{attack.eps:g}'}"


def marks(labels: Sequence[str], attacks: Sequence[Attack | None]) -> list[str]:
    """What tells attacks apart whose labels are alike: the options in which those differ."""
    alike: dict[str, list[Attack]] = {}
    for label, attack in zip(labels, attacks, strict=True):
        if attack is not None and attack not in alike.setdefault(label, []):
            alike[label].append(attack)
    found = []
    for label, attack in zip(labels, attacks, strict=True):
        names = [] if attack is None else [f.name for f in fields(attack)]
        told = [
            f"{name}={_value(getattr(attack, name))}"
            for name in names
            if any(getattr(one, name) != getattr(attack, name) for one in alike[label])
        ]
        found.append(f" ({', '.join(told)})" if told else "")
    return found


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


@dataclass(frozen=True)
class Line:
    """A row of the configuration with its numbers; attacked is None for clean images alone.

    curve: right under all of the first k draws, for k = 1 …, of attacked images if there are any.
    rounded: the same as attacked, of the images rounded to 8 bits. fidelity: means of what
    `coup_fast.evaluation.fidelity` measures of them; both None where nothing was measured.

    union: what the row's numbers join, where each image counts under the attack worst for it.
    mark: what tells the attack from another one of the report with the same label, of `marks`.
    """

    row: Row
    images: int
    clean: Numbers
    attacked: Numbers | None
    attack_run: dict[str, float | int] | None
    union: tuple[str, ...] = ()
    curve: tuple[Proportion, ...] = ()
    rounded: Numbers | None = None
    fidelity: dict[str, float | None] | None = None
    mark: str = ""

    @property
    def defence_label(self) -> str:
        """The defence's name; one that is not ours is marked, since less is known of it."""
        defence = self.row.defence
        return f"{defence.name} (foreign)" if defence.foreign else defence.name

    @property
    def attack_label(self) -> str:
        """The attack in words, weak ones marked."""
        attack = self.row.attack
        if self.union:
            ball = self.union[0].rpartition(", ")[2]
            return f"each image under the worst of these {len(self.union)}, {ball}"
        if attack is None:
            return "none"
        name = attack.kind if self.row.defence.method == UNDEFENDED else attack.name
        weak = "WEAK " if self.weakness else ""
        return f"{weak}{name}{self.mark}, {radius(attack)}"

    @property
    def weakness(self) -> str | None:
        """Why the attack says little about this defence; None for an honest one."""
        attack = self.row.attack
        plain = attack is None or self.row.defence.method == UNDEFENDED
        return None if plain or attack is None else attack.weakness
