"""Differences that are rounding after all, but of a narrower arithmetic than the dtype: half-precision sums."""

from __future__ import annotations

import math

import numpy as np

from mhabridge.diff.diagnosis.evidence import Bench, Case, Fit
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.trials import Explanation
from mhabridge.diff.rounding import SPREAD, Accuracy

FAULT = "half-precision accumulation"
ALONG = 0.2  # the cosine between a tensor and its error; independent errors have about 1 / sqrt(elements)
LEAST = 0.1  # of the standard deviation that the narrower arithmetic would give: less noise was something else


def explanations(case: Case, bench: Bench) -> list[Explanation]:
    """Whether sums, or all of it, in a narrower dtype explain what was observed, the least narrow first."""
    if _has_direction(case, bench):
        return []
    for accuracy, fault in _narrower(case.expected):
        fit = bench.fit(case.state, accuracy)
        if fit.ok and _noise(fit, bench, case, accuracy) >= LEAST:
            return [Explanation((fault,), fit, 0.0)]
    return []


def _narrower(expected: Accuracy) -> list[tuple[Accuracy, Fault]]:
    dtype, found = expected.dtype, []
    if dtype in ("float16", "bfloat16"):
        if expected.sums != dtype:
            text = f"products were added up in {dtype} where {expected.sums} is expected"
            found.append((Accuracy(dtype, expected.exp, dtype), _fault(text, f"add products up in {expected.sums}")))
        return found
    for narrow in ("float32", "float16", "bfloat16")[dtype == "float32" :]:
        text = f"it was computed with the precision of {narrow}, and returned as {dtype}"
        mend = f"compute in {dtype}; look for autocast, TF32 or a cast to {narrow}"
        found.append((Accuracy(narrow), _fault(text, mend)))
    return found


def _fault(words: str, mend: str) -> Fault:
    return Fault(FAULT, "arithmetic", words, f"precision: {mend}")


def _has_direction(case: Case, bench: Bench) -> bool:
    """Whether some tensor's error points along the tensor itself: rounding errors do not, a wrong factor does."""
    exact = bench.computer.run(case.state)
    for name, observed in bench.observed.items():
        good = np.isfinite(exact[name]) & np.isfinite(observed)
        error, right = (observed - exact[name])[good], exact[name][good]
        lengths = float(np.linalg.norm(error) * np.linalg.norm(right))
        if lengths and abs(float(np.vdot(error, right))) > (ALONG + 4.0 / math.sqrt(error.size)) * lengths:
            return True
    return False


def _noise(fit: Fit, bench: Bench, case: Case, accuracy: Accuracy) -> float:
    """The least noisy tensor's error in standard deviations of what that arithmetic would give."""
    exact = bench.computer.run(case.state)
    found = bench.bounds_of(case.state, exact, accuracy)
    least = math.inf
    for name, observed in bench.observed.items():
        each = np.broadcast_to(found[name].each, exact[name].shape)
        good = np.isfinite(exact[name]) & (each > 0)
        if good.any():
            error = (observed[good] - exact[name][good]) / each[good]
            least = min(least, SPREAD * math.sqrt(float(np.mean(np.square(error)))))
    return least
