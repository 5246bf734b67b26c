"""`coup-fast purify` of folders: nothing is left out in silence, and no two runs are mixed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import digits, fails
from PIL import Image
from torch import Tensor

from coup_fast.cli import folder_run, main
from coup_fast.cli.folders import RECORD
from coup_fast.cli.image_files import ImageFile
from coup_fast.files import lock
from coup_fast.integrations.pictures import picture_id

QUICK = ("--set", "num_steps=1", "--set", "t_star=0.001")


def picture(path: Path, row: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * digits(4)[row, 0]).astype(np.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name)
    return tmp_path / "in"


def purify(source: Path, target: Path, *options: str) -> int:
    words = ["purify", str(source), str(target), "--batch-size", "1", *QUICK]
    return main([*words, *options])


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the record."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


# --- what is in a folder


def test_sub_folders_are_not_left_out_in_silence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    picture(source / "deep" / "er" / "a.png", 1)
    (source / "notes").mkdir()
    (source / "notes" / "text.txt").write_text("no picture")
    sentence = fails(capsys, "purify", source, out, *QUICK)
    assert "1 picture in sub-folders (deep)" in sentence
    assert "--recursive" in sentence
    assert not out.exists()
    assert purify(source, out, "--no-recursive") == 0
    assert "1 picture in sub-folders left out" in capsys.readouterr().err
    assert list(results(out)) == ["a.png", "b.png"]
    deep = tmp_path / "deep"
    assert purify(source, deep, "--recursive") == 0
    assert list(results(deep)) == ["a.png", "b.png", "deep/er/a.png"]
    assert purify(source, deep, "--recursive", "--resume") == 0
    assert "3 of 3 results are there" in capsys.readouterr().err


def test_results_inside_the_folder_are_no_pictures_of_it(source: Path) -> None:
    assert purify(source, source / "clean") == 0
    assert purify(source, source / "clean", "--resume") == 0
    assert purify(source, source / "clean", "--recursive", "--force") == 0
    assert list(results(source / "clean")) == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["o.npz", "o.npy", "o.png", "o.JPG"])
def test_a_folder_is_not_called_like_a_file(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ending of a file" in fails(capsys, "purify", source, tmp_path / name, *QUICK)
    assert not (tmp_path / name).exists()


def test_one_broken_file_does_not_stop_the_others(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (source / "a.png").read_bytes()
    (source / "0.png").write_text("no picture")
    (source / "aa.png").write_bytes(content[: len(content) // 2])
    assert purify(source, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"left out: {source / '0.png'} is not an image" in message
    assert f"left out: {source / 'aa.png'} cannot be read" in message
    assert "2 of 4 pictures could not be read" in message
    assert list(results(tmp_path / "out")) == ["a.png", "b.png"]
    assert purify(source, tmp_path / "skipped", "--skip-broken") == 0
    assert "left out:" in capsys.readouterr().err
    assert results(tmp_path / "skipped") == results(tmp_path / "out")
    (source / "0.png").write_bytes(content)
    assert purify(source, tmp_path / "out", "--resume", "--skip-broken") == 0
    assert list(results(tmp_path / "out")) == ["0.png", "a.png", "b.png"]


def test_options_that_are_for_folders(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--recursive", "--skip-broken"):
        words = ("purify", source / "a.png", tmp_path / "o.png", option)
        assert f"{option} is for a folder" in fails(capsys, *words)


# --- whose results


@pytest.mark.parametrize("options", [(), ("--resume",), ("--force",)])
def test_in_and_out_are_two_folders(
    options: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", source / ".." / "in"):
        assert "the same folder" in fails(capsys, "purify", source, target, *QUICK, *options)


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_in_and_out_are_two_files(
    options: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that is purified onto itself would be purified again by the next run."""
    path, linked = source / "a.png", tmp_path / "linked.png"
    linked.symlink_to(path)
    content = path.read_bytes()
    for target in (path, linked, source / ".." / "in" / "a.png", source):
        sentence = fails(capsys, "purify", path, target, *QUICK, *options)
        assert "IN and OUT are the same file" in sentence
    assert path.read_bytes() == content


