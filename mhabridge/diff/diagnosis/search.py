"""``diagnose``: from what was observed to the fault that explains it, or to "unexplained"."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.diagnosis import dropping, gradients, precision
from mhabridge.diff.diagnosis.evidence import Case, read, swapped
from mhabridge.diff.diagnosis.findings import Diagnosis, Fault
from mhabridge.diff.diagnosis.trials import Explanation, Trials
from mhabridge.diff.rounding import Accuracy
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

_SWAPPED = Fault(
    "batch and sequence swapped",
    "batch_first",
    "the layer took the batch for the sequence, and the sequence for the batch",
    "query, key, value: swap the first two axes, or set batch_first",
)
_RETURNED_SWAPPED = Fault(
    "output axes swapped",
    "output",
    "the output's batch and sequence are swapped; what is computed is right",
    "output: swap the first two axes",
)


def diagnose(
    spec: MHASpec,
    weights: MHAWeights,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    call: Mapping[str, Any],
    observed: Mapping[str, np.ndarray],
    expected: Accuracy,
    *,
    layer: str = "",
    side: str = "",
) -> Diagnosis:
    """Name what explains the difference between observed tensors and the float64 reference.

    Args:
        spec: the layer.
        weights: its parameters, as they should be.
        inputs: query, key and value in the user's axis order, as for ``Backend.run``.
        call: its other arguments: masks, is_causal, need_weights, average_attn_weights, fully_masked, training,
            grad_output.
        observed: what came out, by name, in the user's shapes: "output", "attn_weights", "grads.query" ...; those that
            are there. The output alone will do; each head's weights tell most.
        expected: the dtype that it was computed in and what is known of the framework.
        layer: its path, for the report.
        side: its name, for the report.

    Returns:
        A diagnosis without faults when rounding explains all, or when nothing known does; ``words`` says which.

    Raises:
        ArgumentError: the call itself is wrong.

    Example:
        >>> from mhabridge import reference
        >>> from mhabridge.backends.running import prepare
        >>> from mhabridge.diff.inputs import random_inputs
        >>> spec = MHASpec(16, 4, batch_first=True, dtype="float32")
        >>> weights, inputs = MHAWeights.random(spec), tuple(random_inputs(spec).values())
        >>> wrong = MHAWeights(**{**weights.to_tree(), "out_weight": weights.out_weight.T})
        >>> answer = reference.attend(spec, wrong, prepare(spec, wrong, *inputs).call).output.astype("float32")
        >>> found = diagnose(spec, weights, inputs, {}, {"output": answer}, Accuracy("float32"))
        >>> found.sure, found.faults[0].mend
        ('certain', 'out_proj.weight: transpose')
    """
    named = Diagnosis(layer, side)
    case = read(spec, weights, inputs, call, observed, expected)
    if not case.observed and not case.strange:
        return _unexplained(named, 0, "neither output nor attention weights were observed")
    if not any(np.isfinite(dtypes.to_float64(array)).any() for array in case.observed.values()) and not case.strange:
        return _without_numbers(named, case)
    dropout = dropping.active(case)
    if dropout is not None:
        return dropping.diagnosed(named, case, dropout)
    trials = Trials(case)
    if not case.strange:
        clean = trials.clean()
        if clean.ok:
            return gradients.diagnosed(named, spec, weights, inputs, call, observed, expected, clean)
        found = trials.singles()
        if found:
            return _explained(named, found, trials.tried)
    rooted = _roots(spec, weights, inputs, call, observed, expected)
    found = [each for root in rooted for each in root.rooted()]
    if found:
        return _explained(named, found, trials.tried + len(rooted))
    return _deeper(named, trials, rooted)


def _without_numbers(named: Diagnosis, case: Case) -> Diagnosis:
    """Nothing but NaN: that is right only where the reference says so, and else tells nothing."""
    fit = Trials(case).clean()
    if fit.ok:
        return dataclasses.replace(named, tried=1, explains=fit.times, words="Every element is NaN, as it should be.")
    return _unexplained(named, 1, "no element is finite, and many things can do that")


def _deeper(named: Diagnosis, trials: Trials, rooted: Sequence[Trials]) -> Diagnosis:
    """Pairs, then what is no fault of the port's text: precision, and dropout that should be off."""
    case = trials.case
    found = trials.pairs() if not case.strange else []
    for root in rooted:
        found = found or root.singles()
    tried = trials.tried + sum(root.tried for root in rooted)
    if found:
        return _explained(named, found, tried)
    if not case.strange:
        found = _other_than_text(trials)
        tried += 3
    if found:
        return _explained(named, found, tried)
    strange = f"; the shape of {', '.join(case.strange)} does not fit the call" if case.strange else ""
    short = " (the search of pairs was cut short)" if trials.cut_short else ""
    return _unexplained(
        named, tried, f"none of the known faults, and no two of them, explain what was observed{strange}{short}"
    )


def _other_than_text(trials: Trials) -> list[Explanation]:
    bench = trials.bench()
    return [] if bench is None else precision.explanations(trials.case, bench) or dropping.unasked(trials.case, bench)


def _roots(
    spec: MHASpec,
    weights: MHAWeights,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    call: Mapping[str, Any],
    observed: Mapping[str, np.ndarray],
    expected: Accuracy,
) -> list[Trials]:
    """The case with axes read otherwise, which moves every other hypothesis with it."""
    roots = []
    other = swapped(spec, weights, inputs, call, observed, expected)
    if other is not None and not other.strange:
        roots.append(Trials(other, _SWAPPED))
    output = observed.get("output")
    if output is not None and np.ndim(output) == 3:
        turned = {**observed, "output": np.asarray(output).swapaxes(0, 1)}
        again = read(spec, weights, inputs, call, turned, expected)
        if not again.strange:
            roots.append(Trials(again, _RETURNED_SWAPPED))
    return roots


# -- words -------------------------------------------------------------------------------------------------------------


def _explained(named: Diagnosis, found: Sequence[Explanation], tried: int) -> Diagnosis:
    """The likeliest explanation, with all others that explain it as well."""
    best, others = found[0], found[1:]
    alone = all(each.kinds == best.kinds for each in others) and precision.FAULT not in best.kinds
    sure = "certain" if alone else "likely"  # noise looks like noise, whatever made it
    faults = " Besides, ".join(_sentence(fault.words) for fault in best.faults)
    text = f"{faults} With that, rounding explains the rest ({best.fit.times:.0%} of its bound)."
    if others:
        text += f" So would {'others' if len(others) > 1 else 'another'}: {_listed(others)}."
    return dataclasses.replace(
        named,
        faults=best.faults,
        sure=sure,
        others=tuple(each.faults for each in others),
        explains=best.fit.times,
        tried=tried,
        words=text,
    )


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _listed(others: Sequence[Explanation]) -> str:
    shown = ["; and ".join(fault.words for fault in each.faults) for each in others[:3]]
    more = [f"{len(others) - 3} more"] if len(others) > 3 else []
    return " | ".join([*shown, *more])


def _unexplained(named: Diagnosis, tried: int, why: str) -> Diagnosis:
    return dataclasses.replace(named, tried=tried, words=f"Unexplained: {why}.")
