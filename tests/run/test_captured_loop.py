"""The captured loop with tapes for graphs: buffers, the step number on the device, fallbacks.

What CUDA itself does is tested in gpu/test_graphs.py.
"""

from __future__ import annotations

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tape import Tape, TapeGraphs
from helpers.tiny import SHORT, Asking, TinyClassifier, TinyNetwork, images, short_purifier
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from coup_fast import Purifier, ScoreModel
from coup_fast.run.captured import _capturing

METHODS = sorted(SHORT)


def taped(method: str = "coup", cuda_graph: bool | str = True, **options) -> Purifier:
    clean = short_purifier(method, cuda_graph=cuda_graph, **options)
    clean._kept.graphs = TapeGraphs()
    return clean


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_replays_have_the_bits_of_the_eager_loop(method: str, backend: str) -> None:
    clean, plain = taped(method, backend=backend), short_purifier(method, backend=backend)
    for seed, ids, draw in [(0, [0, 1, 2], 0), (0, [5, 5, 9], 3), (1, [0, 1, 2], 0)]:
        u = images().roll(seed, 0)
        assert torch.equal(clean(u, ids, draw), plain(u, ids, draw))
        assert clean.graph_reason is None
    kinds = {clean.prepare(u).kind(k) for k in range(clean.plan.num_steps)}
    assert clean._kept.graphs.tapes.captures == len(kinds)  # in three runs


def test_the_network_of_a_flow_is_captured_with_its_input() -> None:
    """Times differ from step to step, so a replay has to scale the state anew."""
    model = ScoreModel(TinyNetwork(), "velocity", time_scale=999.0)
    clean = Purifier(model, method="diffpure", num_steps=3, cuda_graph=True)
    clean._kept.graphs = TapeGraphs()
    plain = Purifier(model, method="diffpure", num_steps=3)
    for seed in (0, 1):
        u = images().roll(seed, 0)
        assert torch.equal(clean(u, [0, 1, 2]), plain(u, [0, 1, 2]))
        assert clean.graph_reason is None


def test_a_plan_of_several_kinds_of_rows_takes_a_graph_for_each() -> None:
    clean = taped("gdmp")
    kinds = [clean.prepare(images()).kind(k) for k in range(clean.plan.num_steps)]
    assert len(set(kinds)) > 1
    assert torch.equal(clean(images()), short_purifier("gdmp")(images()))
    assert clean._kept.graphs.tapes.captures == len(set(kinds))


def test_the_network_branches_off_where_there_is_guidance_and_is_joined() -> None:
    for method, branches in (("coup", 3), ("diffpure", 0), ("adp", 0)):  # two warm-ups, one capture
        clean = taped(method)
        clean(images())
        side = clean._kept.graphs.tapes.side
        assert side.branches == side.joins == branches * (len(clean._kept.graphs._loops) == 1)


def test_a_result_is_not_overwritten_by_the_next_run() -> None:
    clean = taped()
    first = clean(images())
    kept = first.clone()
    clean(images().flip(0))
    assert torch.equal(first, kept)


def test_changed_weights_are_seen_and_moved_ones_captured_anew() -> None:
    clean = taped()
    clean(images())
    with torch.no_grad():
        for p in clean.parameters():
            p.mul_(0.9)
    plain = copy.deepcopy(clean)
    plain.cuda_graph = False
    assert torch.equal(clean(images()), plain(images()))
    assert clean._kept.graphs.tapes.captures == 1
    clean.score_model.network.first.weight = torch.nn.Parameter(
        0.5 * clean.score_model.network.first.weight.detach()
    )
    plain = copy.deepcopy(clean)
    plain.cuda_graph = False
    assert torch.equal(clean(images()), plain(images()))
    assert clean._kept.graphs.tapes.captures == 2
    assert len(clean._kept.graphs._loops) == 1  # the stale one is gone
    clean.classifier.eval()  # another mode, another computation
    clean(images())
    assert clean._kept.graphs.tapes.captures == 3