def test_pictures_added_since_change_nobodys_noise(source: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert purify(source, out, "--resume") == 0  # with nothing there yet
    picture(source / "0.png", 1)
    picture(source / "aa.png")
    assert purify(source, out, "--resume") == 0
    assert purify(source, whole) == 0
    assert results(out) == results(whole)
    assert results(out)["aa.png"] != results(out)["a.png"]  # of the same pixels
    assert len({picture_id(name) for name in ("a.png", "aa.png", "a/a.png")}) == 3
    assert picture_id("a.png") == 0x3F83891AC02FDFAC


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "1"), "seed: 0, now 1"),
        (("--draw", "1"), "draw: 0, now 1"),
        (("--method", "diffpure"), "method: 'coup', now 'diffpure'"),
        (("--set", "guidance_scale=0"), "options.guidance_scale"),
        (("--alpha", "keep"), "alpha"),
    ],
)
def test_results_of_other_settings_are_not_mixed_in(
    options: tuple[str, ...],
    words: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert purify(source, out) == 0
    (out / "b.png").unlink()
    kept = results(out)
    capsys.readouterr()
    assert words in fails(capsys, "purify", source, out, *QUICK, "--resume", *options)
    assert results(out) == kept


def test_other_models_and_versions_are_not_mixed_in(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert purify(source, out) == 0
    first, *rest = (out / RECORD).read_text().splitlines()
    assert len(rest) == 2
    for name in ("score_model", "classifier", "versions"):
        header = json.loads(first)
        header["settings"][name] = "another"
        (out / RECORD).write_text("\n".join([json.dumps(header), *rest]))
        capsys.readouterr()
        assert f"{name}: 'another'" in fails(capsys, "purify", source, out, *QUICK, "--resume")


def test_results_that_nobody_knows_are_not_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    picture(out / "a.png", 2)
    assert RECORD in fails(capsys, "purify", source, out, *QUICK, "--resume")
    assert purify(source, out, "--force") == 0
    picture(out / "a.png", 2)
    capsys.readouterr()
    sentence = fails(capsys, "purify", source, out, *QUICK, "--resume")
    assert f"a.png is there, and not as {RECORD} says" in sentence
    (out / "a.png").unlink()
    (out / "b.png").unlink()
    capsys.readouterr()
    sentence = fails(capsys, "purify", source, out, *QUICK)  # a record alone is of another run
    assert RECORD in sentence


def test_a_record_that_was_cut_off_or_is_none(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert purify(source, out) == 0
    whole = results(out)
    record = (out / RECORD).read_text()
    (out / "b.png").unlink()
    (out / RECORD).write_text(record[:-20])  # killed while it wrote a line
    assert purify(source, out, "--resume") == 0
    assert results(out) == whole
    assert purify(source, out, "--resume") == 0  # the half line is gone
    for text in ("", "[1]", "{}", "[" * 100_000):
        (out / RECORD).write_text(text)
        capsys.readouterr()
        assert RECORD in fails(capsys, "purify", source, out, *QUICK, "--resume")


def test_two_runs_do_not_share_a_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock(out / RECORD):
        assert purify(source, out) == 1
    assert "another process is writing it" in capsys.readouterr().err
    assert purify(source, out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", RECORD]


# --- how much of it is in memory


def test_a_folder_is_read_batch_by_batch(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("c.png", "d.png", "e.png"):
        picture(source / name)
    events: list[str] = []
    read, write = folder_run.read_image, ImageFile.write

    def reading(path: Path, target: Path, alpha: str | None, *, quiet: bool = False) -> ImageFile:
        events.append(f"{'read' if quiet else 'look'} {path.stem}")
        return read(path, target, alpha, quiet=quiet)

    def writing(image: ImageFile, purified: Tensor) -> int:
        events.append(f"write {image.source.stem}")
        return write(image, purified)

    monkeypatch.setattr(folder_run, "read_image", reading)
    monkeypatch.setattr(ImageFile, "write", writing)
    assert purify(source, tmp_path / "out", "--batch-size", "2") == 0
    assert events[:5] == [f"look {stem}" for stem in "abcde"]
    rest = " ".join(events[5:])
    assert rest == ("read a read b write a write b read c read d write c write d read e write e")


def test_what_the_last_picture_needs_is_said_before_the_first_is_purified(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (28, 28)).save(source / "z.png")
    out = tmp_path / "out"
    assert "--convert-color" in fails(capsys, "purify", source, out, *QUICK)
    assert not list(out.iterdir())


def test_a_picture_that_changes_meanwhile_is_an_error(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = ImageFile.write

    def writing(image: ImageFile, purified: Tensor) -> int:
        Image.new("L", (10, 10)).save(source / "b.png")
        return write(image, purified)

    monkeypatch.setattr(ImageFile, "write", writing)
    sentence = fails(capsys, "purify", source, tmp_path / "out", "--batch-size", "1", *QUICK)
    assert "b.png was changed while" in sentence
    assert list(results(tmp_path / "out")) == ["a.png"]


# --- the fast setting


def test_a_folder_goes_on_with_the_setting_that_was_chosen_when_it_began(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from coup_fast.benchmarking import fast_setting as module

    out = tmp_path / "out"
    words = ["purify", str(source), str(out), "--set", "t_star=0.02", "--fast"]
    assert main([*words, "--json", str(tmp_path / "facts.json")]) == 0
    assert "fast: num_steps=10" in capsys.readouterr().err
    facts = json.loads((tmp_path / "facts.json").read_text())
    chosen = facts["settings"]["fast"]
    assert facts["steps"] == chosen["num_steps"] == 10
    before = results(out)
    (out / "a.png").unlink()

    def measured_again(*_args: object, **_more: object) -> None:
        raise AssertionError("a run that is resumed must not choose again")

    monkeypatch.setattr(module, "fast_setting", measured_again)
    assert main([*words, "--resume"]) == 0
    assert results(out) == before
    sentence = fails(capsys, *words[:-1], "--resume")  # without --fast these are other settings
    assert "fast" in sentence

    by_hand = tmp_path / "by_hand"
    options = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    assert main(["purify", str(source), str(by_hand), "--set", "t_star=0.02", *options]) == 0
    assert results(by_hand) == before
