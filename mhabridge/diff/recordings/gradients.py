"""Recorded gradients of one attention call on both sides.

The gradient of the output came from later layers and is compared by how far it may have drifted, backwards through the
model; the others are the layer's own, and each side is held against the float64 reference for the gradient of the
output that it was given. Those of parameters add up over all calls of a layer in one backward, so they are judged
where that was one, and otherwise compared by drift. One that a side lacks is broken, unless its recording says that it
was left out.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mhabridge import dtypes, reference
from mhabridge.diff.comparing import Comparison, Measure, compare, decide
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.recordings.attention_calls import Compared, unit_of
from mhabridge.diff.recordings.canonical import AttentionCall, Grads
from mhabridge.diff.recordings.drift import Apart, Drift, apart
from mhabridge.diff.recordings.judging import Material, Piece, affordable_whole, known_accuracy
from mhabridge.diff.recordings.trained import with_bias
from mhabridge.diff.rounding import SAMPLES, bounds_of, noisy
from mhabridge.reference import FLOAT64, Arithmetic

_INPUTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Like:
    """The shape and dtype of a tensor that is no longer there."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Backward:
    """The gradients of one call, compared as far as it can be done before the later layers are known.

    Args:
        comparisons: by tensor, of those that have a reference.
        waiting: by tensor, of the others: what they were like, their differences, and how far apart they are.
        unit: the unit roundoff.
    """

    comparisons: dict[str, Comparison]
    waiting: dict[str, tuple[Like | None, Like | None, Measure, Apart]]
    unit: float

    def settle(self, drift: Drift) -> dict[str, Comparison]:
        """All comparisons, by tensor, once it is known what the gradients drifted apart in later layers."""
        found = {}
        for name, (first, second, measure, far) in self.waiting.items():
            why = drift.explains(far, self.unit)
            comparison = decide(first, second, measure, within=not why)
            if comparison.verdict == "off" and why:
                comparison = dataclasses.replace(comparison, reason=why)
            elif comparison.ok:
                drift.add(far)
            found[name] = comparison
        return {**found, **self.comparisons}


def compare_gradients(
    calls: tuple[AttentionCall, AttentionCall],
    grads: tuple[Grads, Grads],
    frameworks: tuple[str, str],
    once: bool,
    compared: Compared,
) -> Backward | None:
    """Compare the gradients of one call; None where neither side has any.

    Args:
        calls: on both sides.
        grads: on both sides.
        frameworks: of the two.
        once: whether this was the layer's only call in that backward, on both sides.
        compared: where notes go, and what is not whole.
    """
    arrays = first, second = grads[0].arrays, grads[1].arrays
    for side, each in enumerate(grads):
        compared.notes += each.unread
        compared.not_whole += [(side, why) for why in each.unread]
    if not (first or second) or any(call.random for call in calls):
        return None
    judged = [_judged(*side, once) for side in zip(calls, arrays, frameworks, strict=True)]
    comparisons, waiting = {}, {}
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        distances = judged[0].get(name), judged[1].get(name)
        if a is None or b is None:
            if _is_excused(name, grads, compared):
                continue
            comparisons[f"grads.{name}"] = compare(a, b)
        elif name != "output" and all(each is not None for each in distances):
            comparisons[f"grads.{name}"] = compare(a, b, distances=distances, allowed=_nan(a, b))
        else:
            waiting[f"grads.{name}"] = _measured(a, b, with_bias(name, first), with_bias(name, second))
    return Backward(comparisons, waiting, unit_of(calls[0].dtype, calls[1].dtype))


def _is_excused(name: str, grads: tuple[Grads, Grads], compared: Compared) -> bool:
    """Whether a gradient that one side lacks is no fault, but makes the comparison less than whole.

    An input may have none on one side: it depends on no parameter, or is the very tensor of another input there.
    """
    lacking = 0 if name not in grads[0].arrays else 1
    if name not in grads[lacking].left_out and name not in _INPUTS:
        return False
    compared.notes.append(f"only the {('second', 'first')[lacking]} side has the gradient of {name}")
    compared.not_whole.append((lacking, f"the gradient of {name} is not there"))
    return True


def _nan(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Where both may be NaN: the reference decided that, for each side."""
    if a.shape != b.shape:
        return None
    return np.asarray(np.isnan(dtypes.to_float64(a)) & np.isnan(dtypes.to_float64(b)))


def _measured(
    a: np.ndarray, b: np.ndarray, x: np.ndarray | None, y: np.ndarray | None
) -> tuple[Like | None, Like | None, Measure, Apart]:
    """What is kept of two gradients, which are seen as parts of x and y."""
    measure, far = Measure(), Apart(0.0, 0.0, 0.0)
    if a.shape == b.shape:
        measure.add(a, b)
        alike = x is not None and y is not None and x.shape == y.shape
        far = far if measure.strange is not None else apart(x, y) if alike else apart(a, b)  # type: ignore[arg-type]
    return Like(a.shape, dtypes.name_of(a)), Like(b.shape, dtypes.name_of(b)), measure, far


def _judged(call: AttentionCall, grads: dict[str, np.ndarray], framework: str, once: bool) -> dict[str, Distance]:
    """One side's gradients beside the reference, for the gradient of the output that it was given."""
    material = Material.of(call)
    shape = (*call.query.shape[:2], call.layer.spec.out_features)
    given = grads.get("output")
    if given is None or given.shape != shape or call.random or not affordable_whole(material):
        return {}
    exact = _computed(material, given, call, grads, FLOAT64)
    wanted = [name for name in grads if name in exact and (once or name in _INPUTS)]
    expected = known_accuracy(framework, call.dtype)
    arithmetic = noisy(expected, np.random.default_rng(0))
    drawn = [_computed(material, given, call, grads, arithmetic) for _ in range(SAMPLES)]
    samples = [{f"grads.{name}": sample[name] for name in wanted} for sample in drawn]
    limits = bounds_of({f"grads.{name}": exact[name] for name in wanted}, samples, expected.dtype)
    return {name: judge(grads[name], exact[name], limits[f"grads.{name}"]) for name in wanted}


def _computed(
    material: Material, given: np.ndarray, call: AttentionCall, grads: dict[str, np.ndarray], arithmetic: Arithmetic
) -> dict[str, np.ndarray]:
    """The reference's gradients; of a tensor that was passed as several inputs their sum, as it was recorded."""
    n, length, _ = material.query.shape
    prepared = material.prepared(Piece(slice(0, n), slice(0, length)), None)
    asked = dataclasses.replace(prepared.call, grad_output=given)
    found = dict(reference.attend(material.spec, material.weights, asked, arithmetic=arithmetic).grads)
    for name, other in call.shared.items():
        if name not in grads and other in found:
            found[other] = found[other] + found.pop(name)
    return found
