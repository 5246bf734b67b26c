"""The CUDA kernels, run on the CPU by the emulator, against the CPU ops: every bit.

What this can't see, only a device can: real concurrency, memory limits, speed. Code generation as
far as PTX is seen by ptx.py, which runs these tests on what nvcc makes of the kernels.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cuda_cases import (
    CASES,
    Case,
    adaptive_arguments,
    every_kernel,
    outputs,
    same_bits,
)
from helpers.sampling import perturb_row, step

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="the emulator is built by the C++ compiler"
)


@pytest.fixture(scope="session")
def emulated():
    from emulator.build import load

    return load()


def assert_same(emulated, case: Case) -> None:
    args = case.make()
    expected = outputs(getattr(torch.ops.coup_fast, case.op)(*args))
    actual = outputs(getattr(emulated, case.op)(*args))
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, b), f"output {index}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits(emulated, case: Case) -> None:
    assert_same(emulated, case)


def test_every_kernel_is_run(emulated) -> None:
    """By the cases that compute-sanitizer watches on a device: the others then compare bits."""
    from emulator.build import library

    built = ctypes.CDLL(str(library()))
    table = subprocess.run(["nm", "-C", library()], capture_output=True, text=True, check=True)
    address = {name: int(at, 16) for at, name in re.findall(r"^(\w+) \w (.+)$", table.stdout, re.M)}
    named = re.compile(r"::(\w+_kernel)(<.*>)?\([^:]*coup_fast::[^{]*\)$")
    kernels = {name: match[1] for name in address if (match := named.search(name))}
    sources = "".join(path.read_text() for path in sorted(Path("csrc/cuda").glob("*.cu")))
    written = re.findall(r"__global__ void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", sources)
    assert set(kernels.values()) == set(written)
    for case in every_kernel():
        getattr(emulated, case.op)(*case.make())
    base = ctypes.cast(built.emulated_has_run, ctypes.c_void_p).value - address["emulated_has_run"]
    built.emulated_has_run.argtypes = [ctypes.c_void_p]
    built.emulated_has_run.restype = ctypes.c_bool
    assert {name for name in kernels if not built.emulated_has_run(base + address[name])} == set()


SUMMED = [case for case in CASES if "large" in case.name or case.op.startswith("adaptive")]


@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_same_bits_in_several_launches(emulated, case: Case, monkeypatch) -> None:
    """Compute capability 8: no clusters, so the sums go through a workspace."""
    monkeypatch.setenv("COUP_FAST_EMULATOR_CAPABILITY", "8")
    assert_same(emulated, case)


def test_same_bits_above_two_to_the_twenty_elements(emulated) -> None:
    """More segments than one launch sums, with clusters or without."""
    for op in ("adaptive_step", "adaptive_step_backward"):
        args = adaptive_arguments((1, 1, 1025, 1025))
        args = args if op == "adaptive_step" else (args[1], *args)
        assert_same(emulated, Case(op, "huge", lambda a=args: a))


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 141, 141)])
def test_same_bits_with_little_shared_memory(emulated, shape, monkeypatch) -> None:
    """64 KiB: what is not kept there is read again."""
    monkeypatch.setenv("COUP_FAST_EMULATOR_SMALL", "1")
    args = adaptive_arguments(shape)
    assert_same(emulated, Case("adaptive_step", "small", lambda: args))
    assert_same(emulated, Case("adaptive_step_backward", "small", lambda: (args[1], *args)))


def test_shared_memory_is_allowed_once_for_all_samples(emulated) -> None:
    """Not as much as each call needs: a thread would lower it under another thread's launch."""
    from emulator.build import library

    settings = ctypes.CDLL(str(library())).emulated_settings
    settings.restype = ctypes.c_uint64
    for shape in [(1, 3, 160, 160), (1, 3, 96, 96), (1, 3, 160, 160)]:
        emulated.adaptive_step(*adaptive_arguments(shape))
    settings()
    for shape in [(1, 3, 96, 96), (1, 3, 160, 160)]:
        emulated.adaptive_step(*adaptive_arguments(shape))
    assert settings() == 0


def loaded_bytes(emulated, op: str, args) -> int:
    """Bytes that the vector loads of a call read."""
    from emulator.build import library

    count = ctypes.CDLL(str(library())).emulated_loaded_bytes
    count.restype = ctypes.c_uint64
    count()
    getattr(emulated, op)(*args)
    return int(count())


