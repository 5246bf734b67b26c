"""Benchmark cases, rivals and timing, shared by `coup-fast bench` and `benchmarks/`.

`catalogue` lists what is measured; `operators` and `loops` make the cases, from the code of others
in `rivals` and `loop_rivals` and the models in `networks`; `timing` measures the variants of a case
in turns and `components` where a loop's time goes; `report` makes rows of it, `tables` and `plots`
show them, `results` keeps them in dated files. `fast_setting` measures how a purifier is fastest.
"""

from coup_fast.benchmarking.case import Case, Variant, VariantUnavailable
from coup_fast.benchmarking.timing import Timing, measure_in_turns

__all__ = ["Case", "Timing", "Variant", "VariantUnavailable", "measure_in_turns"]
