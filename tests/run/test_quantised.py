"""Quantised models have no gradient: they classify, and whoever needs a gradient is told."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import TinyNetwork, images, short_purifier
from torch import Tensor, nn

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, check_gradient
from coup_fast.attacks import PGD

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore:Please use quant_min"),
    pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered"),
    pytest.mark.filterwarnings("ignore:.*answer for an image depends on the other images"),
]
LABELS = torch.zeros(3, dtype=torch.int64)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, 16), nn.Linear(16, 4)

    def forward(self, u: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(u.flatten(1))))


def dynamic(dtype: torch.dtype = torch.qint8) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Dense().eval(), {nn.Linear}, dtype=dtype)


def static() -> nn.Module:
    ao = torch.ao.quantization
    model = nn.Sequential(ao.QuantStub(), nn.Flatten(), nn.Linear(192, 4), ao.DeQuantStub()).eval()
    engine = torch.backends.quantized.engine
    model.qconfig = ao.get_default_qconfig(engine)
    ao.prepare(model, inplace=True)
    model(images())
    return ao.convert(model)


@pytest.fixture(params=["int8", "float16", "static"])
def quantised(request: pytest.FixtureRequest) -> nn.Module:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised kernels")
    if request.param == "static":
        return static()
    return dynamic(torch.qint8 if request.param == "int8" else torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_it_classifies_what_was_purified(quantised: nn.Module, dtype: torch.dtype) -> None:
    clean, u = short_purifier("diffpure"), images(dtype=dtype)
    want = quantised(clean(u).float())
    assert torch.equal(PurifiedClassifier(clean, quantised)(u), want)


def test_guidance_by_it_is_refused(quantised: nn.Module) -> None:
    for backend in ("auto", "reference"):
        guided = Purifier(ScoreModel(TinyNetwork()), quantised, num_steps=3, backend=backend)
        for u in (images(), images().requires_grad_(), images(dtype=torch.float64)):
            with pytest.raises(RuntimeError, match=r"guidance is that gradient.*quantis"):
                guided(u)


def test_gradients_through_it_are_refused(quantised: nn.Module) -> None:
    def model() -> PurifiedClassifier:
        return PurifiedClassifier(short_purifier("diffpure"), quantised)

    with pytest.raises(RuntimeError, match=r"the classifier's answer carries no .*quantised"):
        model()(images().requires_grad_())
    for gradient in ("exact", "bpda", "classifier"):
        with pytest.raises((RuntimeError, ValueError), match="quantised layers"):
            PGD(steps=1, eot=1, gradient=gradient)(model(), images(), LABELS)
    with pytest.raises(ValueError, match="quantised layers"):
        PGD(steps=1, eot=1)(quantised, images(), LABELS)
    with pytest.raises(RuntimeError, match="quantised layers"):
        check_gradient(model(), images(), LABELS)


def test_a_quantised_score_network_purifies_and_has_no_gradient() -> None:
    rows = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    clean = Purifier(ScoreModel(lambda x, t: rows(x)), method="diffpure", num_steps=3)
    assert bool(clean(images()).isfinite().all())
    with pytest.raises(RuntimeError, match=r"the score network's answer carries no .*quantised"):
        clean(images().requires_grad_())
