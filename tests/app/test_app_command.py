"""`coup-fast app`: its options, and the networks that the page gets."""

from __future__ import annotations

import socket
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.commands import fails
from helpers.scripts import environment

from coup_fast.app import server
from coup_fast.app.bench import Bench
from coup_fast.cli import app, main
from coup_fast.models import Classifier, UNet, save_network
from coup_fast.models.bundled import bundled_settings

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")


def served(monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[Bench, str]:
    """The networks and the address that a command line serves, without serving them."""
    found = []

    def serve(bench: Bench, listener: socket.socket) -> None:
        found.append((bench, listener.getsockname()[0]))

    monkeypatch.setattr(server, "serve", serve)
    assert main(["app", "--port", "0", "--device", "cpu", *map(str, words)]) == 0
    return found[0]


@needs_gradio
def test_the_page_is_for_this_machine_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, address = served(monkeypatch)
    assert address == "127.0.0.1"
    assert "warning" not in capsys.readouterr().err


@needs_gradio
def test_another_address_brings_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, address = served(monkeypatch, "--host", "0.0.0.0")
    assert address == "0.0.0.0"
    (warning,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("warning")]
    assert "0.0.0.0" in warning
    assert "no password" in warning


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.0.0.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.0.2", False), ("example.org", False)),
    ],
)
def test_what_loopback_is(host: str, loopback: bool) -> None:
    assert app._is_loopback(host) == loopback


@needs_gradio
def test_a_port_in_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = fails(capsys, "app", "--port", port)
    assert f"--port {port}: " in message
    assert "another --port" in message
    assert main(["app", "--port", "65536"]) == 2
    assert "argument --port: " in capsys.readouterr().err


def test_without_gradio_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "gradio is not installed: pip install 'coup-fast[app]'" in fails(capsys, "app")


def test_nothing_of_the_page_is_loaded_by_other_commands() -> None:
    program = (
        "import sys; from coup_fast.cli import main; main(['info']); "
        "assert not [m for m in sys.modules if m.startswith(('gradio', 'coup_fast.app'))]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


@needs_gradio
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_bundled_networks_come_with_their_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = served(monkeypatch, "--bundled", name)
    chosen = bundled_settings(name)
    radius, sign, levels = bench.epsilon.partition("/")
    assert float(radius) / float(levels if sign else 1) == chosen["epsilon"]
    assert "adp" in bench.methods
    for method, options in chosen["methods"].items():
        assert {n: v for n, v in bench.start(method).items() if n in options} == options
    assert len(bench.classes) == 10


@needs_gradio
def test_own_networks_are_taken_by_the_options_of_purify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    score, classifier = tmp_path / "score.safetensors", tmp_path / "classifier.safetensors"
    save_network(score, UNet(3, (8,)), {"kind": "eps"})
    save_network(classifier, Classifier(3, 4, size=8), {})
    bench, _ = served(monkeypatch, "--score", score, "--classifier", classifier, "--size", "8")
    assert bench.size == (8, 8)
    assert bench.channels == 3
    assert bench.class_name(2) == "class 2"
    assert bench.settings == {}
    assert str(score) in bench.name
    result = bench.purifier("coup", {"num_steps": 2}, 0, (3, 8, 8))(tiny.images(1))
    assert result.shape == (1, 3, 8, 8)
    alone, _ = served(monkeypatch, "--score", score)
    assert alone.classifier is None
    mixed, _ = served(monkeypatch, "--classifier", classifier)
    assert mixed.class_name(2) == "class 2"  # nobody said that it knows digits
    assert "missing.safetensors does not exist" in fails(
        capsys, "app", "--port", 0, "--score", tmp_path / "missing.safetensors"
    )


def test_its_options_are_those_of_purify() -> None:
    """Networks are named the same way by both commands."""
    from coup_fast.cli import purify

    def options(module: object) -> Namespace:
        parser = ArgumentParser()
        module.add_arguments(parser)  # type: ignore[attr-defined]
        return Namespace(**{a.dest: a.default for a in parser._actions})

    ours, theirs = vars(options(app)), vars(options(purify))
    shared = {"bundled", "score", "score_format", "score_config", "classifier", "size", "device"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
