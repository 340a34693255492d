"""Comparing backends: the same call on each, judged against the float64 reference."""

from mhabridge.callable_module import make_callable
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.report import DiffReport, Entry, Pair, Run
from mhabridge.diff.running import diff

__all__ = ["DiffReport", "Distance", "Entry", "Pair", "Run", "diff", "judge"]

make_callable(__name__, "diff")