def test_a_kind_of_run_is_shape_dtype_layout_and_options() -> None:
    clean = taped()
    u = images()
    kinds = [u, images(2), images(size=8, batch=4), u.half(), u.double()]
    kinds[-1] = u.contiguous(memory_format=torch.channels_last)
    for n, v in enumerate(kinds, 1):
        clean(v)
        clean(v)
        assert clean._kept.graphs.tapes.captures == n
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clean(u), short_purifier()(u))
    assert clean._kept.graphs.tapes.captures == n + 1
    clean.precision = "bf16"
    assert torch.equal(clean(u), short_purifier(precision="bf16")(u))
    assert clean._kept.graphs.tapes.captures == n + 2
    for batch in range(5, 12):
        clean(images(batch))
    assert len(clean._kept.graphs._loops) == 8  # the oldest are let go


def test_kernels_are_chosen_anew_where_pytorch_is_set_otherwise() -> None:
    clean = taped("diffpure")
    for deterministic, captures in ((False, 1), (True, 2), (False, 2)):
        with torch.backends.cudnn.flags(deterministic=deterministic):
            clean(images())
        assert clean._kept.graphs.tapes.captures == captures


def test_no_weights_of_a_callers_autocast_get_into_a_graph() -> None:
    seen = []

    class Looking(TinyNetwork):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_cache_enabled())
            return super().forward(x, t)

    clean = Purifier(
        ScoreModel(Looking(), "eps"), method="diffpure", num_steps=2, check_values=False
    )
    clean._kept.graphs, clean.cuda_graph = TapeGraphs(), True
    with torch.autocast("cpu", torch.bfloat16):
        clean(images())
        assert torch.is_autocast_cache_enabled()
    assert seen
    assert not any(seen)
    seen.clear()
    clean(images())  # without one nothing is done, which compiled networks would notice
    assert all(seen)


def test_auto_captures_the_second_run_of_a_kind() -> None:
    clean = taped(cuda_graph="auto")
    assert clean.graph_reason == "nothing has run yet"
    want = short_purifier()(images())
    for captures, reason in ((0, "the first run of this kind"), (1, None), (1, None)):
        assert torch.equal(clean(images()), want)
        assert clean._kept.graphs.tapes.captures == captures
        assert (clean.graph_reason or "").startswith(reason or "")
        assert (clean.graph_reason is None) == (reason is None)


