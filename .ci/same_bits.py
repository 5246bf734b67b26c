"""Whether two trees compute the same bits: checksums of purified images, gradients and attacks.

    PYTHONPATH=TREE_A python .ci/same_bits.py write a.json
    PYTHONPATH=TREE_B python .ci/same_bits.py write b.json
    python .ci/same_bits.py compare a.json b.json

`write` runs every method and the purifier's options on fixed inputs and small seeded networks, and
the bundled weights. It uses the public interface alone, so that it runs on older and newer trees.
`compare` exits with 1 and names what differs. `--isa` sets the instruction set of the operators;
the bits are the same under each. Those of the networks are PyTorch's: both files must come from one
machine and one release of torch. `write` takes 75 seconds of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE")  # read when torch is imported

import torch
from torch import Tensor, nn

import coup_fast
from coup_fast import PurifiedClassifier, Purifier, ScoreModel, VPSchedule, attacks

Options = dict[str, Any]
Tensors = tuple[Tensor, ...]
Case = tuple[str, Callable[[], Tensors]]

# Every method, the kind of network it takes, and options that make a short run of it.
SHORT: dict[str, tuple[str, Options]] = {
    name: ("eps", {"num_steps": 3}) for name in coup_fast.methods.METHODS
} | {
    "gdmp": ("eps", {"rounds": 2, "t_star": 0.003}),
    "gradual": ("eps", {"rounds": (2, 3)}),
    "adp": ("ncsn", {"num_steps": 5}),
    "one-shot": ("eps", {}),
}
# The presets are other methods with other numbers; a few cases are enough for those.
PRESETS = [name for name in SHORT if name.startswith(("coup-", "diffpure-"))]
METHODS = [name for name in SHORT if name not in PRESETS]
GUIDED = [name for name in METHODS if name != "adp"]
GUIDANCE: dict[str, Options] = {
    "unguided": {"guidance_scale": 0.0},
    "guided": {"guidance_scale": 2.0},
    "normalised": {"guidance_scale": 2.0, "guidance_norm": "normalised"},
    "clipped": {"guidance_scale": 2.0, "guidance_norm": "clipped", "guidance_max_norm": 0.5},
}
# The last is longer than a segment of the sums over a sample.
SHAPES = [(0, 3, 7, 5), (1, 1, 1, 1), (2, 3, 7, 5), (3, 1, 13, 17), (33, 2, 5, 3), (2, 3, 64, 96)]


class Network(nn.Module):
    """f(x, t) with `out` channels; `pull` draws images to 0.5, the harder the nearer they are."""

    def __init__(self, channels: int = 3, out: int | None = None, pull: float = 0.0) -> None:
        super().__init__()
        self.in_channels, self.pull = channels, pull
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.last = nn.Conv2d(8, out or channels, 3, padding=1)
        seed(self, 0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t / 999).to(x.dtype).reshape(-1, 1, 1, 1)
        out = self.last(torch.tanh(self.first(x) + time))
        if not self.pull:
            return out
        spread = (0.5 - x).square().mean((1, 2, 3), keepdim=True)
        return out + self.pull * (1 + 10 * torch.exp(-100 * spread)) * (0.5 - x)


def energy(x: Tensor, t: Tensor) -> Tensor:
    """A scalar network E(x, t), [B]."""
    return (torch.tanh(2 * x) * x.flip(2) + 3 * (x - 0.5).square()).sum((1, 2, 3))


class Classifier(nn.Module):
    """Logits of five classes for images of any size, smooth and sharp."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.in_channels = channels
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)
        seed(self, 2.0)

    def forward(self, u: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(u)).mean((2, 3)))


def seed(module: nn.Module, scale: float) -> None:
    """Set parameters from a fixed generator."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))


def random(*shape: int, normal: bool = False) -> Tensor:
    """Fixed uniform or normal numbers of this shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn if normal else torch.rand)(shape, generator=generator)


def purifier(method: str, channels: int = 3, **options: Any) -> Purifier:
    """A short run of a method with small networks; `kind`, `schedule`, `out` describe theirs."""
    kind, short = SHORT[method]
    kind = options.pop("kind", kind)
    network = Network(channels, options.pop("out", None), pull=2.0 if kind == "ncsn" else 0.0)
    dtype, schedule = options.pop("networks", torch.float32), options.pop("schedule", None)
    scale = schedule.num_steps if isinstance(schedule, coup_fast.DiscreteSchedule) else 999.0
    if isinstance(schedule, coup_fast.EDMSchedule):
        scale = schedule.sigma_max
    model = ScoreModel(network.to(dtype), kind, schedule, time_scale=scale)
    classifier = Classifier(channels).to(dtype)
    return Purifier(model, classifier, method=method, seed=5, **{**short, **options})


