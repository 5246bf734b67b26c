"""Numbers about a defence and the ways to print them: proportions, tables, reports.

Nothing here knows a purification method or an attack. scipy and tabulate (the `cli` extra) are
imported by the functions that need them.
"""

from coup_fast.evaluation.intervals import Proportion, accuracy
from coup_fast.evaluation.report import environment, write_json
from coup_fast.evaluation.tables import render_table

__all__ = ["Proportion", "accuracy", "environment", "render_table", "write_json"]
