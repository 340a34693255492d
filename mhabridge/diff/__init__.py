"""Comparing backends: the same call on each, judged against the float64 reference."""

from mhabridge.callable_module import make_callable
from mhabridge.diff.comparing import Comparison, compare
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.report import DiffReport, Entry, Layer, Run
from mhabridge.diff.running import diff

__all__ = ["Comparison", "DiffReport", "Distance", "Entry", "Layer", "Run", "compare", "diff", "judge"]

make_callable(__name__, "diff")