class Refusing(torch.nn.Module):
    """A network that does not like to be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyNetwork()

    def forward(self, x, t):
        if any(isinstance(mode, Tape) for mode in _get_current_dispatch_mode_stack()):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen % 2 == 0:  # the first is a warm-up that is watched
                raise KeyError("not on tape")
        return self.inner(x, t)


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Asking, "makes the host wait for the device"), (Refusing, "KeyError: 'not on tape'")],
)
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(network, reason: str) -> None:
    options = {"method": "diffpure", "num_steps": 3}
    want = Purifier(ScoreModel(network()), **options)(images())
    clean = Purifier(ScoreModel(network()), **options)
    clean._kept.graphs = TapeGraphs()
    clean(images())
    with pytest.warns(UserWarning, match=f"without CUDA graphs: .*{reason}"):
        assert torch.equal(clean(images()), want)
    assert torch.equal(clean(images()), want)
    assert reason in clean.graph_reason
    clean.cuda_graph = True
    with pytest.raises(RuntimeError, match=f"cuda_graph=True: .*{reason}"):
        clean(images())


def test_errors_of_the_models_are_their_own() -> None:
    clean = Purifier(ScoreModel(lambda x, t: x[:, :1]), method="diffpure", cuda_graph=True)
    clean._kept.graphs = TapeGraphs()
    with pytest.raises(ValueError, match=r"score network returned \[3, 1, 8, 8\]"):
        clean(images())


def test_reasons_to_run_eagerly() -> None:
    u = images()
    clean = taped(cuda_graph="auto")
    clean(u, noise=torch.randn(clean.num_noise, *u.shape))
    assert clean.graph_reason == "noise is given; graphs generate it"
    inner = TinyClassifier()
    for choice, reason in (("auto", "a model is a plain callable"), (True, "")):
        clean = Purifier(
            ScoreModel(TinyNetwork()), lambda u: inner(u), num_steps=3, cuda_graph=choice
        )
        clean._kept.graphs = TapeGraphs()
        clean(u)
        clean(u)
        assert (clean.graph_reason or "").startswith(reason)
        assert (clean.graph_reason is None) == (choice is True)
    clean = taped(cuda_graph="auto", method="adp")
    clean.compile_networks = "reduce-overhead"
    reason = clean._kept.graphs._why_eager(clean.prepare(u), u, "auto")
    assert reason.startswith("compile='reduce-overhead' captures graphs of its own")
    clean = taped(cuda_graph=False)
    clean(u)
    assert clean.graph_reason == "cuda_graph=False"
    clean = short_purifier()
    clean(u)
    assert "images are on cpu" in clean.graph_reason
    with pytest.raises(ValueError, match=r"cuda_graph=True: .* cpu"):
        short_purifier(cuda_graph=True)(u)
    with pytest.raises(ValueError, match=r"cuda_graph .*auto, True, False.*'yes'"):
        short_purifier(cuda_graph="yes")


def test_gradients_are_computed_eagerly_beside_graphs() -> None:
    clean, plain = taped(), short_purifier()
    clean(images())
    gradients = []
    for model in (clean, plain):
        u = images().requires_grad_()
        model(u).square().sum().backward()
        gradients.append(u.grad)
    assert torch.equal(*gradients)
    assert clean._kept.graphs.tapes.captures == 1


def test_parts_of_a_batch_share_a_graph_and_modes_of_grad_do_not_matter() -> None:
    clean, plain = taped(max_batch=2), short_purifier(max_batch=2)
    u = images(6)
    with torch.inference_mode():
        assert torch.equal(clean(u), plain(u))
    assert torch.equal(clean(u), plain(u))
    assert clean._kept.graphs.tapes.captures == 1


def test_options_that_do_not_reach_the_step_share_a_graph() -> None:
    clean = taped()
    clean(images())
    clean.check_values, clean.states, clean.gradient = False, "sqrt", "none"
    clean(images())
    assert clean._kept.graphs.tapes.captures == 1
    clean.channels_last = True
    clean(images())
    assert clean._kept.graphs.tapes.captures == 2


def test_copies_capture_for_themselves() -> None:
    clean = taped()
    want = clean(images())
    for other in (copy.deepcopy(clean), pickle.loads(pickle.dumps(clean))):
        assert len(other._kept.graphs._loops) == 0
        assert torch.equal(other(images()), want)
        assert len(other._kept.graphs._loops) == 1


def test_two_threads_capture_one_after_the_other() -> None:
    """A capture waits for the device, and that would end another thread's."""
    inside, most = [], []

    class Watched(Tape):
        def __enter__(self):
            inside.append(self)
            most.append(len(inside))
            time.sleep(0.01)
            return super().__enter__()

        def __exit__(self, *error):
            inside.remove(self)
            return super().__exit__(*error)

    purifiers = [taped() for _ in range(4)]
    for clean in purifiers:
        clean._kept.graphs.tapes.tape = Watched
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda clean: clean(images()), purifiers))
    assert max(most) == 1
    assert all(torch.equal(result, short_purifier()(images())) for result in results)


def test_a_model_that_purifies_may_capture_within_a_warm_up() -> None:
    lock = _capturing(torch.device("cpu"))
    with lock:
        assert _capturing(torch.device("cpu")) is lock
        assert lock.acquire(blocking=False)
        lock.release()
