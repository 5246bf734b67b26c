"""Random runs: the result is the reference's, or an error or a warning names the cause.

A run has models that keep to docs/assumptions.md, or one that breaks one of them in a way that
`helpers.misbehaviour` lists. `pytest --hypothesis-profile=fuzz` takes other and many more examples.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.misbehaviour import CLASSIFIER, FINE, NETWORK, Fault
from helpers.random_runs import RUN_OPTIONS, Case, difference, outcome
from helpers.tiny import SHORT
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

EXAMPLES = settings.default.max_examples
GUIDANCE = {
    "guidance_scale": [0, 1.0, 4],
    "guidance_norm": ["none", "normalised"],
    "guidance_solver": ["explicit", "stable"],
    "clamp_output": [True, False],
}
START = {"t_star": [0.05, 0.1, 0.3], "num_steps": [1, 2, 3], "forward_noise": [True, False]}
SDE = {**GUIDANCE, **START, "solver": ["euler", "exponential"], "clip_denoised": [True, False]}
METHOD_OPTIONS: dict[str, dict[str, list[Any]]] = {
    "coup": SDE,
    "diffpure": SDE,
    "vp-ode": SDE,
    "ldsde": {**GUIDANCE, "num_steps": [1, 3]},
    "ddpm": {**GUIDANCE, **START, "variance": ["fixed-small", "fixed-large"]},
    "ddim": {**GUIDANCE, **START, "eta": [0, 0.5, 1]},
    "gdmp": {**GUIDANCE, "rounds": [1, 2], "t_star": [0.002], "mse_scale": [0, 6e4]},
    "gradual": {**GUIDANCE, "rounds": [(2, 3), (1,)], "eta": [0, 1.0]},
    "adp": {"sigma": [0, 0.25], "num_steps": [1, 3], "noise_variant": ["gaussian", "binary"]},
    "one-shot": {"sigma": [0.1, 0.5], "guidance_scale": [0, 1.0], "clip_denoised": [True, False]},
}
DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]


@st.composite
def images(draw: Any, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    shape = [draw(st.sampled_from(sizes)) for sizes in ([0, 1, 2, 3, 3], [1, 3, 3])]
    shape += draw(st.sampled_from([(8, 8), (8, 8), (1, 1), (5, 7), (1, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    u = torch.rand(shape, generator=generator).to(draw(st.sampled_from(dtypes)))
    match draw(st.sampled_from(["dense", "dense", "last", "slice", "expanded", "negated", "flip"])):
        case "last":
            return u.contiguous(memory_format=torch.channels_last)
        case "slice":
            return torch.cat([u, u], 3)[..., : u.shape[3]]
        case "expanded":
            return u[:, :1].expand(u.shape)
        case "negated":
            return torch._neg_view(-u)
        case "flip":
            return u.mT.contiguous().mT
    return u


@st.composite
def cases(draw: Any, dtypes: list[torch.dtype] = DTYPES, fault: Fault = FINE["honest"]) -> Case:
    u = draw(images(dtypes))
    method = draw(st.sampled_from(list(METHOD_OPTIONS)))
    options = {k: draw(st.sampled_from(v)) for k, v in METHOD_OPTIONS[method].items()}
    if options.get("guidance_solver") == "stable":
        options["guidance_norm"] = "none"  # with which alone it goes
    for name in draw(st.lists(st.sampled_from(list(RUN_OPTIONS)), max_size=4, unique=True)):
        options[name] = draw(st.sampled_from(RUN_OPTIONS[name]))
    if u.dtype == torch.float64 and options.get("backend") == "compiled":
        options["backend"] = "auto"
    if fault.at_each_call:
        options["check_values"] = draw(st.booleans())
    entry = draw(st.sampled_from(["Purifier", "purify", "trajectory", "PurifiedClassifier"]))
    votes = ["logits", "softmax"] + (["majority"] if u.dtype.itemsize > 2 else [])
    defence = {"num_draws": draw(st.integers(1, 2)), "vote": draw(st.sampled_from(votes))}
    # The gradient of a majority is that of the softmax, by its docstring.
    differentiated = defence["vote"] != "majority" and draw(st.booleans())
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    mode = torch.enable_grad if differentiated else draw(st.sampled_from(modes))
    seed = draw(st.integers(0, 2**64 - 1))
    options = SHORT[method][1] | options
    case = Case(u, method, options, {}, seed, entry, defence, differentiated, mode, fault)
    return replace(case, call=draw(arguments(case)))


@st.composite
def arguments(draw: Any, case: Case) -> dict[str, Any]:
    """Sample ids and draw, and sometimes the noise itself."""
    batch = len(case.images)
    ids = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=batch, max_size=batch)
    call = {"sample_ids": draw(st.none() | ids), "draw": draw(st.sampled_from([0, 0, 1, 2**62]))}
    if case.entry != "PurifiedClassifier" and draw(st.integers(0, 3)) == 0:
        generator = torch.Generator().manual_seed(1)
        count = case.purifier().num_noise + draw(st.integers(0, 1))
        call["noise"] = torch.randn(count, *case.images.shape, generator=generator)
    return call


@settings(max_examples=EXAMPLES * 2)
@given(cases(), st.sampled_from(list(FINE)), st.sampled_from(["network", "classifier"]))
def test_a_good_run_gives_the_reference(case: Case, fine: str, which: str) -> None:
    if fine == "transposed" and which == "classifier":
        fine = "honest"
    case = replace(case, fault=FINE[fine], faulty=which)
    result, said = outcome(case.run)
    assert not [words for words in said if "guidance overshoot" not in words]  # true of some
    out, gradient = result
    assert out.device == case.images.device
    if case.entry != "PurifiedClassifier":
        assert out.dtype == case.images.dtype
    assert (why := difference(case, out, gradient)) is None, why
    event(f"{case.method}, {case.images.dtype}")


FAULTS = [("network", name) for name in NETWORK] + [("classifier", name) for name in CLASSIFIER]


def fault_of(which: str, name: str) -> Fault:
    return (NETWORK if which == "network" else CLASSIFIER)[name]


@settings(max_examples=EXAMPLES * 4)
@given(st.sampled_from(FAULTS), st.booleans(), st.data())
def test_a_fault_of_a_model_is_named_or_does_nothing(
    fault: tuple[str, str], as_module: bool, data: Any
) -> None:
    which, name = fault
    case = data.draw(cases([torch.float32, torch.float64], fault_of(which, name)))
    case = replace(case, faulty=which, as_module=as_module)
    result, said = outcome(case.run)
    if any(re.search(case.fault.words, words) for words in said):
        event(f"said: {which} {name}")
        return
    assert result is not None, f"{which} {name}: the error does not say so: {said}"
    why = difference(case, *result)
    assert why is None, f"{which} {name}: nothing said, and {why} (said: {said})"
    event(f"did nothing: {which} {name}")


# A buffer for answers does harm only where two answers are needed at once, as in ADP.
@pytest.mark.parametrize(("which", "name"), [f for f in FAULTS if "buffer" not in f[1]])
def test_every_fault_is_named_in_a_plain_run(which: str, name: str) -> None:
    """Or the test above would hold of faults that do nothing."""
    u = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_steps": 2, "solver": "exponential", "clip_denoised": True}
    case = Case(u, "coup", options, entry="PurifiedClassifier", differentiated=True)
    _, said = outcome(replace(case, fault=fault_of(which, name), faulty=which).run)
    assert any(re.search(fault_of(which, name).words, words) for words in said), said
