"""An image's result is its own: any batch, position, sample id, thread count, layout.

Bit for bit on the compiled path, with networks that treat samples one by one; the reference path,
whose sums and elementary functions follow the tensor's shape, agrees to rounding.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.scripts import environment
from helpers.tiny import SHORT, PerSample, TinyClassifier, TinyNetwork, images

from coup_fast import PurifiedClassifier, Purifier, ScoreModel, _extension

METHODS = sorted(SHORT)
needs_compiled = pytest.mark.skipif(not _extension.available(), reason="needs the extension")
BACKENDS = [pytest.param("compiled", marks=needs_compiled), "reference"]
IDS = [11, 0, 2**40, 7, 3]


def per_sample(method: str, backend: str, **options) -> Purifier:
    kind, short = SHORT[method]
    network = PerSample(TinyNetwork(pull=6.0 if kind == "ncsn" else 0.0))
    return Purifier(
        ScoreModel(network, kind=kind),
        PerSample(TinyClassifier()),
        method=method,
        backend=backend,
        **short | options,
    )


def compare(backend: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Equality of bits for the compiled path, to rounding for the reference."""

    def same(got: torch.Tensor, want: torch.Tensor) -> None:
        if backend == "compiled":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    return same


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_batch_and_position_do_not_matter(method: str, backend: str) -> None:
    clean, same = per_sample(method, backend), compare(backend)
    u = images(5)
    together = clean(u, IDS, draw=1)
    order = [3, 1, 4, 0, 2]
    same(clean(u[order], [IDS[i] for i in order], draw=1), together[order])
    for i in range(5):
        same(clean(u[i : i + 1], IDS[i : i + 1], draw=1), together[i : i + 1])
    same(torch.cat([clean(u[:2], IDS[:2], draw=1), clean(u[2:], IDS[2:], draw=1)]), together)
    repeated = clean(u[[2, 2]], [IDS[2]] * 2, draw=1)
    same(repeated[0], repeated[1])
    same(repeated[0], together[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_layout_does_not_matter(method: str, backend: str) -> None:
    clean, same = per_sample(method, backend), compare(backend)
    u = images(5)
    want = clean(u)
    same(clean(u.contiguous(memory_format=torch.channels_last)), want)
    same(clean(u.flip(3).contiguous().flip(3)), want)
    wide = torch.zeros(5, 3, 8, 11)
    wide[..., 2:10] = u
    same(clean(wide[..., 2:10]), want)
    same(clean(u.transpose(0, 1).contiguous().transpose(0, 1)), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["coup", "gdmp", "adp"])
def test_gradients_do_not_depend_on_the_batch(method: str, backend: str) -> None:
    clean, same = per_sample(method, backend), compare(backend)
    u, weight = images(5), torch.randn(5, 3, 8, 8)

    def gradient(rows: slice) -> torch.Tensor:
        leaf = u[rows].clone().requires_grad_()
        clean(leaf, IDS[rows]).backward(weight[rows])
        return leaf.grad

    together = gradient(slice(0, 5))
    same(torch.cat([gradient(slice(0, 3)), gradient(slice(3, 5))]), together)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["normalised", "clipped", "stable"])
def test_guidance_norms_are_per_sample(norm: str, backend: str) -> None:
    options = {"guidance_solver" if norm == "stable" else "guidance_norm": norm}
    if norm == "clipped":
        options["guidance_max_norm"] = 0.05
    clean, same = per_sample("coup", backend, **options), compare(backend)
    u = images(5)
    together = clean(u)
    for i in range(5):
        same(clean(u[i : i + 1], [i]), together[i : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_does_not_depend_on_how_many_are_asked_for(backend: str) -> None:
    same = compare(backend)
    clean = per_sample("diffpure", backend)
    judge = PerSample(TinyClassifier())
    u = images(5)
    many = PurifiedClassifier(clean, judge, num_draws=4).draw_logits(u, IDS)
    for draw in range(4):
        one = PurifiedClassifier(clean, judge).draw_logits(u[1:3], IDS[1:3], draw=draw)
        same(one[0], many[draw, 1:3])


class Polynomial(torch.nn.Module):
    """Additions and multiplications alone: the same bits under any split of the work."""

    def forward(self, x, t):
        return x * (0.5 + 0.25 * x * x) + 0.001 * t.reshape(-1, 1, 1, 1)


def polynomial_logits(u):
    halves = u.reshape(u.shape[0], 4, -1)[:, :, :8]
    return torch.stack([3 * h for h in halves.unbind(2)]).sum(0)


def large_purifications() -> list[torch.Tensor]:
    u = images(4, size=96)
    models = ScoreModel(Polynomial()), polynomial_logits
    options = {"backend": "compiled", "num_steps": 3}
    return [
        Purifier(*models, method="coup", **options)(u),
        Purifier(*models, method="diffpure", **options)(u[:1]),
        Purifier(ScoreModel(lambda x, t: 6 * (0.5 - x), kind="ncsn"), method="adp", **options)(u),
    ]


@needs_compiled
def test_thread_count_does_not_matter() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = large_purifications()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for got, expected in zip(large_purifications(), want, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


@needs_compiled
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_instruction_set_does_not_matter(capability: str, tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from test_invariance import large_purifications\n"
        "torch.set_num_threads(1)\n"
        f"torch.save(large_purifications(), {str(tmp_path / 'results.pt')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(Path(__file__).parent, COUP_FAST_CPU=capability),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode != 0 and "COUP_FAST_CPU" in done.stderr:
        pytest.skip(f"this machine has no {capability}")
    assert done.returncode == 0, done.stderr
    for got, want in zip(torch.load(tmp_path / "results.pt"), large_purifications(), strict=True):
        assert torch.equal(got, want)
