"""What explains a layer that diverges: the search over known faults, with what the layer should have had.

Where weights, settings or masks differ between the sides, the first side says what should have been there, and the
search explains what the second made of it on its own inputs; otherwise a side that is off on its own inputs and weights
is explained by those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.comparing import Comparison
from mhabridge.diff.diagnosis import Diagnosis
from mhabridge.diff.recordings.attention_calls import SWAPPED, Compared, alike
from mhabridge.diff.recordings.canonical import AttentionCall, Described
from mhabridge.diff.recordings.judging import known_accuracy
from mhabridge.errors import MHABridgeError

MOST = 5  # diagnoses of one report
PARTED = (
    "Unexplained by this layer: what it computes is right, and nothing of it differs but the weights that training has "
    "changed. The trainings part here: compare optimizer, learning rate, epsilon and gradients."
)
_LARGEST = 1 << 21  # scores of a call that is searched through; of a larger one some batch elements


def explain(
    name: str,
    compared: Compared,
    calls: tuple[AttentionCall, AttentionCall],
    sides: tuple[str, str],
    frameworks: tuple[str, str],
) -> list[Diagnosis]:
    """The diagnoses of one call that diverges.

    Args:
        name: of the layer in the report.
        compared: what was found.
        calls: on both sides.
        sides: their names.
        frameworks: of the two.
    """
    if any(call.random or call.output is None or not _finite(call) for call in calls):
        return []  # what comes of NaN says nothing
    first, second = calls
    other = compared.wrong("settings", "mask", *(() if compared.trained else ("weights",)))
    if not other and compared.wrong("weights") and not compared.wrong("computed"):
        return [Diagnosis(name, sides[1], words=PARTED)]
    if other:
        should = _should_have_had(first, second)
        return [] if should is None else _asked(name, sides[1], second, should, frameworks[1], compared)
    found: list[Diagnosis] = []
    for number, call in enumerate(calls):
        if _off(compared, number):
            found += _asked(name, sides[number], call, call, frameworks[number], compared)
    return found


def _finite(call: AttentionCall) -> bool:
    arrays = (call.query, call.key, call.value, *call.layer.weights.arrays().values())
    return all(dtypes.all_finite(array) for array in arrays)


def _off(compared: Compared, number: int) -> bool:
    """Whether a side is off on its own inputs and weights."""
    judged = [each.comparison.distances[number] for each in compared.found if each.tensor in ("output", "attn_weights")]
    return any(each is not None and not each.ok for each in judged)


def _should_have_had(first: AttentionCall, second: AttentionCall) -> AttentionCall | None:
    """The second side's call with the first side's layer and masks; None where they do not fit its inputs."""
    if not alike(first, second) or first.query.shape[-1] != second.query.shape[-1]:
        return None
    own = second.layer.spec
    if first.layer.spec.parameter_shapes().keys() != own.parameter_shapes().keys() and own.extra_columns:
        return None
    spec = first.layer.spec.replace(batch_first=own.batch_first, dtype=own.dtype)
    layer = Described(spec, first.layer.weights.astype(own.dtype), second.layer.dialect, second.layer.layout)
    return dataclasses.replace(second, layer=layer, masks=first.masks, asked={**first.asked})


def _comparable(weights: np.ndarray | None, should: AttentionCall) -> np.ndarray | None:
    """Attention weights, if the layer that should have been there has as many heads."""
    per_head = weights is not None and weights.ndim == 4
    return None if per_head and weights.shape[1] != should.layer.spec.num_heads else weights  # type: ignore[union-attr]


def _asked(
    name: str, side: str, observed: AttentionCall, should: AttentionCall, framework: str, compared: Compared
) -> list[Diagnosis]:
    try:
        from mhabridge.diff.diagnosis.search import diagnose
    except ImportError:  # pragma: no cover - the search is part of the package
        return []
    part = _part(observed)
    spec = should.spec
    query, key, value = (
        dtypes.round_to(array[part], spec.dtype) for array in (observed.query, observed.key, observed.value)
    )
    tensors = {"output": observed.output, "attn_weights": _comparable(observed.attn_weights, should)}
    there = {kind: np.ascontiguousarray(array[part]) for kind, array in tensors.items() if array is not None}
    expected = known_accuracy(framework, observed.dtype)
    try:
        return [
            diagnose(
                spec,
                should.layer.weights,
                (query, key, value),
                _call(should, there, part),
                there,
                expected,
                layer=name,
                side=side,
            )
        ]
    except MHABridgeError as error:
        compared.notes.append(f"not diagnosed: {error}")
        return []


def _part(call: AttentionCall) -> slice:
    """The batch elements that are looked at."""
    n, length, _ = call.query.shape
    each = max(1, call.layer.spec.num_heads * length * call.key.shape[1])
    return slice(0, max(1, min(n, _LARGEST // each)))


def _call(should: AttentionCall, there: dict[str, np.ndarray], part: slice) -> dict[str, Any]:
    """The arguments of the call, batch first, for some batch elements."""
    heads, asked = should.layer.spec.num_heads, should.asked
    padding, attention = asked.get("key_padding_mask"), asked.get("attn_mask")
    if padding is not None:
        padding = (padding if should.batched else padding[None])[part]
    if attention is not None and attention.ndim == 3:
        attention = attention[part.start * heads : part.stop * heads]
    weights = there.get("attn_weights")
    return {
        "key_padding_mask": padding,
        "attn_mask": attention,
        "is_causal": bool(asked.get("is_causal", False)),
        "need_weights": weights is not None,
        "average_attn_weights": weights is None or weights.ndim == 3,
        "fully_masked": should.fully_masked,
        "training": False,
    }


def explain_gradients(
    call: AttentionCall, grads: dict[str, np.ndarray], found: dict[str, Comparison], number: int, framework: str
) -> Diagnosis | None:
    """What explains one side's gradients; None where they are right for the gradient that came in.

    Args:
        call: on that side.
        grads: of it, by canonical name.
        found: the comparisons of both sides' gradients, by tensor.
        number: of the side: 0 or 1.
        framework: of the side.
    """
    judged = {name: found[f"grads.{name}"].distances[number] for name in grads if f"grads.{name}" in found}
    known = {name: each for name, each in judged.items() if each is not None}
    if all(each.ok for each in known.values()) or call.output is None or not _finite(call):
        return None
    # The gradient of a tensor that is several inputs is their sum, which the search knows nothing of.
    sums = {*call.shared, *call.shared.values()}
    there = {f"grads.{name}": grads[name] for name in known if name not in sums}
    if all(known[name].ok for name in known if name not in sums):
        return Diagnosis("", "", words=unexplained_gradients(found))
    from mhabridge.diff.diagnosis.search import diagnose

    part = slice(0, len(call.query))
    observed = {"output": call.output, **there}
    inputs = tuple(dtypes.round_to(each, call.spec.dtype) for each in (call.query, call.key, call.value))
    asked = {**_call(call, observed, part), "grad_output": grads["output"]}
    try:
        expected = known_accuracy(framework, call.dtype)
        return diagnose(call.spec, call.layer.weights, (inputs[0], inputs[1], inputs[2]), asked, observed, expected)
    except MHABridgeError as error:
        return Diagnosis("", "", words=f"Unexplained: {error}")


def unexplained_gradients(found: dict[str, Comparison]) -> str:
    """What can be said of gradients that no fault explains."""
    off = [name for name, each in found.items() if not each.ok]
    if "grads.output" in off:
        return "Unexplained: the gradient that comes in differs already. The fault lies behind this layer."
    return f"Unexplained: what comes out is right, and these gradients are not: {', '.join(off[:6])}."


def cause(compared: Compared) -> str:
    """What of a layer diverges, in words: what came in, what the layer is, or what it computes."""
    said = []
    inputs = compared.wrong("inputs")
    if any(each.comparison.reason == SWAPPED for each in inputs):
        said.append(SWAPPED)
    elif inputs:
        said.append("the inputs differ already: look before this layer")
    for role, words in (("settings", "the settings differ"), ("mask", "the masks differ")):
        if compared.wrong(role):
            said.append(words)
    weights = [each.tensor for each in compared.wrong("weights")]
    if weights:
        said.append(f"the weights differ: {', '.join(weights[:6])}")
    computed = compared.wrong("computed")
    if any(each is not None and not each.ok for found in computed for each in found.comparison.distances):
        said.append("the layer computes something else than its inputs and weights say")
    elif computed:
        said.append(f"what comes out differs: {', '.join(each.tensor for each in computed[:4])}")
    if compared.wrong("single_step") and not compared.wrong("settings", "weights", "computed"):
        said.append("run on the first side's inputs, the layer computes something else than they and its weights say")
    return "; ".join(said)
