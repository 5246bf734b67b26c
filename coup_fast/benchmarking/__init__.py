"""Benchmark cases, rivals and timing, shared by `coup-fast bench` and `benchmarks/`.

`rivals` holds the code a fused operator is compared with, `cases` pairs each operator with its
rivals and a correctness check, `timing` measures them in turns, `report` prints what came out.
"""

from coup_fast.benchmarking.cases import Case, Variant, VariantUnavailable, all_cases
from coup_fast.benchmarking.timing import Timing, measure_in_turns

__all__ = ["Case", "Timing", "Variant", "VariantUnavailable", "all_cases", "measure_in_turns"]
