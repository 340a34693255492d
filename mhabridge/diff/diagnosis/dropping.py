"""Dropout: what was dropped is read off the attention weights, and the output then has to follow from it."""

from __future__ import annotations

import dataclasses

import numpy as np

from mhabridge.diff.diagnosis.evidence import Bench, Case
from mhabridge.diff.diagnosis.findings import Diagnosis, Fault
from mhabridge.diff.diagnosis.state import State, Tensor
from mhabridge.diff.diagnosis.trials import Explanation, Trials

_BEFORE = Fault(
    "weights before dropout",
    "attn_weights",
    "the attention weights were returned as they are before dropout, and the output was made with dropout",
    "attn_weights: return them after dropout",
)
_NONE = Fault("dropout not applied", "dropout", "no dropout was applied in training", "dropout: apply it in training")
_ANYWAY = Fault(
    "dropout in evaluation", "dropout", "dropout was applied outside training", "dropout: call eval() first"
)


def active(case: Case) -> float | None:
    """The probability of dropout that the call has; None if it has none."""
    spec = case.spec
    probability = spec.dropout or spec.out_dropout
    return probability if case.training and probability else None


def diagnosed(named: Diagnosis, case: Case, probability: float) -> Diagnosis:
    """A call with dropout: random, so only what follows from the returned weights can be judged."""
    trials = Trials(case)
    if case.strange or case.spec.out_dropout or "attn_weights" not in case.observed:
        return _say(named, 1, "Unexplained: with dropout the output is random, and no weights tell what was dropped.")
    bench = trials.bench()
    assert bench is not None  # nothing is mixed
    weights_clean = _weights_ok(bench, case.state)
    if weights_clean and bench.fit(case.state).ok:
        return _fault(named, _NONE, "certain")
    if weights_clean:
        return _fault(named, _BEFORE, "likely")
    state = _dropped(case, probability)
    if state is None:
        return _say(named, 2, "Unexplained: with dropout, averaged weights do not tell what each head dropped.")
    if bench.fit(state).ok:
        return _say(named, 3, "Rounding explains it, given what was dropped.")
    return _say(named, 3, "Unexplained: the output does not follow from the weights that were returned.")


def unasked(case: Case, bench: Bench) -> list[Explanation]:
    """Whether dropout explains it although the call is none of training."""
    state = _dropped(case, case.spec.dropout) if case.spec.dropout else None
    if state is None:
        return []
    fit = bench.fit(state)
    return [Explanation((_ANYWAY,), fit, 0.0)] if fit.ok else []


def _weights_ok(bench: Bench, state: State) -> bool:
    return bench.fit(state).distances["attn_weights"].ok


def _dropped(case: Case, probability: float) -> State | None:
    """The computation with the dropout that the returned weights of each head show."""
    observed = case.observed.get("attn_weights")
    if observed is None or not 0.0 < probability < 1.0:
        return None
    heads = observed if observed.ndim == 4 else observed[:, None]
    if heads.shape[1] != case.state.heads:
        return None
    keep = (np.asarray(heads, np.float64) != 0.0) / (1.0 - probability)
    return case.state.but(keep=Tensor.of("keep", keep, case.memo))


def _fault(named: Diagnosis, fault: Fault, sure: str) -> Diagnosis:
    words = fault.words[:1].upper() + fault.words[1:] + "."
    return dataclasses.replace(named, faults=(fault,), sure=sure, tried=2, words=words)


def _say(named: Diagnosis, tried: int, words: str) -> Diagnosis:
    return dataclasses.replace(named, tried=tried, words=words)
