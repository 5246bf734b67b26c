"""Other people's solvers with the same noise: torchsde's Euler, diffusers' DDPM and DDIM steps."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import TinyClassifier, TinyNetwork, images

from coup_fast import Purifier, ScoreModel, _extension, methods, reference
from coup_fast.run.guidance import confidence_gradient
from coup_fast.schedules import DiscreteSchedule

needs_compiled = pytest.mark.skipif(not _extension.available(), reason="needs the extension")
BACKENDS = ["reference", pytest.param("compiled", marks=needs_compiled)]


class ReverseVP:
    """dx = [½β x + β (s + λ g)] dτ + √β dW in τ = 1 - t (docs/methods.md, COUP); flat states."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, network, shape, classifier=None) -> None:
        self.network, self.shape, self.classifier = network, shape, classifier

    def beta(self, tau):
        return 0.1 + 19.9 * (1 - tau)

    def f(self, tau, y):
        t = 1 - tau
        x = y.reshape(self.shape)
        sigma = torch.sqrt(1 - torch.exp(-9.95 * t**2 - 0.1 * t))
        score = -self.network(x, (999 * t).expand(len(x))) / sigma
        if self.classifier is not None:
            score = score + confidence_gradient(self.classifier, x, reference, graph=False)
        return (self.beta(tau) * (0.5 * x + score)).flatten(1)

    def g(self, tau, y):
        return torch.sqrt(self.beta(tau)).expand_as(y)


def solve(sde, x0, t_star: float):
    """torchsde's Euler from t* to 1e-5 with dt = 1e-3; the end, and its increments over √h."""
    torchsde = pytest.importorskip("torchsde")

    class Recorder(torchsde.BrownianInterval):
        def __init__(self, **arguments) -> None:
            super().__init__(**arguments)
            self.taken = []

        def __call__(self, ta, tb=None, **rest):
            increment = super().__call__(ta, tb, **rest)
            if tb is not None:
                self.taken.append((float(tb - ta), increment))
            return increment

    flat = x0.flatten(1)
    ts = torch.tensor([1 - t_star, 1 - 1e-5], dtype=torch.float64)
    brownian = Recorder(
        t0=ts[0],
        t1=ts[1],
        size=flat.shape,
        dtype=torch.float64,
        entropy=11,
        levy_area_approximation="none",
    )
    with torch.no_grad():
        end = torchsde.sdeint(sde, flat, ts, bm=brownian, method="euler", dt=1e-3)[-1]
    lengths = torch.tensor([h for h, _ in brownian.taken])
    noise = torch.stack([w.reshape(x0.shape) / h**0.5 for h, w in brownian.taken])
    return end.reshape(x0.shape), noise, lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["diffpure", "diffpure-l2", "coup", "coup-l2"])
def test_torchsde(method: str, backend: str) -> None:
    t_star = 0.075 if method.endswith("l2") else 0.1
    u = images(2)
    double, classifier = TinyNetwork().double(), TinyClassifier().double()
    guide = classifier if method.startswith("coup") else None
    x0 = 2 * u.double() - 1
    end, noise, lengths = solve(ReverseVP(double, x0.shape, guide), x0, t_star)
    steps = round(1000 * t_star)
    assert len(noise) == steps
    torch.testing.assert_close(lengths[-1].item(), 0.00099, rtol=1e-6, atol=0)

    options = {"forward_noise": False, "clamp_output": False}
    clean = Purifier(
        ScoreModel(TinyNetwork()), TinyClassifier(), method=method, backend=backend, **options
    )
    result = 2 * clean(u, noise=noise.float()).double() - 1
    torch.testing.assert_close(result, end, rtol=0, atol=5e-6)
    if backend == "reference":
        exact = Purifier(ScoreModel(double), classifier, method=method, **options)
        result = 2 * exact(u.double(), noise=noise) - 1
        torch.testing.assert_close(result, end, rtol=0, atol=1e-11)


def test_torchsde_probability_flow() -> None:
    """The ODE is the SDE with half the score and no noise."""
    u = images(2, dtype=torch.float64)
    network = TinyNetwork().double()

    class Flow(ReverseVP):
        def f(self, tau, y):
            x = y.reshape(self.shape)
            drift = super().f(tau, y)
            return 0.5 * (drift + (0.5 * self.beta(tau) * x).flatten(1))

        def g(self, tau, y):
            return torch.zeros_like(y)

    x0 = 2 * u - 1
    end, _, _ = solve(Flow(network, x0.shape), x0, 0.1)
    with torch.no_grad():
        result = Purifier(ScoreModel(network), method="vp-ode", forward_noise=False)(u)
    torch.testing.assert_close(2 * result - 1, end, rtol=0, atol=1e-11)


