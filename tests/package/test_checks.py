"""Checks of single arguments: what passes, and the sentence for what does not."""

import math
import re

import numpy as np
import pytest
import torch

from coup_fast import checks


def test_numbers() -> None:
    for value in (0.5, 1, np.float32(0.5), np.int64(1)):
        result = checks.number("eta", value, 0.0, 1.0)
        assert result == value
        assert type(result) is float
    assert checks.number("eta", 0.0, 0.0, 1.0) == 0.0
    assert checks.number("eta", -3.5) == -3.5


@pytest.mark.parametrize(
    ("value", "bounds", "above", "error", "message"),
    [
        ("0.1", (0, 1), False, TypeError, "eta must be a number in [0, 1], got '0.1'"),
        (True, (0, 1), False, TypeError, "eta must be a number in [0, 1], got True"),
        (None, (), False, TypeError, "eta must be a finite number, got None"),
        (torch.tensor(0.5), (0, 1), False, TypeError, "got tensor(0.5000)"),
        (1.5, (0, 1), False, ValueError, "eta must be a number in [0, 1], got 1.5"),
        (0, (0, 1), True, ValueError, "eta must be a number in (0, 1], got 0"),
        (math.inf, (0, math.inf), True, ValueError, "eta must be a number in (0, inf), got inf"),
        (math.nan, (0, math.inf), False, ValueError, "eta must be a number in [0, inf), got nan"),
    ],
)
def test_no_numbers(value, bounds, above: bool, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        checks.number("eta", value, *bounds, above=above)


def test_both_ends_of_a_range_may_be_left_out() -> None:
    assert checks.number("beta", 0.5, 0, 1, above=True, below=True) == 0.5
    for end in (0, 1):
        with pytest.raises(ValueError, match=rf"beta must be a number in \(0, 1\), got {end}"):
            checks.number("beta", end, 0, 1, above=True, below=True)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        checks.number("beta", 1, 0, 1, below=True)


def test_integers() -> None:
    for value in (3, np.int8(3), np.uint64(3)):
        result = checks.integer("steps", value, 1, 3)
        assert result == 3
        assert type(result) is int
    assert checks.integer("steps", 2**70, 1) == 2**70
    assert checks.integers("rounds", [30, np.int32(4)], 1, 30) == (30, 4)


@pytest.mark.parametrize(
    ("value", "bounds", "error", "message"),
    [
        (2.0, (1,), TypeError, "steps must be an int of at least 1, got 2.0"),
        ("2", (1, 9), TypeError, "steps must be an int in [1, 9], got '2'"),
        (True, (1,), TypeError, "steps must be an int of at least 1, got True"),
        (np.True_, (1,), TypeError, "steps must be an int"),
        (np.float64(2), (1,), TypeError, "steps must be an int"),
        (torch.tensor(2), (1,), TypeError, "got tensor(2)"),
        (0, (1,), ValueError, "steps must be an int of at least 1, got 0"),
        (10, (1, 9), ValueError, "steps must be an int in [1, 9], got 10"),
        (2**64, (0, 2**64 - 1), ValueError, "an int in [0, 2^64 - 1], got 18446744073709551616"),
    ],
)
def test_no_integers(value, bounds, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        checks.integer("steps", value, *bounds)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((), TypeError, "rounds must be a non-empty sequence of ints, got ()"),
        ("30", TypeError, "rounds must be a non-empty sequence of ints, got '30'"),
        (30, TypeError, "rounds must be a non-empty sequence of ints, got 30"),
        ((3, 0.5), TypeError, "each of rounds must be an int in [1, 9], got 0.5"),
        ((3, 0), ValueError, "each of rounds must be an int in [1, 9], got 0"),
    ],
)
def test_no_sequences_of_integers(value, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        checks.integers("rounds", value, 1, 9)


def test_flags_and_choices() -> None:
    assert checks.flag("clip", True) is True
    assert checks.flag("clip", False) is False
    for value in (1, None, "True", np.True_):
        with pytest.raises(TypeError, match="clip must be True or False, got"):
            checks.flag("clip", value)
    assert checks.choice("vote", "softmax", ("logits", "softmax")) == "softmax"
    assert checks.choice("graph", False, ("auto", True, False)) is False
    for value in ("auto ", None, 3, torch.ones(2), np.ones(2)):
        with pytest.raises(
            ValueError, match=re.escape(f"graph must be one of auto, True, got {value!r}")
        ):
            checks.choice("graph", value, ("auto", True))


def test_ids() -> None:
    for value in ([3, -1], (3, -1), np.array([3, -1]), torch.tensor([3, -1]).int()):
        result = checks.ids("sample_ids", value, 2)
        assert result.tolist() == [3, -1]
        assert result.dtype == torch.int64
    assert checks.ids("sample_ids", range(3)).tolist() == [0, 1, 2]
    assert checks.ids("sample_ids", []).dtype == torch.int64
    given = torch.tensor([5])
    assert checks.ids("sample_ids", given) is given


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1, 2], ValueError, "ids must be integers [3], one per sample, got torch.int64 [2]"),
        (torch.zeros(3, 1).long(), ValueError, "got torch.int64 [3, 1]"),
        (torch.zeros(3), TypeError, "ids must be integers [3], one per sample, got torch.float32"),
        (torch.zeros(3).bool(), TypeError, "got torch.bool [3]"),
        ([0, True, 2], TypeError, "each of ids must be an int in [-2^63, 2^63 - 1]"),
        (["0", "1", "2"], TypeError, "each of ids must be an int"),
        ([0, 1, 2**63], ValueError, "each of ids must be an int"),
        (np.zeros(3), TypeError, "each of ids must be an int"),
        (3, TypeError, "ids must be integers [3], one per sample, got 3"),
        (np.array("text"), TypeError, "ids must be integers [3], one per sample, got array"),
    ],
)
def test_no_ids(value, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        checks.ids("ids", value, 3)


def test_ids_of_any_ordered_kind() -> None:
    want = torch.tensor([3, 1, 2])
    for value in (np.array([3, 1, 2], np.uint8), list(want), iter([3, 1, 2]), np.array([3, 1, 2])):
        found = checks.ids("ids", value, 3)
        assert torch.equal(found, want)
        assert found.dtype == torch.int64
    for value in ({3, 1, 2}, {3: 0, 1: 0, 2: 0}, b"abc", "312", np.array([3.0, 1.0, 2.0])):
        with pytest.raises(TypeError, match="ids must be"):
            checks.ids("ids", value, 3)


def test_draws() -> None:
    cpu = torch.device("cpu")
    assert checks.draw("draw", np.int64(7), 3, cpu) == 7
    given = torch.tensor([1, 2, 3])
    assert checks.draw("draw", given, 3, cpu) is given
    for value, error, message in (
        (-1, ValueError, "draw must be an int in [0, 2^63 - 1], got -1"),
        (2**63, ValueError, "draw must be an int in [0, 2^63 - 1]"),
        (0.5, TypeError, "draw must be an int in [0, 2^63 - 1], got 0.5"),
        (True, TypeError, "draw must be an int"),
        (given[:2], ValueError, "draw must be an int or an int64 tensor [3], one per sample, got"),
        (given.int(), ValueError, "got torch.int32 [3]"),
        (given[0], ValueError, "got torch.int64 []"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            checks.draw("draw", value, 3, cpu)
