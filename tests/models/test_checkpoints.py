"""Reading checkpoints of others: what is refused, and what the error says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coup_fast.models.state import as_state, build_with, check_fits, read_state, strip_prefix


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


def test_a_prefix_goes_only_if_every_name_has_it() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert strip_prefix({"module.a": one, "module.b": two}) == {"a": one, "b": two}
    assert list(strip_prefix({"module.a": one, "b": two})) == ["module.a", "b"]
    assert list(strip_prefix({"net.module.a": one}, "net.")) == ["module.a"]


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
