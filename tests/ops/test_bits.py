"""What must not change a single bit: instruction set, threads, batch split, position, layout."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers.checksums import checksums
from helpers.sampling import keys_of, step
from helpers.scripts import environment

from coup_fast import build_info, ops


def run_checksums(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helpers.checksums"],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    if isa not in build_info()["isas"]:
        pytest.skip(f"not built for {isa}")
    done = run_checksums(COUP_FAST_CPU=isa)
    if "this machine lacks" in done.stderr:
        pytest.skip(f"this machine lacks {isa}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["isa"] == isa
    assert result["sums"] == checksums()


def test_number_of_threads_does_not_matter() -> None:
    """Large enough to be split; few calls, since threads that share a core are slow to meet."""
    call = step((2, 3, 128, 160), learned=True, guidance_norm="normalised")
    backward = torch.ops.coup_fast.reverse_step_backward

    def run() -> list[torch.Tensor]:
        return [ops.reverse_step(*call.args), *backward(call.x.flip(0), *call.args)]

    alone, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_layout_does_not_matter() -> None:
    sums = checksums()
    dense = {k: v for k, v in sums.items() if k.endswith("torch.contiguous_format")}
    assert len(dense) >= 60
    for name, value in dense.items():
        assert value == sums[name.replace("contiguous_format", "channels_last")], name


def test_unknown_instruction_set_is_refused() -> None:
    done = run_checksums(COUP_FAST_CPU="mmx")
    assert done.returncode != 0
    assert "baseline, avx2 or avx512, got mmx" in done.stderr


@pytest.mark.parametrize("norm", ["none", "normalised"])
def test_a_sample_does_not_depend_on_its_batch(norm: str) -> None:
    call = step((33, 3, 13, 17), learned=True, guidance_norm=norm)
    whole = ops.reverse_step(*call.args)
    assert torch.equal(whole, ops.reverse_step(*call.args))  # and not on the call
    for part in (slice(0, 1), slice(32, 33), slice(5, 17)):
        alone = ops.reverse_step(
            call.x[part], call.model_out[part], call.coeffs, call.keys[part], call.guidance[part],
            call.reference[part], None, norm,
        )  # fmt: skip
        assert torch.equal(alone, whole[part])


def test_noise_does_not_depend_on_the_batch() -> None:
    keys = keys_of(33, (1003,))
    whole = ops.normal(keys, (33, 1003))
    assert torch.equal(ops.normal(keys[7:8], (1, 1003)), whole[7:8])
    assert torch.equal(ops.normal(keys.flip(0), (33, 1003)).flip(0), whole)
    assert torch.equal(ops.normal(keys, (33, 17, 59)).flatten(1), whole)