def gradient(model: Callable[..., Tensor], images: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """A result that is differentiated, and the gradient of its product with fixed numbers."""
    leaf = images.detach().requires_grad_()
    out = model(leaf, **call)
    weights = random(*out.shape, normal=True).to(out.dtype)
    (grad,) = torch.autograd.grad((out * weights).sum(), leaf)
    return out, grad


IMAGES, LABELS = random(3, 3, 7, 5), torch.tensor([0, 3, 1])


def run(method: str, options: Options, images: Tensor = IMAGES, **call: Any) -> Tensors:
    """The result of a short run without gradient, and with it."""
    model = purifier(method, images.shape[1], **options)
    return (model(images, **call), *gradient(model, images, **call))


def states(method: str, options: Options) -> Tensors:
    """The states of a short run, in parts of the batch."""
    model = purifier(method, max_batch=2, **options)
    return tuple(x for _, x in model.trajectory(IMAGES, sample_ids=[4, 5, 6], draw=1))


def call_cases() -> Iterator[Case]:
    """Every method, guided and not: sizes, layouts, dtypes, keys, given noise, parts, states."""
    layouts = {
        "contiguous": IMAGES,
        "channels_last": IMAGES.contiguous(memory_format=torch.channels_last),
    }
    ways: list[Options] = [
        *({}, {"backend": "reference"}, {"channels_last": True}, {"channels_last": False}),
        *({"max_batch": 2}, {"precision": "bf16"}, {"check_values": False}),
        *({"networks": torch.bfloat16}, {"networks": torch.float64}),
    ]
    noise = random(12, 3, 3, 7, 5, normal=True)
    calls: list[tuple[str, Options]] = [
        ("ids", {"sample_ids": [9, 0, 2**40], "draw": 3}),
        ("draws", {"draw": torch.tensor([2**40, 0, 5])}),
        ("noise", {"noise": noise}),
        ("bf16 noise", {"noise": noise.bfloat16()}),
    ]
    dtypes = (torch.float16, torch.bfloat16, torch.float64)
    for method in METHODS:
        for guidance in ["unguided", "guided"] if method in GUIDED else [""]:
            chosen, name = GUIDANCE.get(guidance, {}), f"{method} {guidance}"
            yield f"{name}, strided", partial(run, method, chosen, random(3, 3, 7, 11)[..., 1::2])
            for way, (layout, images) in itertools.product(ways, layouts.items()):
                yield f"{name}, {layout}, {way}", partial(run, method, chosen | way, images)
            for shape in SHAPES:
                yield f"{name}, {shape}", partial(run, method, chosen, random(*shape))
            for dtype, backend in itertools.product(dtypes, ("auto", "reference")):
                options, images = chosen | {"backend": backend}, IMAGES.to(dtype)
                yield f"{name}, {dtype}, {backend}", partial(run, method, options, images)
            for said, call in calls:
                yield f"{name}, {said}", partial(run, method, chosen, **call)
            yield f"{name}, trajectory", partial(states, method, chosen)


def gradient_cases() -> Iterator[Case]:
    """Every method and every way to differentiate it."""
    ways: list[Options] = [
        *({"states": where} for where in ("device", "host", "sqrt")),
        *({"verify_states": True}, {"backend": "reference"}, {"guidance_gradient": "stopped"}),
        *({"gradient": "autograd"}, {"gradient": "autograd", "guidance_gradient": "stopped"}),
        {"gradient": "bpda"},
    ]
    for method in METHODS:
        for guidance, way in itertools.product(GUIDANCE if method in GUIDED else [""], ways):
            options = GUIDANCE.get(guidance, {}) | way
            yield f"{method} {guidance}, gradient {way}", partial(run, method, options)


def name_of(schedule: Any) -> str:
    """A name that does not depend on how a tree shows its schedules."""
    betas = getattr(schedule, "betas", None)
    return type(schedule).__name__ + ("" if betas is None else f" {len(betas)}, {betas[0]:.4g}")


def method_cases() -> Iterator[Case]:
    """The options of the methods, the kinds of networks and their schedules; plans as published."""

    def case(method: str, **options: Any) -> Case:
        said = {k: v if k != "schedule" else name_of(v) for k, v in options.items()}
        return f"{method} {said}", partial(run, method, options)

    flags, guidances, product = (False, True), GUIDANCE.values(), itertools.product
    for method, solver, noised, clip, clamp, guidance in product(
        ["coup", "vp-ode"], ["euler", "exponential"], flags, flags, flags, guidances
    ):
        options = {"solver": solver, "forward_noise": noised, "clip_denoised": clip}
        yield case(method, **options, clamp_output=clamp, **guidance)
    for method, noised, clip, clamp, guidance in product(
        ["ddpm", "ddim"], flags, flags, flags, guidances
    ):
        options = {"forward_noise": noised, "clip_denoised": clip, "clamp_output": clamp}
        yield case(method, **options, **guidance)
    for method, clip, clamp, guidance in product(["gdmp", "gradual"], flags, flags, guidances):
        yield case(method, clip_denoised=clip, clamp_output=clamp, **guidance)
    for clip, guidance in product(flags, guidances):
        edm = {"schedule": coup_fast.EDMSchedule(), "kind": "x0"}
        yield case("one-shot", clip_denoised=clip, **guidance)
        yield case("one-shot", clip_denoised=clip, **edm, **guidance)
        yield case("one-shot", clip_denoised=clip, t_star=0.01, **edm, **guidance)
    kinds, schedules = ["eps", "score", "x0"], [VPSchedule(), coup_fast.DiscreteSchedule()]
    for method, kind, schedule, guidance in product(GUIDED, kinds, schedules, guidances):
        yield case(method, kind=kind, schedule=schedule, **guidance)
    cosine = coup_fast.DiscreteSchedule.cosine(50)  # not linear in β
    for method, kind, guidance in product(["ddpm", "ddim", "gradual"], kinds, guidances):
        yield case(method, kind=kind, schedule=cosine, **guidance)
    yield case("gdmp", schedule=cosine, t_star=0.06)
    yield case("one-shot", schedule=cosine, sigma=0.5)
    for method, variance, kind, clip, guidance in product(
        ["ddpm", "gdmp"], ["fixed-small", "fixed-large", "learned"], ["eps", "x0"], flags, guidances
    ):
        options = {"variance": variance, "kind": kind, "clip_denoised": clip, "out": 6}
        yield case(method, **options, **guidance)
    for eta in (0.0, 0.5, 1.0):
        yield case("ddim", eta=eta, t_star=0.05)
        yield case("gradual", eta=eta, stride=2)
    yield case("coup", num_steps=None, step_size=0.03)
    yield case("ldsde", sigma2=1e-2, lambda_ld=2e-2, eta=3.0, guidance_scale=2.0)
    yield case("ldsde", clamp_output=True)
    yield case("gdmp", mse_scale=1000.0, ptb=4.0, image_shape=(3, 7, 5))
    yield case("one-shot", sigma=0.5)
    yield case("one-shot", t_star=0.1)
    yield case("adp", noise_variant="binary", num_steps=8)
    yield case("adp", sigma=0.0, step_lambda=0.5, delta=1e-2)
    yield case("adp", tau=0.02, alpha_min=0.0, alpha_max=0.2, pixel_map_every_step=False)
    for method, guidance in product(PRESETS, guidances):
        yield case(method, **guidance)
    for method, (kind, _) in SHORT.items():
        yield f"{method}, as published", partial(published, method, kind)


def published(method: str, kind: str) -> Tensors:
    """The table of a method with its defaults, as characters, and a run of it."""
    table = coup_fast.methods.plan(method, VPSchedule(), kind).table()
    model = ScoreModel(Network(pull=2.0 if kind == "ncsn" else 0.0), kind)
    clean = Purifier(model, Classifier(), method=method)
    return torch.tensor(list(table.encode())), clean(random(1, 3, 5, 5))


def defence(method: str = "coup", draws: int = 2, **voting: Any) -> PurifiedClassifier:
    """A small defence; its purifier works in parts of two images."""
    return PurifiedClassifier(purifier(method, max_batch=2), Classifier(), draws, **voting)


def votes(method: str, vote: str) -> Tensors:
    """Scores, the draws' logits, a gradient, and two calls with fresh draws."""
    model, fresh = defence(method, 3, vote=vote), defence(method, vote=vote, fresh_draws=True)
    plain = model(IMAGES, sample_ids=[7, 8, 9], draw=4), model.draw_logits(IMAGES)
    return (*plain, *gradient(model, IMAGES), fresh(IMAGES), fresh(IMAGES))


def averaged(method: str, vote: str, **options: Any) -> Tensors:
    """Expectation over draws."""
    model = PurifiedClassifier(purifier(method), Classifier(), 2, vote)
    got = coup_fast.eot_gradient(model, IMAGES, LABELS, draws=3, **options)
    return got.gradient, got.losses, got.scores


def attacked(attack: attacks.Attack, model: Any) -> Tensors:
    """What an attack finds."""
    found = attack.run(model, IMAGES, LABELS, sample_ids=[3, 1, 2])
    counts = torch.tensor([found.zero_gradients, found.gradient_runs])
    return found.images, found.loss, found.fooled, counts


def defence_cases() -> Iterator[Case]:
    """Votes, expectation over draws, the gradient check, attacks."""
    for method, vote in itertools.product(["coup", "adp"], ["logits", "softmax", "majority"]):
        yield f"{method}, votes {vote}", partial(votes, method, vote)
        for options in ({}, {"micro_batch": 4}):
            yield f"{method}, eot {vote} {options}", partial(averaged, method, vote, **options)
    for method in ("coup", "diffpure", "adp"):
        yield f"{method}, check_gradient", partial(checked, method)
    few: Options = {"steps": 3, "eot": 2, "eps": 0.05}
    options = [
        *({"norm": norm, "loss": loss} for norm in ("linf", "l2") for loss in attacks.LOSSES),
        *({"gradient": way} for way in attacks.GRADIENTS),
        *({"noise": "fixed"}, {"through_vote": False}, {"random_start": False, "keep": "best"}),
        {"restarts": 2, "seed": 3},
    ]
    for kind, option in itertools.product((attacks.PGD, attacks.APGD), options):
        attack = kind(**few | option)
        yield f"{kind.__name__} {option}", partial(attacked, attack, defence())
    for kind in (attacks.PGD, attacks.APGD):
        yield f"{kind.__name__} on adp", partial(attacked, kind(**few), defence("adp"))
    yield "PGD on a classifier", partial(attacked, attacks.PGD(**few), Classifier())


def checked(method: str) -> Tensors:
    """The numbers of a gradient check, without its times."""
    rows = coup_fast.check_gradient(defence(method), IMAGES, steps=3).rows
    numbers = [(r.relative_error, r.cosine, r.sign_agreement) for r in rows]
    return (torch.tensor([[float("nan") if v is None else v for v in n] for n in numbers]),)


def bundled(name: str, score: str, method: str, images: Tensor) -> Tensors:
    """A short run of the bundled weights, and its gradient."""
    model, classifier = coup_fast.load_bundled(name, score=score)
    t_star = {} if method == "adp" else {"t_star": 0.05}
    clean = Purifier(model, classifier, method=method, num_steps=3, **t_star)
    return gradient(clean, images)


def network_cases() -> Iterator[Case]:
    """The bundled weights, an energy model, and the function `purify`."""
    methods = (("vp", "coup"), ("vp", "diffpure-short"), ("ncsn", "adp"))
    sets = {"mnist": random(2, 1, 28, 28), "cifar10": random(1, 3, 32, 32)}
    for (name, images), (score, method) in itertools.product(sets.items(), methods):
        yield f"bundled {name}, {method}", partial(bundled, name, score, method, images)
    small = Purifier(ScoreModel(coup_fast.EnergyModel(energy), "ncsn"), method="adp", num_steps=4)
    yield "adp on an energy", partial(gradient, small, IMAGES)
    model = ScoreModel(Network())
    yield "purify", lambda: (coup_fast.purify(IMAGES, model, Classifier(), num_steps=2),)


def checksum(tensor: Tensor) -> str:
    """Type, shape and strides of a tensor, and SHA-256 of its elements in logical order."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(data).hexdigest()
    return f"{kind} {list(tensor.shape)} {list(tensor.stride())} {digest[:20]}"


def write(path: Path) -> None:
    """Compute everything and write the checksums."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    began, bits = time.perf_counter(), dict[str, list[str]]()
    for cases in (call_cases, gradient_cases, method_cases, defence_cases, network_cases):
        for name, compute in cases():
            if name in bits:
                raise RuntimeError(f"two cases are called {name!r}")
            try:
                bits[name] = [checksum(tensor) for tensor in compute()]
            except Exception as error:
                raise RuntimeError(f"{name} failed") from error
        print(f"{len(bits)} cases, {time.perf_counter() - began:.0f} s", flush=True)
    isa = coup_fast.build_info()["cpu_capability"]
    path.write_text(json.dumps({"torch": torch.__version__, "isa": isa, "bits": bits}, indent=0))
    print(f"{path}: {Path(coup_fast.__file__).parent} on {isa}")


def compare(first: Path, second: Path) -> int:
    """Print the names of what differs; the exit status."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    if a["torch"] != b["torch"]:
        print(f"torch {a['torch']} and {b['torch']}: networks may differ in their last bits")
    names = sorted({*a["bits"], *b["bits"]})
    different = [name for name in names if a["bits"].get(name) != b["bits"].get(name)]
    for name in different:
        missing = [path for path, got in ((first, a), (second, b)) if name not in got["bits"]]
        print(f"{name}: " + (f"not in {missing[0]}" if missing else "differs"))
    print(f"{len(names) - len(different)} of {len(names)} cases are equal")
    return int(bool(different))


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["write", "compare"])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--isa", choices=["baseline", "avx2", "avx512"])
    options = parser.parse_args()
    if len(options.files) != {"write": 1, "compare": 2}[options.command]:
        parser.error("write takes one file, compare takes two")
    if options.command == "compare":
        return compare(*options.files)
    if options.isa:
        os.environ["COUP_FAST_CPU"] = options.isa  # read when the first operator runs
    write(options.files[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
