"""What an evaluation is of: everything that its models compute with, and the code that computes."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import eval_models, tiny
from helpers.scripts import environment
from torch import Tensor, nn

import coup_fast
from coup_fast.evaluation import evaluate
from coup_fast.evaluation.config import from_dict
from coup_fast.evaluation.fingerprints import fingerprint
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.state import StateError

TABLES = eval_models.tables(
    4, defence=[{"method": "none"}], attack=[], draws=1, models="models_of_user:load"
)

MODULE = """
import coup_fast
from helpers import eval_models, tiny

def scale(score):
    return 1.0

def load(score):
    score_model, classifier = eval_models.load(score)
    return score_model, classifier
"""


class Classifier(nn.Module):
    """Holds one value of every kind that a module may hold beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.TinyClassifier()
        self.scale = 1.0
        self.mode = "plain"
        self.options = {"power": [1, 2], "names": {"a", "b", "c"}}
        self.table = np.arange(3)
        self.constant = torch.ones(2)
        self.act: Callable[[Tensor], Tensor] = functools.partial(torch.clamp, min=0.0)
        self.register_buffer("hidden", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.inner(x)
        return logits


def changed(change: Callable[[Any], object]) -> dict[str, Any]:
    model = Classifier()
    change(model)
    return fingerprint(model)


CHANGES: list[Callable[[Any], object]] = [
    lambda m: m.hidden.fill_(2.0),
    lambda m: m.inner.register_buffer("late", torch.ones(1), persistent=False),
    lambda m: m.constant.fill_(2.0),
    lambda m: setattr(m, "scale", 1.5),
    lambda m: setattr(m, "mode", "other"),
    lambda m: m.options["power"].append(3),
    lambda m: m.options["names"].add("d"),
    lambda m: setattr(m, "table", np.arange(3) + 1),
    lambda m: setattr(m, "act", functools.partial(torch.clamp, min=0.1)),
    lambda m: setattr(m, "act", torch.relu),
    lambda m: m.train(False),
    lambda m: m.register_forward_hook(lambda module, inputs, out: out * 2),
    lambda m: setattr(m, "forward", lambda x: m.inner(x) * 2),
    lambda m: next(m.parameters()).data.add_(1.0),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_every_value_of_a_module_counts(number: int) -> None:
    assert fingerprint(Classifier()) == fingerprint(Classifier())
    assert changed(CHANGES[number]) != fingerprint(Classifier())


def test_every_value_of_a_function_counts() -> None:
    def scaled(network: nn.Module, by: float) -> Callable[[Tensor], Tensor]:
        return lambda x: by * network(x)

    network = Classifier()
    assert fingerprint(scaled(network, 1.0)) == fingerprint(scaled(network, 1.0))
    assert fingerprint(scaled(network, 1.0)) != fingerprint(scaled(network, 2.0))
    assert fingerprint(scaled(network, 1.0)) != fingerprint(scaled(network.inner, 1.0))
    by_attribute = functools.partial(Classifier.forward, network)
    before, network.scale = fingerprint(by_attribute), 3.0
    assert fingerprint(by_attribute) != before
    assert set(before["code"]) == {"helpers.tiny", "test_identity"}


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    code = (
        "import json\n"
        "from coup_fast.evaluation.fingerprints import fingerprint\n"
        "from coup_fast import load_bundled\n"
        "from test_identity import Classifier\n"
        "print(json.dumps([fingerprint(m) for m in (*load_bundled('mnist'), Classifier())]))\n"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment(Path(__file__).parent, PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert json.loads(found[0])[0]["code"] == {}  # of this package, which has its own digest


def test_functions_without_a_file_are_told_apart() -> None:
    def function(source: str) -> Any:
        names: dict[str, Any] = {"__name__": "no_such_file"}
        exec(source, names)
        return names["f"]

    one, two = (fingerprint(function(f"def f(x):\n    return {k} * x\n")) for k in (3, 5))
    assert set(one["code"]) == {"no_such_file.f"}
    assert one != two
    assert one == fingerprint(function("\n\ndef f(x):\n    return 3 * x\n"))


def test_other_code_of_the_models_is_another_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "models_of_user.py"
    file.write_text(MODULE)

    def run() -> Report | None:
        sys.modules.pop("models_of_user", None)
        importlib.invalidate_caches()
        return evaluate(from_dict(TABLES), tmp_path / "out", data=eval_models.images(4))

    first = run()
    assert first is not None
    again = run()
    assert again is not None
    assert again.as_dict() == first.as_dict()
    file.write_text(MODULE.replace("return 1.0", "return 1.01"))
    with pytest.raises(StateError, match=r"loader\.models_of_user: .*, now "):
        run()


def test_other_values_of_the_models_are_another_evaluation(tmp_path: Path) -> None:
    def run(scale: float) -> Report | None:
        def load(score: str) -> tuple[coup_fast.ScoreModel, nn.Module]:
            classifier = Classifier()
            classifier.scale = scale
            return eval_models.load(score)[0], classifier

        tables = TABLES | {"models": "here"}
        return evaluate(from_dict(tables), tmp_path, models=load, data=eval_models.images(4))

    run(1.0)
    with pytest.raises(StateError, match=r"networks\.vp\.classifier\.values: .*, now "):
        run(-1.0)


def test_a_report_names_all_the_code_that_computed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = from_dict(TABLES), eval_models.images(4)
    code = {"commit": "aaaa", "sources": "1111"}
    module = sys.modules["coup_fast.evaluation.evaluate"]  # not the function of that name
    monkeypatch.setattr(module, "package_code", lambda: code)

    def stopping(line: str) -> None:
        if line.startswith("1/2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, tmp_path, models=eval_models.load, data=data, say=stopping)
    code = {"commit": None, "sources": "2222"}
    report = evaluate(config, tmp_path, models=eval_models.load, data=data)
    assert report is not None
    (note,) = (note for note in report.notes() if "different code" in note)
    assert "1 under commit aaaa, sources 1111; 1 under (installed), sources 2222" in note
    facts = report.run_facts("cpu", "command")
    assert facts["codes"] == {
        "commit aaaa, sources 1111": 1,
        "(installed), sources 2222": 1,
    }
    assert "commit aaaa, sources 1111 and (installed), sources 2222;" in report.markdown(facts)


def test_the_code_of_the_package_is_told_by_its_files(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "coup_fast"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(Path(coup_fast.__file__).parent, folder, ignore=ignored)
    code = "from coup_fast.evaluation.provenance import package_code; print(package_code())"

    def told() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    before = told()
    assert "'commit': None" in before
    assert told() == before
    with (folder / "evaluation" / "metrics.py").open("a") as file:
        file.write("# changed\n")
    assert told() != before
