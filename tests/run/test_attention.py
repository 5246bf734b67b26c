"""Classifiers with attention: second derivatives by themselves, and nothing changed beside them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyNetwork, images
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from coup_fast import (
    EnergyModel,
    PurifiedClassifier,
    Purifier,
    ScoreModel,
    check_gradient,
    eot_gradient,
)
from coup_fast._torch.attention import TwiceDifferentiableAttention
from coup_fast.attacks import PGD

MASK = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5
MASK[0] = False  # a row without any key


class Kernels(nn.Module):
    """Tokens [B, N, 8] -> tokens; notes which kernel each call of attention took."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.options = options
        self.seen: list[str] = []

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.qkv(tokens).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        self.seen.append(out.grad_fn.name() if out.grad_fn is not None else "")
        return out[:, 0]


class Heads(nn.Module):
    """`nn.MultiheadAttention`, asked for its weights or not."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, tokens: Tensor) -> Tensor:
        out, weights = self.inner(tokens, tokens, tokens, need_weights=self.need_weights)
        assert (weights is not None) == self.need_weights
        return out


class TimmStyle(nn.Module):
    """Attention as timm's ViTs have it, between norms and with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm(tokens)).reshape(batch, count, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return tokens + self.out(out.transpose(1, 2).reshape(batch, count, width))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 2
    )


BODIES: dict[str, Callable[[], nn.Module]] = {
    "F.scaled_dot_product_attention": Kernels,
    "with a causal mask": lambda: Kernels(is_causal=True),
    "nn.MultiheadAttention": lambda: Heads(False),
    "nn.MultiheadAttention with weights": lambda: Heads(True),
    "nn.TransformerEncoder": encoder,
    "timm": TimmStyle,
}


class Classifier(nn.Module):
    """Patches of 2x2 pixels to tokens, attention, logits; as an object with `.logits` if `hf`."""

    def __init__(self, body: nn.Module, hf: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.body = body
        self.head = nn.Linear(8, 5)
        self.hf = hf

    def forward(self, pixels: Tensor) -> Any:
        logits = self.head(self.body(self.patches(pixels).flatten(2).mT).mean(1))
        return type("Output", (), {"logits": logits})() if self.hf else logits


def classifier(name: str = "F.scaled_dot_product_attention", hf: bool = False) -> Classifier:
    torch.manual_seed(3)
    made = Classifier(BODIES[name](), hf).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.0)
    return made


def purifier(model: nn.Module, **options: Any) -> Purifier:
    network = ScoreModel(TinyNetwork())
    return Purifier(network, model, **{"num_steps": 3, "guidance_scale": 20.0} | options)


def gradient(clean: Purifier) -> Tensor:
    leaf = images().requires_grad_()
    return torch.autograd.grad(clean(leaf).square().sum(), leaf)[0]


def flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


@pytest.mark.parametrize("options", [{}, {"graph_memory": 2**30}, {"gradient": "autograd"}])
@pytest.mark.parametrize("name", BODIES)
def test_the_gradient_is_that_of_the_math_kernel(name: str, options: dict[str, Any]) -> None:
    clean = purifier(classifier(name), **options)
    before = flags()
    found = gradient(clean)
    assert flags() == before
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradient(clean)
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    stopped = gradient(clean.with_options(guidance_gradient="stopped"))
    assert (stopped - wanted).norm() > 1e-3 * wanted.norm()  # a second derivative worth having


