"""Reading checkpoints of others: what is refused, and what the error says."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from coup_fast.models import load_edm, load_guided_diffusion, load_ncsnv2, load_score_sde
from coup_fast.models.checkpoint_files import read_state
from coup_fast.models.robustbench_timm import load_classifier
from coup_fast.models.state import as_state, build_with, check_fits, unwrapped


class _Runs:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_comes_back_as_it_was_saved(tmp_path: Path, old_format: bool) -> None:
    saved = {"model": _network().state_dict(), "step": 3, "list": [1.5, torch.ones(2)]}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=not old_format)
    found = read_state(tmp_path / "a.pth")
    assert found["step"] == 3
    assert torch.equal(found["list"][1], torch.ones(2))
    check_fits(_network(), as_state(found["model"], "model"), "model")


def test_safetensors_files_are_read(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    assert torch.equal(read_state(tmp_path / "a.safetensors")["a"], torch.arange(3.0))
    (tmp_path / "b.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be read"):
        read_state(tmp_path / "b.safetensors")


@pytest.mark.parametrize("old_format", [False, True])
def test_settings_beside_the_weights_are_read(tmp_path: Path, old_format: bool) -> None:
    """A Namespace and NumPy scalars run nothing; training scripts save them with the weights."""
    numbers = {name: np.dtype(name).type(3) for name in ("float64", "float32", "int64", "bool")}
    model = Namespace(channels=3, parts=Namespace(depth=[1, 2]))
    beside = {"args": model, "config": SimpleNamespace(lr=1e-3), "best": numbers}
    torch.save(
        beside | {"model": _network().state_dict()},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=not old_format,
    )
    found = read_state(tmp_path / "a.pth")
    assert {name: found[name] for name in beside} == beside
    assert all(type(found["best"][name]) is np.dtype(name).type for name in numbers)
    check_fits(_network(), as_state(found["model"], "model"), "model")
    torch.save({"object": np.array(_Runs(), dtype=object)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth .* holds objects of numpy\S*_reconstruct"):
        read_state(tmp_path / "b.pth")


def _archive(kind: str) -> bytes:
    held = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr("model.pth", b"weights")
    elif kind == "tar":
        with tarfile.open(fileobj=held, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("model.pth"))
    else:
        with zipfile.ZipFile(held, "w") as archive:
            for name in ("a/data.pkl", "a/code/__torch__.py", "a/constants.pkl"):
                archive.writestr(name, b"code")
    return held.getvalue()


NO_CHECKPOINTS = {
    "is empty": b"",
    "nothing but zeros": bytes(2000),
    "is a Git LFS pointer.*git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "is a web page": b"\n<!DOCTYPE html><html><title>Quota exceeded</title>",
    "is a web page.*": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "is a tar archive": _archive("tar"),
    r"is a zip archive of model\.pth": _archive("zip"),
    "is a TorchScript archive": _archive("script"),
    "is compressed by gzip": gzip.compress(b"weights"),
    "is compressed by xz": b"\xfd7zXZ\0",
    "is an HDF5 file": b"\x89HDF\r\n",
    "is a NumPy file": b"\x93NUMPY\x01",
    r"begins with b'not a checkpoint'": b"not a checkpoint",
}


@pytest.mark.parametrize("said", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, said: str) -> None:
    path = tmp_path / "a.pth.tar"
    path.write_bytes(NO_CHECKPOINTS[said])
    with pytest.raises(ValueError, match=rf"a\.pth\.tar cannot be read as a checkpoint.*{said}"):
        read_state(path)
    for loader in (load_edm, load_score_sde, load_ncsnv2, load_guided_diffusion):
        with pytest.raises(ValueError, match=said):
            loader(path)
    if said in ("is empty", "is a web page", "is a tar archive"):
        path = path.rename(tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=rf"cannot be read as a safetensors file.*{said}"):
            read_state(path)


def test_files_that_could_run_code_or_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": _Runs()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    whole = tmp_path / "whole.pth"
    torch.save(torch.ones(1000), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:2000])
    for name in ("code", "text", "empty", "cut"):
        with pytest.raises(ValueError, match=f"{name}.pth cannot be read"):
            read_state(tmp_path / f"{name}.pth")
    assert "ran code" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        read_state(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([{"a": torch.ones(2)}, 3], r"a list of 2 entries \(a dict of 1 entries \(a\), int 3\)"),
        ({"model": {"a": torch.ones(2)}, "step": 3}, r"a dict of 2 entries \(model, step\)"),
        (torch.ones(2, 3), r"a tensor \[2, 3\]"),
        ({}, "a dict of 0 entries"),
        ({7: torch.ones(2)}, r"a dict of 1 entries \(7\)"),
    ],
)
def test_other_formats_are_described(found: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"file.pth .*state dict .* {words}"):
        as_state(found, "file.pth")


@pytest.mark.parametrize(
    ("wrapped", "expected", "wanted"),
    [
        (["module.a", "module.b"], ["a", "b"], ["a", "b"]),
        (["module.a", "b"], ["a", "b"], ["module.a", "b"]),  # a prefix of some names stays
        (["_orig_mod.module.a.w", "_orig_mod.module.b"], ["a.w", "b"], ["a.w", "b"]),
        (["a._orig_mod.w", "b._orig_mod.w"], ["a.w", "b.w"], ["a.w", "b.w"]),
        (["a._orig_mod.w", "b.w"], ["a._orig_mod.w", "b.w"], ["a._orig_mod.w", "b.w"]),
        (["net.module.a", "net.module.b"], [], ["a", "b"]),
        (["net.0.w", "net.0.b"], ["net.0.w", "net.0.b"], ["net.0.w", "net.0.b"]),
        (["model.net.0.w", "model.net.0.b"], ["net.0.w", "net.0.b"], ["net.0.w", "net.0.b"]),
        (["model.net.0.w", "model.net.0.b"], ["net.0.w", "net.1.w"], ["net.0.w", "net.0.b"]),
        (["n_averaged", "module.a", "module.b"], ["a", "b"], ["a", "b"]),
        (["n_averaged", "a"], ["n_averaged", "a"], ["n_averaged", "a"]),
        (["model.a", "model.b"], ["x", "y"], ["model.a", "model.b"]),  # nothing of it is known
    ],
)
def test_wrappers_go(wrapped: list[str], expected: list[str], wanted: list[str]) -> None:
    state = {name: torch.tensor([float(i)]) for i, name in enumerate(wrapped)}
    found = unwrapped(state, expected)
    assert list(found) == wanted
    values = [value for name, value in state.items() if name != "n_averaged" or name in wanted]
    assert all(a is b for a, b in zip(found.values(), values, strict=True))


class _Held(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, _network())


def _prefixed(prefix: str, extra: tuple[str, ...] = ()) -> dict[str, Tensor]:
    state = {prefix + name: tensor for name, tensor in _states()}
    return state | {name: torch.zeros(2) for name in extra}


WRAPPED = {
    "DataParallel": lambda: nn.DataParallel(_network()).state_dict(),
    "torch.compile": lambda: torch.compile(_network()).state_dict(),
    "compile of a part": lambda: nn.Sequential(
        *(torch.compile(part) for part in _network())
    ).state_dict(),
    "DDP of compile": lambda: _prefixed("module._orig_mod."),
    "compile of DDP": lambda: _prefixed("_orig_mod.module."),
    "AveragedModel": lambda: AveragedModel(_network()).state_dict(),
    "AveragedModel of DDP": lambda: AveragedModel(nn.DataParallel(_network())).state_dict(),
    "Lightning, model": lambda: _Held("model").state_dict(),
    "Lightning, net": lambda: _Held("net").state_dict(),
    "another name": lambda: _Held("backbone").state_dict(),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_weights_fill_an_architecture(tmp_path: Path, wrapper: str) -> None:
    state = WRAPPED[wrapper]()
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    loaded = load_classifier(tmp_path / "a.ckpt", architecture=_network, key="state_dict")
    weights = [value for name, value in state.items() if name != "n_averaged"]
    assert len(weights) == len(loaded.state_dict())
    assert all(map(torch.equal, weights, loaded.state_dict().values()))


def test_the_keys_of_state_dicts_are_named(tmp_path: Path) -> None:
    """As a line that can be typed; a file without weights has none."""
    path, state = tmp_path / "a.ckpt", _network().state_dict()
    held = {"epoch": 3, "state_dict": state, "ema": {"decay": 0.9, "shadow": state}}
    torch.save(held, path)
    with pytest.raises(ValueError, match=r"give key='state_dict' or key='ema\.shadow'$"):
        load_classifier(path, architecture=_network)
    with pytest.raises(ValueError, match=r"give key='ema\.shadow'$"):
        load_classifier(path, architecture=_network, key="ema")
    loaded = load_classifier(path, architecture=_network, key="ema.shadow").state_dict()
    assert all(map(torch.equal, state.values(), loaded.values()))
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, path)
    with pytest.raises(ValueError, match="no entry of it is one"):
        load_classifier(path, architecture=_network)


def test_safetensors_of_others_want_an_architecture(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file(_network().state_dict(), path)
    with pytest.raises(ValueError, match="architecture="):
        load_classifier(path)
    assert isinstance(load_classifier(path, architecture=_network), nn.Sequential)


def test_of_several_prefixes_one_is_named(tmp_path: Path) -> None:
    torch.save(_prefixed("net.") | _prefixed("ema.net.", ("loss.w",)), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt.*prefix='ema\.net\.' or prefix='net\.'"):
        load_classifier(tmp_path / "a.ckpt", architecture=_network)
    for prefix in ("ema.net.", "ema.net", "ema"):
        if prefix == "ema":  # what is below it has a prefix too, which all names share
            torch.save(_prefixed("net.") | _prefixed("ema.net."), tmp_path / "a.ckpt")
        found = load_classifier(tmp_path / "a.ckpt", architecture=_network, prefix=prefix)
        assert torch.equal(found[0].weight, torch.load(tmp_path / "a.ckpt")["ema.net.0.weight"])
    with pytest.raises(ValueError, match=r"a\.ckpt begins with prefix='head'"):
        load_classifier(tmp_path / "a.ckpt", architecture=_network, prefix="head")
    with pytest.raises(ValueError, match="prefix are for files"):
        load_classifier("timm:resnet18", prefix="head")


def test_misfits_name_keys_and_shapes() -> None:
    state: dict[str, Tensor] = dict(_network().state_dict())
    check_fits(_network(), state, "it")
    state["0.weight"] = torch.zeros(4, 1, 3, 3)
    del state["1.running_mean"]
    state["2.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"model of a.pth .*Sequential: 7 .* 7 ") as caught:
        check_fits(_network(), state, "model of a.pth")
    text = str(caught.value)
    assert "1 missing: 1.running_mean" in text
    assert "1 unexpected: 2.bias" in text
    assert "1 of another shape: 0.weight is [4, 1, 3, 3], expected [4, 3, 3, 3]" in text
    many = {f"x{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"x0, x1, x2, x3, x4, … \(9 in all\)"):
        check_fits(_network(), many, "it")


def test_build_with_fills_a_module_that_shares_nothing_with_the_file() -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in _states()}
    module = build_with(_network, state, "it", torch.float32)
    assert not module.training
    for name, tensor in module.state_dict().items():
        assert tensor.device.type == "cpu"
        assert tensor.dtype == (torch.float32 if state[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in module.parameters())
    kept = build_with(_network, state, "it", None)
    assert kept[0].weight.dtype == torch.float16
    kept[0].weight.data.zero_()
    assert state["0.weight"].any()


def _states() -> list[tuple[str, Tensor]]:
    return list(_network().state_dict().items())
