"""Measuring a defence: `evaluate` runs attacks, and what is needed to read and print the numbers.

tabulate and matplotlib (the `cli` extra) are imported by the functions that need them.
"""

from coup_fast.evaluation.config import EvalConfig, from_dict, read_toml
from coup_fast.evaluation.evaluate import evaluate
from coup_fast.evaluation.intervals import Proportion, accuracy
from coup_fast.evaluation.paired import Comparison, Paired, count_pairs, holm
from coup_fast.evaluation.provenance import environment, write_json
from coup_fast.evaluation.report import Report
from coup_fast.evaluation.state import EvaluationError, StateError
from coup_fast.evaluation.tables import render_table

__all__ = [
    "Comparison",
    "EvalConfig",
    "EvaluationError",
    "Paired",
    "Proportion",
    "Report",
    "StateError",
    "accuracy",
    "count_pairs",
    "environment",
    "evaluate",
    "from_dict",
    "holm",
    "read_toml",
    "render_table",
    "write_json",
]