@pytest.mark.parametrize("hf", [False, True])
@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "timm"])
def test_checks_attacks_and_averages_work(name: str, hf: bool) -> None:
    model = classifier(name, hf)
    defended = PurifiedClassifier(purifier(model), model, num_draws=2)
    labels = torch.tensor([0, 1, 2])
    assert check_gradient(defended, images(), labels, steps=2).passed
    found = eot_gradient(defended, images(), labels)
    leaf = images().requires_grad_()
    assert found.gradient.isfinite().all()
    (plain,) = torch.autograd.grad(F.cross_entropy(defended(leaf), labels), leaf)
    assert plain.isfinite().all()
    attack = PGD(eps=0.1, step_size=0.05, steps=1)
    for through in ("exact", "classifier"):
        adversarial = PGD(eps=0.1, step_size=0.05, steps=1, gradient=through)
        assert (adversarial(defended, images(), labels) != images()).any()
    assert (attack(defended, images(), labels) != images()).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_derivatives_keep_the_fused_kernel(precision: str) -> None:
    model = classifier()
    for options in ({"guidance_gradient": "stopped"}, {"gradient": "bpda"}):
        gradient(purifier(model, precision=precision, check_values=False, **options))
    with torch.no_grad():
        purifier(model, precision=precision, check_values=False)(images())
    fused = {"ScaledDotProductFlashAttentionForCpuBackward0"}
    assert set(model.body.seen) == fused
    model.body.seen.clear()
    gradient(purifier(model, precision=precision, check_values=False))
    assert len(set(model.body.seen) - fused) == 1  # in the steps that are computed again


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": MASK},
        {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(1))},
        {"is_causal": True},
        {"scale": 0.3},
    ],
    ids=["plain", "bool mask", "mask", "causal", "scale"],
)
def test_the_mode_has_the_bits_of_the_math_kernel(options: dict[str, Any], cast: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        with sdpa_kernel(SDPBackend.MATH):
            wanted = F.scaled_dot_product_attention(q, k, v, **options)
        with TwiceDifferentiableAttention():
            found = F.scaled_dot_product_attention(query=q, key=k, value=v, **options)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_grouped_queries_too() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    with TwiceDifferentiableAttention():
        assert torch.equal(F.scaled_dot_product_attention(q, k, k, enable_gqa=True), wanted)


def test_heads_without_weights_give_none() -> None:
    heads, tokens = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)
    wanted, _ = heads(tokens, tokens, tokens, need_weights=False, is_causal=True, attn_mask=MASK)
    with TwiceDifferentiableAttention():
        found, weights = heads(
            tokens, tokens, tokens, need_weights=False, is_causal=True, attn_mask=MASK
        )
    assert weights is None
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_other_threads_and_the_users_choice_are_left_alone() -> None:
    q = torch.randn(2, 1, 5, 8, requires_grad=True)

    def kernel() -> str:
        return F.scaled_dot_product_attention(q, q, q).grad_fn.name()

    usual = kernel()
    with ThreadPoolExecutor(1) as pool, TwiceDifferentiableAttention():
        assert kernel() != usual
        assert pool.submit(kernel).result() == usual
    assert kernel() == usual
    clean = purifier(classifier())
    wanted = gradient(clean)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        before = flags()
        assert torch.equal(gradient(clean), wanted)
        assert flags() == before
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradient(clean), range(8)):
            assert torch.equal(found, wanted)


def test_an_energy_with_attention_is_differentiated_twice() -> None:
    body = Classifier(Kernels()).eval()
    clean = Purifier(
        ScoreModel(EnergyModel(lambda x, t: body(x).logsumexp(1)), "score"),
        method="diffpure",
        num_steps=2,
    )
    found = gradient(clean)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradient(clean)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_attention_out_of_sight_is_named_with_what_works() -> None:
    scripted = torch.jit.script(Scripted().eval())
    with pytest.raises(RuntimeError, match=r"fused kernel .*sdpa_kernel.*guidance_gradient="):
        gradient(purifier(scripted))
    assert gradient(purifier(scripted, guidance_gradient="stopped")).isfinite().all()
    with sdpa_kernel(SDPBackend.MATH):
        assert gradient(purifier(scripted)).isfinite().all()


class Scripted(nn.Module):
    """Attention that calls no Python."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        q, k, v = self.qkv(pixels.flatten(2).mT).chunk(3, -1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return self.out(out[:, 0].mean(1))
