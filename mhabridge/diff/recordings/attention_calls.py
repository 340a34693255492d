"""One call of an attention layer on both sides, tensor by tensor.

What came in (inputs, masks), what the layer is (settings, weights) and what it made of them are compared apart, so that
a verdict on the output is one on the layer's own computation: each side is held against the float64 reference on its
own inputs and weights, and what is wrong with those is said of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mhabridge import dtypes
from mhabridge import masks as mask_rules
from mhabridge.diff.comparing import Comparison, compare
from mhabridge.diff.judge import Distance
from mhabridge.diff.recordings.arrays import coarsest, float64
from mhabridge.diff.recordings.canonical import AttentionCall
from mhabridge.diff.recordings.drift import Apart, Drift, apart
from mhabridge.diff.recordings.judging import Material, Piece, chosen, distances, known_accuracy
from mhabridge.diff.recordings.trained import compare_trained
from mhabridge.diff.report import REFERENCE

_COMPUTED = ("num_heads", "scale", "residual", "add_zero_attn", "add_bias_kv")  # what weights and inputs do not tell
SWAPPED = "batch and sequence are swapped on one side"
MEND_SWAPPED = "query, key, value: swap the first two axes, or set batch_first"
EXACT = Distance("equal", max_error=0.0, mean_error=0.0, times_bound=0.0, times_mean_bound=0.0)


@dataclasses.dataclass(frozen=True)
class Found:
    """One compared tensor of a call.

    Args:
        tensor: as in ``Entry``.
        comparison: likewise.
        role: "settings", "weights", "inputs", "mask", "computed" or "single_step".
        one_side: "" when both sides are compared; the side that is held against the reference alone.
    """

    tensor: str
    comparison: Comparison
    role: str
    one_side: str = ""


@dataclasses.dataclass
class Compared:
    """What was found of one call.

    Args:
        found: the tensors, in order.
        notes: what could not be compared, and what is worth knowing.
        drift: how far apart the inputs are, and the outputs where each side's is right.
        not_whole: what could not be compared although it should have been, and on which side (0 or 1) for that.
        unit: the larger unit roundoff of the two sides; 0 where nothing floats.
        trained: whether the parameters are those that training has made of others.
    """

    found: list[Found] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    drift: list[Apart] = dataclasses.field(default_factory=list)
    not_whole: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    unit: float = 0.0
    trained: bool = False

    def add(self, tensor: str, comparison: Comparison, role: str, one_side: str = "") -> None:
        """Add one compared tensor."""
        self.found.append(Found(tensor, comparison, role, one_side))
        if comparison.verdict == "equal" and len(set(comparison.dtypes)) > 1:
            self.notes.append(f"{tensor}: {' and '.join(comparison.dtypes)}: the same integers")

    def wrong(self, *roles: str) -> list[Found]:
        """What rounding does not explain, of some roles."""
        return [each for each in self.found if each.role in roles and not each.comparison.ok]

    @property
    def ok(self) -> bool:
        """Whether rounding explains all of it."""
        return all(each.comparison.ok for each in self.found)


def compare_attention(
    first: AttentionCall, second: AttentionCall, frameworks: tuple[str, str], drift: Drift, weights: str
) -> Compared:
    """Compare one call on both sides.

    Args:
        first: on one side.
        second: on the other.
        frameworks: of the two.
        drift: what the two runs have drifted apart so far.
        weights: how the weights are compared: "recorded" bit for bit, "trained" by what training makes of rounding;
            "" where they are what they were at the call before.
    """
    compared = Compared(unit=unit_of(first.dtype, second.dtype))
    _compare_settings(first, second, compared)
    arrays = first.layer.weights.arrays(), second.layer.weights.arrays()
    if weights == "recorded":
        compare_weights(*arrays, compared)
    elif weights == "trained":
        extra = max(call.layer.spec.extra_columns for call in (first, second))
        add_trained(*arrays, drift, unit_of(first.dtype, second.dtype), compared, () if extra else ("k_bias",))
    _compare_inputs(first, second, drift, compared)
    _compare_masks(first, second, frameworks, compared)
    _compare_answers(first, second, frameworks, compared)
    return compared


def _compare_settings(first: AttentionCall, second: AttentionCall, compared: Compared) -> None:
    a, b = first.layer.spec, second.layer.spec
    said = [
        f"{name} {getattr(a, name)} and {getattr(b, name)}"
        for name in _COMPUTED
        if getattr(a, name) != getattr(b, name)
    ]
    if first.random != second.random:
        said.append(f"dropout active on the {'second' if second.random else 'first'} side only")
    elif first.training != second.training:
        compared.notes.append("training mode on one side only; without dropout that changes nothing here")
    if said:
        compared.add("settings", Comparison("off", reason="; ".join(said)), "settings")
    if first.random or second.random:
        compared.notes.append(
            "dropout was active: what the layer answers is random and is not compared; record in evaluation mode"
        )
    if first.random and second.random:
        compared.not_whole += [(side, "dropout was active: what it answers is random") for side in (0, 1)]


def compare_weights(first: dict[str, np.ndarray], second: dict[str, np.ndarray], compared: Compared) -> None:
    """Compare parameters by name."""
    for name in dict.fromkeys((*first, *second)):
        compared.add(name, compare(first.get(name), second.get(name)), "weights")


def add_trained(
    first: dict[str, np.ndarray],
    second: dict[str, np.ndarray],
    drift: Drift,
    unit: float,
    compared: Compared,
    idle: tuple[str, ...] = (),
) -> None:
    """Compare parameters by name that have changed since the first call."""
    made, far = compare_trained(first, second, drift, unit, frozenset(idle))
    for name, comparison in made.items():
        compared.add(name, comparison, "weights")
    compared.drift += far
    compared.trained = True
    compared.notes.append("its parameters have changed since its call before: they are compared like gradients")


def _compare_inputs(first: AttentionCall, second: AttentionCall, drift: Drift, compared: Compared) -> None:
    unit = unit_of(first.dtype, second.dtype)
    for name in ("query", "key", "value"):
        if name in first.shared and first.shared[name] == second.shared.get(name):
            continue
        a, b = getattr(first, name), getattr(second, name)
        comparison, far = drift.compare(a, b, unit)
        if not comparison.ok and drift.compare(a, b.swapaxes(0, 1), unit)[0].ok:
            comparison = dataclasses.replace(comparison, reason=SWAPPED)
        compared.add(f"inputs.{name}", comparison, "inputs")
        compared.drift.append(far)
    if any(each.comparison.reason == SWAPPED for each in compared.wrong("inputs")):
        compared.notes.append(f"to mend: {MEND_SWAPPED}")


def unit_of(*names: str) -> float:
    """The largest unit roundoff of some dtypes."""
    return dtypes.UNIT_ROUNDOFF[coarsest(names)]


# -- masks -------------------------------------------------------------------------------------------------------------


def _compare_masks(
    first: AttentionCall, second: AttentionCall, frameworks: tuple[str, str], compared: Compared
) -> None:
    if first.passed != second.passed:
        compared.notes.append(f"masks as passed: {first.passed}; {second.passed}")
    a, b = _merged(first), _merged(second)
    if not alike(first, second) or (a is None and b is None):
        return  # where the inputs differ in shape, that is said of them
    none = np.zeros((1, 1, 1, 1))
    a, b = none if a is None else a, none if b is None else b
    if a.shape[1] != b.shape[1] and 1 not in (a.shape[1], b.shape[1]):
        compared.notes.append("masks of each head, and other numbers of heads: they are not compared")
        return
    x, y = np.broadcast_arrays(a, b)
    comparison = compare(x, y, allowed=np.isneginf(x) & np.isneginf(y))
    if not comparison.ok:
        comparison = dataclasses.replace(comparison, verdict="off", side="", reason=_how_masks_differ(x, y))
        if first.masks.sizes == second.masks.sizes and _same_effect(first, second, frameworks):
            reason = f"{comparison.reason}; here they have the same effect"
            comparison = dataclasses.replace(comparison, verdict="rounding", reason=reason)
    compared.add("mask", comparison, "mask")


def alike(first: AttentionCall, second: AttentionCall) -> bool:
    """Whether two calls have the same sizes, whatever the number of heads."""
    sizes = [dataclasses.replace(call.masks.sizes, heads=1) for call in (first, second)]
    return sizes[0] == sizes[1]


def _merged(call: AttentionCall) -> np.ndarray | None:
    return mask_rules.merge(call.masks.blocked, call.masks.added, "float64")


def _how_masks_differ(first: np.ndarray, second: np.ndarray) -> str:
    a, b = np.isneginf(first), np.isneginf(second)
    only = int((a & ~b).sum()), int((b & ~a).sum())
    if any(only):
        return f"{only[0]} positions are blocked on the first side only, {only[1]} on the second only"
    return "what is added to the scores differs"


def _same_effect(first: AttentionCall, second: AttentionCall, frameworks: tuple[str, str]) -> bool:
    """Whether the second side's masks make the first side's layer answer the same, to rounding."""
    own = Material.of(first)
    other = dataclasses.replace(own, masks=second.masks, fully_masked=second.fully_masked)
    coarse = int(dtypes.UNIT_ROUNDOFF[second.dtype] > dtypes.UNIT_ROUNDOFF[first.dtype])
    expected = known_accuracy(frameworks[coarse], coarsest((first.dtype, second.dtype)))
    for piece in chosen(own, other, (first.output, second.output)):
        observed = other.exact(piece, True)
        found = _of_piece(own, observed, piece)
        if not all(each.ok for each in distances(found, observed, expected, found.pieces()).values()):
            return False
    return True


def _of_piece(material: Material, observed: dict[str, np.ndarray], piece: Piece) -> Material:
    """The material of one piece alone."""
    call = material.prepared(piece, True)
    return dataclasses.replace(
        material, query=call.call.query, key=call.call.key, value=call.call.value, masks=call.masks
    )


# -- answers -----------------------------------------------------------------------------------------------------------


def _compare_answers(
    first: AttentionCall, second: AttentionCall, frameworks: tuple[str, str], compared: Compared
) -> None:
    if first.random or second.random:
        _check_random(first, second, compared)
        return
    materials = Material.of(first), Material.of(second)
    pieces = chosen(*materials, (first.output, second.output))
    every = materials[0].pieces()
    if len(pieces) < len(every):
        compared.notes.append(
            f"held against the reference in {len(pieces)} of {len(every)} pieces, where the sides differ most"
        )
    found = [
        distances(
            material,
            {"output": call.output, "attn_weights": call.attn_weights},
            known_accuracy(framework, call.dtype),
            pieces if material.query.shape[:2] == first.query.shape[:2] else material.pieces(),
        )
        for material, call, framework in zip(materials, (first, second), frameworks, strict=True)
    ]
    _note_policies(first, second, compared)
    _compare_output(first, second, found, compared)
    _compare_attention_weights(first, second, found, compared)


def _check_random(first: AttentionCall, second: AttentionCall, compared: Compared) -> None:
    """What holds whatever dropout does: the shape of the output, and that it is finite where a row is not masked."""
    if first.output is None or second.output is None:
        return
    for side, call, output in (("first", first, first.output), ("second", second, second.output)):
        expected = (*call.query.shape[:2], call.layer.spec.out_features)
        broken = Comparison("broken", side, shapes=(first.output.shape, second.output.shape))
        if output.shape != expected:
            reason = f"shape {output.shape}, expected {expected}"
            compared.add("output", dataclasses.replace(broken, reason=reason), "computed")
            return
        alive = ~call.masks.fully_masked(call.layer.spec.extra_columns).any(axis=1)
        if not dtypes.all_finite(output[alive]):
            compared.add("output", dataclasses.replace(broken, reason="NaN or inf"), "computed")
            return


def _note_policies(first: AttentionCall, second: AttentionCall, compared: Compared) -> None:
    if first.fully_masked != second.fully_masked:
        compared.notes.append(
            f"fully masked rows: {first.fully_masked} on the first side, {second.fully_masked} on the second"
        )


def _compare_output(
    first: AttentionCall, second: AttentionCall, found: list[dict[str, Distance]], compared: Compared
) -> None:
    if first.output is None or second.output is None:
        compared.notes.append("the output was left out of a recording: it is not compared")
        return
    allowed = _nan_rows(first, second)
    if allowed is not None:
        same = first.output.shape == second.output.shape and first.output.shape[:2] == allowed.shape
        allowed = np.broadcast_to(allowed[..., None], first.output.shape) if same else None
    judged = found[0].get("output"), found[1].get("output")
    comparison = compare(first.output, second.output, distances=judged, allowed=allowed)
    compared.add("output", _explained(comparison, compared), "computed")
    if comparison.ok and all(each is not None for each in judged):
        compared.drift.append(apart(first.output, second.output))


def _nan_rows(first: AttentionCall, second: AttentionCall) -> np.ndarray | None:
    """Rows (N, L) in which both references have NaN; None where the sides cannot be laid beside each other."""
    if first.masks.sizes != second.masks.sizes:
        return None
    dead = [
        call.masks.fully_masked(call.layer.spec.extra_columns).any(axis=1) & (call.fully_masked == "nan")
        for call in (first, second)
    ]
    return np.asarray(dead[0] & dead[1])


def _explained(comparison: Comparison, compared: Compared) -> Comparison:
    """Say why an output may be right and yet another: it is made of other things."""
    others = compared.wrong("inputs", "weights", "mask", "settings")
    if not others or not comparison.ok:
        return comparison
    names = ", ".join(each.tensor for each in others[:4])
    return dataclasses.replace(comparison, reason=f"each side is right for what it was given; {names} differ")


def _compare_attention_weights(
    first: AttentionCall, second: AttentionCall, found: list[dict[str, Distance]], compared: Compared
) -> None:
    a, b = first.attn_weights, second.attn_weights
    if a is None and b is None:
        return
    judged = found[0].get("attn_weights"), found[1].get("attn_weights")
    if a is None or b is None:
        there, array, distance = ("second", b, judged[1]) if a is None else ("first", a, judged[0])
        compared.notes.append(f"only the {there} side returned attention weights; they are held against the reference")
        if array is not None and distance is not None:
            comparison = Comparison(
                distance.verdict,
                "second" if not distance.ok else "",
                distance.reason,
                (array.shape, array.shape),
                (REFERENCE, dtypes.name_of(array)),
                max_abs=distance.max_error,
                mean_abs=distance.mean_error,
                index=distance.index,
                values=(distance.expected, distance.value),
                distances=(EXACT, distance),
            )
            compared.add("attn_weights", comparison, "computed", there)
        return
    if a.ndim != b.ndim:
        compared.notes.append(
            "attention weights of each head on one side, averaged on the other: averages are compared"
        )
        a, b = _averaged(a), _averaged(b)
    rows = _nan_rows(first, second)
    allowed = None
    fits = a.shape == b.shape and a.ndim in (3, 4)
    if rows is not None and fits and (a.shape[0], a.shape[-2]) == rows.shape:
        allowed = np.broadcast_to(rows[..., None] if a.ndim == 3 else rows[:, None, :, None], a.shape)
    comparison = compare(a, b, distances=judged, allowed=allowed)
    compared.add("attn_weights", _explained(comparison, compared), "computed")


def _averaged(array: np.ndarray) -> np.ndarray:
    return np.asarray(dtypes.round_to(float64(array).mean(axis=1), dtypes.name_of(array))) if array.ndim == 4 else array