# In registers; one, two and three segments a block; a cluster of four blocks; channels_last.
ONCE = [(2, 3, 32, 32), (2, 1, 28, 28), (1, 3, 64, 64), (1, 3, 96, 96), (1, 3, 128, 128)]


@pytest.mark.parametrize("shape", [*ONCE, (1, 3, 256, 256)])
def test_every_byte_is_read_once(emulated, shape) -> None:
    """However the sample is shared out, sums and update together read each tensor once."""
    call = step(shape, "langevin", torch.bfloat16, guidance_norm="normalised")
    numel = call.x.numel()
    plain = replace(call, reference=None)
    assert loaded_bytes(emulated, "reverse_step", plain.args) == numel * (4 + 2 + 2)
    assert loaded_bytes(emulated, "reverse_step", call.args) == numel * (4 + 2 + 2 + 2)
    assert loaded_bytes(emulated, "adaptive_step", adaptive_arguments(shape)) == numel * 12


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_byte_is_read_once_in_registers(emulated, layout) -> None:
    """Also by the backward of the adaptive step, which sums twice, and in either layout."""
    x, h, ahead, *rest = adaptive_arguments((2, 3, 32, 32))
    states = [t.contiguous(memory_format=layout) for t in (x, x, h, ahead)]
    assert loaded_bytes(emulated, "adaptive_step_backward", (*states, *rest)) == x.numel() * 16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_vectors_in_either_layout(emulated, layout) -> None:
    """The step without a norm reads all by vectors, whatever the layout of the network's output."""
    call = replace(step((2, 3, 8, 8)), reference=None, guidance_norm="none")
    last = replace(call, model_out=call.model_out.contiguous(memory_format=layout))
    assert loaded_bytes(emulated, "reverse_step", last.args) == call.x.numel() * 12


@pytest.mark.parametrize("seed", ["1", "2"])
def test_order_of_threads_does_not_matter(emulated, seed: str, monkeypatch) -> None:
    monkeypatch.setenv("COUP_FAST_EMULATOR_SEED", seed)
    for case in SUMMED[::5]:
        assert_same(emulated, case)


@pytest.mark.parametrize("norm", ["none", "normalised"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 13, 17), (2, 3, 32, 32), (1, 3, 160, 160)])
def test_in_place_twin(emulated, shape, layout, norm: str) -> None:
    whole = step(shape, guidance_norm=norm).map(lambda t: t.contiguous(memory_format=layout))
    for call in (replace(whole, x=whole.x.clone()), replace(whole, reference=None)):
        expected = torch.ops.coup_fast.reverse_step(*call.args)
        emulated.reverse_step_(*call.args)
        assert same_bits(call.x, expected)


def test_nothing_is_written_outside(emulated) -> None:
    """A state in the middle of a larger buffer: its neighbours stay as they are."""
    for shape in [(3, 1, 7), (2, 3, 8, 8)]:
        call = replace(step(shape), reference=None)
        count = call.x.numel()
        buffer = torch.full((count + 8,), torch.nan)
        state = buffer[4:-4].view(shape)
        state.copy_(call.x)
        emulated.reverse_step_(state, *call.args[1:])
        assert buffer[:4].isnan().all()
        assert buffer[-4:].isnan().all()
        assert not state.isnan().any()


def test_a_sample_beyond_the_kernels_indices_is_refused(emulated) -> None:
    """By its own size, not by what is left of it in 32 bits. The output is not touched."""
    images = torch.zeros(1, 1, 1, dtype=torch.bfloat16).expand(1, 1, 2**32 + 4)
    try:
        with pytest.raises(RuntimeError, match=r"a sample may have up to 1073741824 elements"):
            emulated.perturb_backward(images, images, perturb_row(), None, None)
    except AssertionError as error:
        if "allocate" in str(error):
            pytest.skip("8 GiB cannot be asked for here")
        raise


def test_a_refused_launch_is_an_error(emulated, monkeypatch) -> None:
    monkeypatch.setenv("COUP_FAST_EMULATOR_REFUSE", "1")
    with pytest.raises(RuntimeError, match="adaptive_step could not start on CUDA device"):
        emulated.adaptive_step(*adaptive_arguments((2, 3, 4, 4)))
