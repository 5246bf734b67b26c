"""The defences of an evaluation: what each consists of, from the [[defence]] tables of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from coup_fast import checks, methods
from coup_fast.evaluation import reading
from coup_fast.purified_classifier import VOTES

UNDEFENDED = "none"
SWEPT_BY_DEFENCES = ("t_star", "num_steps", "guidance_scale")
# Arguments of a `Purifier` that are no options of a defence, and what decides them.
DECIDED_ELSEWHERE = {
    "method": "method of [[defence]]",
    "seed": "seed of the configuration",
    "score_model": "models of the configuration",
    "classifier": "models of the configuration",
}


@dataclass(frozen=True)
class Defence:
    """A purifier in front of the classifier.

    Args:
        name: in the table.
        method: a name in `coup_fast.methods`; "none" for the bare classifier; "module:function" for
            a defence that is not ours, from pixels to scores.
        options: of the `Purifier` and its method, or of that function.
        num_draws: purified copies for each prediction, as in `PurifiedClassifier`.
        vote: how they are combined, as in `PurifiedClassifier`.
        base: the name without the values that a sweep added to it.
        models: what its networks are, as `models` of the configuration says it for all; "": those.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_draws: int = 1
    vote: str = "logits"
    base: str = ""
    models: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `models` only where it is said, as states of older versions have none."""
        found = asdict(self)
        if not self.models:
            del found["models"]
        return found

    @property
    def foreign(self) -> bool:
        """Whether somebody else built it, as a function from pixels to scores."""
        return ":" in self.method

    def computes_as(self, other: Defence) -> bool:
        """Whether it differs from another one in nothing but its name; never if it is foreign."""
        alike = ("method", "num_draws", "vote", "models")
        if self.foreign or any(getattr(self, name) != getattr(other, name) for name in alike):
            return False
        usual = {} if self.method == UNDEFENDED else methods.options(self.method)
        return {**usual, **self.options} == {**usual, **other.options}

    @property
    def guided(self) -> bool:
        """Whether the classifier's confidence steers the purification."""
        if self.method == UNDEFENDED or self.foreign:
            return False
        scale = methods.options(self.method).get("guidance_scale", 0)
        return bool(self.options.get("guidance_scale", scale) != 0)


def read_defences(
    tables: Iterable[Mapping[str, Any]], models: str | None, controls: bool
) -> list[Defence]:
    """The defences of a file, in order, with names that differ.

    Args:
        tables: the [[defence]] tables.
        models: what the file says for all, which a defence may repeat; None: it says nothing.
        controls: add every classifier without a defence, and guided defences' twins without
            guidance.

    Raises ValueError or TypeError for a table that describes none.
    """
    defences = [defence for table in tables for defence in _of_table(table)]
    if not defences:
        raise ValueError("there is no [[defence]]; method = 'none' is the bare classifier")
    defences = [replace(one, models="") if one.models == models else one for one in defences]
    if controls:
        defences = _with_controls(defences)
    names = [defence.name for defence in defences]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two defences are called {', '.join(twice)}; give each a name")
    return defences


def _of_table(given: Mapping[str, Any]) -> list[Defence]:
    """The defences of one [[defence]] table; several where an option is a list."""
    keys = [f.name for f in fields(Defence) if f.name != "base"]
    table = reading.known("[[defence]]", given, keys)
    if "method" not in table:
        raise ValueError('a [[defence]] needs a method, as in method = "coup"')
    method = reading.text("method of [[defence]]", table["method"])
    models = _models(table) if "models" in table else ""
    if method == UNDEFENDED:
        more = sorted({*table} - {"name", "method", "models"})
        if more:
            raise ValueError(f"method 'none' is the bare classifier and takes no {', '.join(more)}")
        return [_bare(models, table.get("name"))]
    if ":" in method:
        return [_foreign(method, table)]
    known = methods.options(method)  # raises for an unknown method
    options = reading.table("options of [[defence]]", table.get("options", {}))
    for key, place in DECIDED_ELSEWHERE.items():
        if key in options:
            raise ValueError(f"{key} is no option of a defence: it is the {place}")
    name = reading.text("name of [[defence]]", table.get("name", method))
    num_draws = checks.integer("num_draws", table.get("num_draws", 1), 1)
    vote = checks.choice("vote", table.get("vote", "logits"), VOTES)
    swept = [key for key in SWEPT_BY_DEFENCES if key in known]
    return [
        Defence(name + suffix, method, one, num_draws, vote, name, models)
        for one, suffix in reading.expand(options, swept)
    ]


def _models(table: Mapping[str, Any]) -> str:
    name = reading.text("models of [[defence]]", table["models"])
    if not name:
        raise ValueError("models of [[defence]] is empty; leave it out for those of the file")
    return name


def _bare(models: str, name: object = None) -> Defence:
    """The classifier of these models without a defence; other models than the file's are named."""
    own = f"undefended, {models.rpartition(':')[2]}" if models else "undefended"
    name = own if name is None else reading.text("name of [[defence]]", name)
    return Defence(name, UNDEFENDED, base=name, models=models)


def _foreign(method: str, table: Mapping[str, Any]) -> Defence:
    """The defence of a function's name."""
    module, _, function = method.partition(":")
    if not function.isidentifier() or not all(map(str.isidentifier, module.split("."))):
        raise ValueError(f'method of [[defence]] must be "module:function", got {method!r}')
    more = sorted({*table} - {"name", "method", "options"})
    if more:
        does = "has its own networks" if more == ["models"] else "votes by itself"
        raise ValueError(f"method {method!r} {does} and takes no {', '.join(more)}")
    options = reading.table("options of [[defence]]", table.get("options", {}))
    name = reading.text("name of [[defence]]", table.get("name", function))
    return Defence(name, method, options, base=name)


def _with_controls(defences: list[Defence]) -> list[Defence]:
    """Every undefended classifier first, and every guided defence's twin without guidance."""
    result = list(defences)
    there = {one.models for one in defences if one.method == UNDEFENDED}
    needed = dict.fromkeys(one.models for one in defences if not one.foreign) or {"": None}
    result[:0] = [_bare(models) for models in needed if models not in there]
    for defence in [d for d in defences if d.guided]:
        name, base = (f"{of} without guidance (λ=0)" for of in (defence.name, defence.base))
        options = {**defence.options, "guidance_scale": 0.0}
        twin = replace(defence, name=name, base=base, options=options)
        if not any(known.computes_as(twin) for known in result):
            result.insert(result.index(defence) + 1, twin)
    return result
