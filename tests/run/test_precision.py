"""Precision and memory format of the networks: what they see, what stays float32, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from helpers.tiny import SHORT, TinyNetwork, images, short_purifier
from torch import nn

from coup_fast import Purifier, ScoreModel
from coup_fast.run.model_calls import tf32_allowed

METHODS = sorted(SHORT)
LAST = torch.channels_last


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def watched(clean: Purifier) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of every call of every convolution from now on."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in clean.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_autocast_around_the_networks_and_nothing_else(method: str) -> None:
    u = images()
    clean = short_purifier(method, precision="bf16")
    seen = watched(clean)
    got = clean(u)
    assert {out.dtype for _, out in seen} == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")
    run = clean.prepare(u)
    with torch.no_grad():
        state = run.step(0, run.start(u), run.attacked(u))[0]
    assert state.dtype == torch.float32
    assert (bits(state) & 0xFFFF).any()  # not a bfloat16 that was widened
    want = short_purifier(method)(u)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert not torch.equal(got, want)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}], ids=str)
@pytest.mark.parametrize("method", ["coup", "coup-l2", "gdmp", "adp"])
def test_the_exact_gradient_is_that_of_the_very_run(method: str, options) -> None:
    """Recomputed steps have the stored bits, and the gradient is that of the whole graph."""
    u, weight = images(), torch.randn(3, 3, 8, 8)
    gradients = []
    for kind in ("exact", "autograd"):
        leaf = u.clone().requires_grad_()
        clean = short_purifier(method, gradient=kind, verify_states=kind == "exact", **options)
        out = clean(leaf)
        assert torch.equal(out.detach(), clean(u))
        gradients.append(torch.autograd.grad((out * weight).sum(), leaf)[0])
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_reaches_the_networks_and_not_the_caller(method: str) -> None:
    u = images()
    clean = short_purifier(method, channels_last=True)
    before = {k: v.stride() for k, v in clean.state_dict().items()}
    seen = watched(clean)
    got = clean(u)
    assert all(x.is_contiguous(memory_format=LAST) for x, _ in seen)
    assert got.is_contiguous()
    assert {k: v.stride() for k, v in clean.state_dict().items()} == before
    want = short_purifier(method, channels_last=False)(u)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert clean(u.contiguous(memory_format=LAST)).is_contiguous(memory_format=LAST)
    strided = u.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(clean(strided), want, rtol=1e-4, atol=1e-4)


def runs_in_channels_last(network: Callable, **options) -> bool:
    clean = Purifier(ScoreModel(network), method="vp-ode", num_steps=1, **options)
    run = clean.prepare(images())
    return run.start(images())[0].is_contiguous(memory_format=LAST)


def test_auto_follows_the_weights() -> None:
    network = TinyNetwork()
    assert not runs_in_channels_last(network)
    assert runs_in_channels_last(network, channels_last=True)
    assert runs_in_channels_last(network.to(memory_format=LAST))
    assert runs_in_channels_last(network.forward)
    assert not runs_in_channels_last(network, channels_last=False)
    assert not runs_in_channels_last(lambda x, t: x)
    assert not runs_in_channels_last(nn.Bilinear(1, 1, 1))
    assert not runs_in_channels_last(nn.Conv2d(3, 3, 1))  # its weights are in both formats
    assert runs_in_channels_last(lambda x, t: x, channels_last=True)
    u = images().contiguous(memory_format=LAST)
    clean = Purifier(ScoreModel(network), method="vp-ode", num_steps=1, channels_last=False)
    assert clean.prepare(u).start(u)[0].is_contiguous(memory_format=LAST)  # as the images come


def flags() -> tuple:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    legacy = (cuda.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision())
    return (*legacy, cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)


def test_tf32_flags_are_set_for_a_while_and_put_back() -> None:
    found = flags()
    try:
        for matmul, conv in [(None, None), (False, False), (True, False), (False, True)]:
            if matmul is not None:
                torch.backends.cuda.matmul.allow_tf32 = matmul
                torch.backends.cudnn.allow_tf32 = conv
            before = flags()
            with contextlib.suppress(KeyError), tf32_allowed():
                assert flags()[:2] == (True, True)
                assert flags()[3:5] == ("tf32", "tf32")
                with tf32_allowed():
                    pass
                assert flags()[:2] == (True, True)
                raise KeyError
            assert flags() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = found[0]
        torch.backends.cudnn.allow_tf32 = found[1]
        torch.backends.cuda.matmul.fp32_precision = found[3]
    assert flags() == found


def test_what_makes_no_sense_is_refused() -> None:
    u = images()
    with pytest.raises(ValueError, match=r"precision='tf32' .* on cpu"):
        short_purifier(precision="tf32")(u)
    with pytest.raises(ValueError, match=r"float64 images .*precision='bf16'"):
        short_purifier(precision="bf16", double=True)(u.double())
    with pytest.raises(ValueError, match=r"precision .*fp32, tf32, bf16, got 'fp16'"):
        short_purifier(precision="fp16")
    with pytest.raises(ValueError, match=r"channels_last .*auto, True, False.*'yes'"):
        short_purifier(channels_last="yes")
