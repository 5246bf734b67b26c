"""Every file that the package writes appears whole or not at all, and destroys no other."""

from __future__ import annotations

import ast
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import digits
from helpers.scripts import ROOT
from PIL import Image

from coup_fast import files
from coup_fast.cli import main
from coup_fast.models.classifier import Classifier
from coup_fast.models.network_files import save_network
from coup_fast.training.trainer import TrainConfig, Trainer

QUICK = ("--set", "t_star=0.002")  # COUP in two steps


def picture(path: Path) -> Path:
    Image.fromarray((255 * digits(1)[0, 0]).astype(np.uint8)).save(path)
    return path


def trainer(checkpoint: Path) -> Trainer:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    return Trainer(
        network,
        lambda net, x, y, _: torch.nn.functional.cross_entropy(net(x), y),
        images,
        torch.tensor([0, 1, 0, 1]),
        TrainConfig(steps=2, batch_size=2, precision="float32"),
        checkpoint=checkpoint,
        progress=False,
    )


def write_picture(path: Path) -> None:
    source = path.parent / "source"
    source.mkdir(exist_ok=True)
    assert main(["purify", str(picture(source / "in.png")), str(path), *QUICK]) == 0


def write_array(path: Path) -> None:
    source = path.parent / "source"
    source.mkdir(exist_ok=True)
    np.save(source / "in.npy", digits(1))
    assert main(["purify", f"{source}/in.npy", str(path), *QUICK]) == 0


def write_network(path: Path) -> None:
    save_network(path, Classifier(1, size=8, width=4, hidden=8), {})


def write_plot(path: Path) -> None:
    assert main(["toy", "--samples", "10", "--plot", str(path)]) == 0


def write_json(path: Path) -> None:
    assert main(["info", "--json", str(path)]) == 0


WRITERS: dict[str, Callable[[Path], None]] = {
    "photo.png": write_picture,
    "batch.npy": write_array,
    "net.safetensors": write_network,
    "net.checkpoint": lambda path: trainer(path).save(),
    "toy.svg": write_plot,
    "info.json": write_json,
    "figures.pth": lambda path: files.write_tensors(path, torch.zeros(3)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_name_is_made_from_the_outputs_name(name: str, tmp_path: Path) -> None:
    """A user's own `photo.partial.png`, and what a planted link of such a name points to, stay."""
    path = tmp_path / name
    secret = tmp_path / "secret"
    secret.write_text("secret")
    beside = [f"{name}.partial", f"{path.stem}.partial{path.suffix}", f"{name}.tmp", f"{name}.new"]
    for i, other in enumerate(beside):
        if i % 2:
            (tmp_path / other).write_text("mine")
        else:
            (tmp_path / other).symlink_to(secret)
    (tmp_path / f"{path.stem}.partial.png").touch()
    before = {p.name for p in tmp_path.iterdir()} | {name, "source"}
    old = os.umask(0o027)
    try:
        WRITERS[name](path)
    finally:
        os.umask(old)
    assert secret.read_text() == "secret"
    for i, other in enumerate(beside):
        assert (tmp_path / other).read_text() == ("mine" if i % 2 else "secret")
    assert {p.name for p in tmp_path.iterdir()} <= before
    assert path.stat().st_mode & 0o777 == 0o640


def test_names_that_differ_by_partial_do_not_meet(tmp_path: Path) -> None:
    """A folder that holds a.png and a.partial.png lost one of its results."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "a.partial.png"):
        picture(source / name)
    assert main(["purify", str(source), str(target), *QUICK]) == 0
    assert {"a.png", "a.partial.png"} <= {p.name for p in target.iterdir()}


def test_a_link_at_the_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    files.write_text(tmp_path / "out", "mine")
    assert (tmp_path / "target").read_text() == "theirs"
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").read_text() == "mine"


def test_a_dangling_link_is_something_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.png").symlink_to(tmp_path / "nowhere.png")
    assert main(["purify", str(picture(tmp_path / "in.png")), f"{tmp_path}/out.png"]) == 2
    assert "--force" in capsys.readouterr().err


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half() -> None:
        with files.whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 100 bytes, as if no space were left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "x" * 1000),
        lambda path: files.write_tensors(path, torch.zeros(1000)),
        lambda path: trainer(path).save(),
        lambda path: write_network(path),
    ],
    ids=["text", "tensors", "checkpoint", "network"],
)
def test_a_full_disk_names_the_file(
    write: Callable[[Path], None], tmp_path: Path, full_disk: None
) -> None:
    with pytest.raises(OSError, match="too large") as caught:
        write(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named_by_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.write_text(tmp_path / "none" / "file", "text")
    assert caught.value.filename == str(tmp_path / "none" / "file")


# --- locks


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "out"
    program = (
        "import sys; from pathlib import Path; from coup_fast.files import lock\n"
        "with lock(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", program, str(path)]
    with files.lock(path):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"another process is writing it: '{path}'" in done.stderr
        with pytest.raises(BlockingIOError, match="another process"), files.lock(path):
            pass
    assert not list(tmp_path.iterdir())
    assert subprocess.run(command, check=False).returncode == 0


def test_locks_that_wait_let_nobody_in_twice(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")

    def count() -> None:
        for _ in range(50):
            with files.lock(path, wait=True):
                files.write_text(path, str(int(path.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "200"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]


def test_two_trainings_with_one_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.checkpoint"
    run = trainer(path)
    with files.lock(path), pytest.raises(BlockingIOError, match="another process") as caught:
        run.run()
    assert caught.value.filename == str(path)
    run.run()
    assert [p.name for p in tmp_path.iterdir()] == ["net.checkpoint"]


# --- everywhere


def test_nothing_in_the_package_writes_files_otherwise() -> None:
    """Calls that write to a path, outside of coup_fast/files."""
    writing = {"write_text", "write_bytes", "savefig", "save_file", "savez", "savez_compressed"}
    allowed = {  # to the open file of `whole_file`; checkpoint.py saves to memory first
        ("image_files.py", "savez_compressed"),
    }
    found = []
    for path in sorted((ROOT / "coup_fast").rglob("*.py")):
        if path.parent.name == "files":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            attribute = name.rpartition(".")[2]
            direct = attribute in writing and "." in name and (path.name, attribute) not in allowed
            given = [a.value for a in node.args if isinstance(a, ast.Constant)]
            modes = {letter for text in given if isinstance(text, str) for letter in text}
            opened = attribute in ("open", "fdopen") and bool(modes & set("wax+"))
            saved = name == "torch.save" and path.name != "checkpoint.py"
            if direct or opened or saved:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert sorted(line.rpartition(":")[0].rpartition(":")[0] for line in found) == [
        "coup_fast/cli/__init__.py",  # os.devnull
        "coup_fast/evaluation/state.py",  # its lock
    ], found
