"""Differences that are rounding after all, but of a narrower arithmetic than the dtype: half-precision sums."""

from __future__ import annotations

import math

import numpy as np

from mhabridge.diff.diagnosis.computing import Computer
from mhabridge.diff.diagnosis.evidence import Bench, Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.trials import Explanation
from mhabridge.diff.rounding import SPREAD, Accuracy, noisy

FAULT = "half-precision accumulation"
ALONG = 0.2  # the cosine between a tensor and its error; independent errors have about 1 / sqrt(elements)
LEAST = 0.1  # of the standard deviation that the narrower arithmetic would give: less noise was something else
QUIET = 0.2  # of the output's rows may have (almost) no error; where more have none, something happened to a few
MANIFOLD = 0.36  # of simulated noise's share beside its largest component, that an error must have beside its own
TELLING = 0.05  # of simulated noise lies beside its largest component, or such a tensor tells nothing
DRAWS = 4  # of simulated noise


def explanations(case: Case, bench: Bench) -> list[Explanation]:
    """Whether sums, or all of it, in a narrower dtype explain what was observed, the least narrow first."""
    if _has_direction(case, bench):
        return []
    for accuracy, fault in _narrower(case.expected):
        fit = bench.fit(case.state, accuracy)
        if fit.ok and _noisy_enough(bench, case, accuracy) and _manifold(bench, case, accuracy):
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


def _noisy_enough(bench: Bench, case: Case, accuracy: Accuracy) -> bool:
    """Whether each tensor is about as noisy as that arithmetic would make it, and the output in most of its rows."""
    exact = bench.computer.run(case.state)
    found = bench.bounds_of(case.state, exact, accuracy)
    for name, observed in bench.observed.items():
        each = np.broadcast_to(found[name].each, exact[name].shape)
        good = np.isfinite(exact[name]) & np.isfinite(observed) & (each > 0)
        if not good.any():
            continue
        error = np.zeros(exact[name].shape)
        error[good] = np.square((observed[good] - exact[name][good]) / each[good])
        if SPREAD * math.sqrt(float(np.mean(error[good]))) < LEAST:
            return False
        rows = error.sum(axis=-1)[good.any(axis=-1)] / good.sum(axis=-1)[good.any(axis=-1)]
        if name == "output" and np.mean(SPREAD * np.sqrt(rows) < LEAST / 3) > QUIET:
            return False
    return True


def _manifold(bench: Bench, case: Case, accuracy: Accuracy) -> bool:
    """Whether the errors of different rows are about as independent as those of that arithmetic.

    A constant offset, or one wrong element of a weight, makes errors that are almost the same vector in every row, but
    for a factor. Roundings of the weights are shared by the rows as well, so they are measured by simulated noise.
    """
    exact = bench.computer.run(case.state)
    arithmetic = noisy(accuracy, np.random.default_rng(0))
    drawn = [Computer(arithmetic, bench.cut).run(case.state) for _ in range(DRAWS)]
    told = False
    for name, observed in bench.observed.items():
        beside = [_beside(each[name] - exact[name]) for each in drawn]
        for one, usual in zip(_beside(observed - exact[name]), np.min(beside, axis=0), strict=True):
            if usual < TELLING:  # too few rows or columns
                continue
            told = True
            if one < MANIFOLD * usual:
                return False
    return told


def _beside(error: np.ndarray) -> tuple[float, float]:
    """The share of the squared error beside its largest component: by batch element, and of all rows together."""
    error = np.where(np.isfinite(error), error, 0.0)
    found = []
    for matrices in (error.reshape(len(error), -1, error.shape[-1]), error.reshape(1, -1, error.shape[-1])):
        squares = np.square(np.linalg.svd(matrices, compute_uv=False))
        total = float(squares.sum())
        found.append(1.0 - float(squares[:, 0].sum()) / total if total else 1.0)
    return found[0], found[1]