def test_imagenet_network_is_told_the_index_of_the_exact_time() -> None:
    """DiffPure sums time up in float32 before it cuts 1000 t off (docs/methods.md, DiffPure)."""
    torchsde = pytest.importorskip("torchsde")

    class Times(ReverseVP):
        def f(self, tau, y):
            told.append(int(((1 - tau).float() * 1000).long()))
            return torch.zeros_like(y)

        def g(self, tau, y):
            return torch.zeros_like(y)

    told: list[int] = []
    ts = torch.linspace(1 - 0.15, 1 - 1e-5, 2)
    torchsde.sdeint(Times(None, None), torch.zeros(1, 3), ts, method="euler", dt=1e-3)
    theirs = torch.tensor(told[-150:])
    times = methods.diffpure_imagenet(DiscreteSchedule()).times
    ours = (1000 * torch.from_numpy(times)).round().long()
    assert ours.tolist() == list(range(150, 0, -1))
    assert theirs[:4].tolist() == [149, 148, 148, 147]
    assert int((theirs != ours).sum()) == 2


def in_float64(scheduler):
    """Its tables in float64: in float32, 1 - ᾱ cancels to five digits at low noise."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def diffusers_chain(scheduler, timesteps, network, x, **step_options):
    """The states of scheduler.step down these timesteps, and the noise it drew."""
    generator, again = (torch.Generator().manual_seed(4) for _ in range(2))
    drawn, states = [], []
    for t in timesteps:
        out = network(x, torch.full((len(x),), float(t), dtype=torch.float64))
        before = generator.get_state()
        x = scheduler.step(out, t, x, generator=generator, **step_options).prev_sample
        states.append(x)
        if not torch.equal(generator.get_state(), before):
            drawn.append(torch.randn(x.shape, dtype=x.dtype, generator=again))
    return states, drawn


def compare(scheduler, method: str, network, timesteps, backend: str, eta=None, **options) -> None:
    """A chain in float64, and ours in float32 (by this backend) and float64."""
    u = images(2)
    double = copy.deepcopy(network).double()
    step_options = {} if eta is None else {"eta": eta}
    with torch.no_grad():
        states, drawn = diffusers_chain(
            scheduler, timesteps, double, 2 * u.double() - 1, **step_options
        )
    # 1e-9: DDPM's noise is never below 1e-10 there, not even in the last of respaced steps
    for model, dtype, tolerance in ((network, torch.float32, 1e-5), (double, torch.float64, 1e-9)):
        clean = Purifier(
            ScoreModel(model, schedule=DiscreteSchedule(), time_scale=1000.0),
            method=method,
            backend=backend if dtype == torch.float32 else "auto",
            forward_noise=False,
            t_star=(timesteps[0] + 1) / 1000,
            num_steps=len(timesteps),
            **step_options,
            **options,
        )
        # DDIM draws for its last step too, and multiplies by 0
        assert len(drawn) in (clean.num_noise, clean.num_noise + 1)
        noise = torch.stack(drawn).to(dtype) if drawn else None
        mine = [2 * pixels - 1 for _, pixels in clean.trajectory(u.to(dtype), noise=noise)]
        for state, expected in zip(mine[1:], states, strict=True):
            torch.testing.assert_close(state.double(), expected, rtol=0, atol=tolerance)


class BoundedVariance(TinyNetwork):
    """Variance channels in [-1, 1]: we clip log V; diffusers and guided-diffusion do not."""

    def __init__(self) -> None:
        super().__init__(out=6)

    def forward(self, x, t):
        eps, s = super().forward(x, t).chunk(2, dim=1)
        return torch.cat((eps, torch.tanh(s)), dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
def test_diffusers_ddpm(variance: str, clip: bool, backend: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    names = {"fixed-small": "fixed_small", "fixed-large": "fixed_large", "learned": "learned_range"}
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear", clip_sample=clip, variance_type=names[variance]
    )
    network = BoundedVariance() if variance == "learned" else TinyNetwork()
    compare(
        in_float64(scheduler),
        "ddpm",
        network,
        list(range(19, -1, -1)),
        backend,
        variance=variance,
        clip_denoised=clip,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 10])
def test_diffusers_ddim(stride: int, eta: float, clip: bool, backend: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", clip_sample=clip, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(1000 // stride)
    timesteps = list(range(20 * stride - 1, -1, -stride))
    scheduler = in_float64(scheduler)
    compare(scheduler, "ddim", TinyNetwork(), timesteps, backend, eta=eta, clip_denoised=clip)


def test_diffusers_respaced_ddpm() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=False)
    timesteps = list(range(199, -1, -20))
    scheduler.set_timesteps(timesteps=timesteps)
    compare(in_float64(scheduler), "ddpm", TinyNetwork(), timesteps, "reference")


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("i", [499, 49])
def test_diffusers_as_it_comes(prediction: str, i: int) -> None:
    """One step of the unchanged float32 scheduler, for networks that predict ε or x̂0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear", clip_sample=False, prediction_type=prediction
    )
    kind = "eps" if prediction == "epsilon" else "x0"
    model = ScoreModel(TinyNetwork(), kind, DiscreteSchedule(), time_scale=1000.0)
    clean = Purifier(
        model, method="ddpm", t_star=(i + 1) / 1000, forward_noise=False, backend="reference"
    )
    u = images(2)
    with torch.no_grad():
        states, drawn = diffusers_chain(scheduler, [i], model.network, 2 * u - 1)
        steps = clean.trajectory(u, noise=torch.stack(drawn * clean.num_noise))
        next(steps)
        _, pixels = next(steps)
    torch.testing.assert_close(2 * pixels - 1, states[0], rtol=0, atol=1e-5)
