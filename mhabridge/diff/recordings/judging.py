"""Recorded attention calls beside the float64 reference: each side on its own inputs and weights, in bounded memory.

A row of the output needs its own query and the keys and values of its batch element, so a large call is judged in
pieces of batch elements and rows, one after another. The bound of a row comes from that row in any case; the bound of
the mean is that of each piece. What takes too long to judge is judged in the pieces in which the two sides differ most,
and the report says how many these are: elsewhere the sides are nearer to each other than where rounding explains it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mhabridge import mapping, masks, reference
from mhabridge.backends.running import Prepared
from mhabridge.calls import Call
from mhabridge.diff.comparing import VERDICTS
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.recordings.arrays import float64
from mhabridge.diff.recordings.canonical import AttentionCall
from mhabridge.diff.rounding import SAMPLES, Accuracy, accuracy, bounds, named
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

_SCORES = 1 << 20  # of one piece: memory is some hundred bytes for each
_WORK = 60e9  # multiplications of one call: some seconds


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some batch elements, and some rows of each."""

    batch: slice
    rows: slice

    def of_output(self, array: np.ndarray) -> np.ndarray:
        """The part of an (N, L, E) array."""
        return array[self.batch, self.rows]

    def of_weights(self, array: np.ndarray) -> np.ndarray:
        """The part of an (N, H, L, S) or (N, L, S) array."""
        return array[self.batch, ..., self.rows, :]

    def cut(self, name: str, array: np.ndarray) -> np.ndarray:
        """The part of an output or of attention weights."""
        return self.of_weights(array) if name == "attn_weights" else self.of_output(array)

    def place(self, name: str, index: tuple[int, ...]) -> tuple[int, ...]:
        """An index in the part as one in the whole."""
        row = len(index) - 2
        starts = {0: self.batch.start, row: self.rows.start}
        return tuple(i + starts.get(axis, 0) for axis, i in enumerate(index))


@dataclasses.dataclass(frozen=True)
class Material:
    """What the reference computes with: one layer on one set of inputs, batch first."""

    spec: MHASpec
    weights: MHAWeights
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    masks: masks.Masks
    fully_masked: str = "nan"

    @classmethod
    def of(cls, call: AttentionCall) -> Material:
        """A call's own."""
        return cls(call.spec, call.layer.weights, call.query, call.key, call.value, call.masks, call.fully_masked)

    def pieces(self) -> list[Piece]:
        """The whole call in pieces of bounded size."""
        n, length, _ = self.query.shape
        columns = max(1, self.spec.num_heads * (self.key.shape[1] + self.spec.extra_columns))
        rows = max(1, min(length, _SCORES // columns))
        batch = max(1, _SCORES // max(1, columns * rows)) if rows == length else 1
        return [
            Piece(slice(b, min(b + batch, n)), slice(r, min(r + rows, length)))
            for b in range(0, n, batch)
            for r in range(0, length, rows)
        ]

    def work(self, piece: Piece) -> float:
        """About how many multiplications it takes to judge a piece."""
        spec, source = self.spec, self.key.shape[1]
        batch, rows = piece.batch.stop - piece.batch.start, piece.rows.stop - piece.rows.start
        width = spec.num_heads * max(spec.q_head_dim, spec.v_head_dim)
        projections = rows * width * (spec.embed_dim + spec.out_features)
        projections += source * width * (spec.key_features + spec.value_features)
        return float(3 * SAMPLES * batch * (projections + 2 * rows * source * width))

    def prepared(self, piece: Piece, per_head: bool | None) -> Prepared:
        """The canonical call of a piece; per_head None: without attention weights."""
        n, length = piece.batch.stop - piece.batch.start, piece.rows.stop - piece.rows.start
        sizes = masks.Sizes(n, self.spec.num_heads, length, self.key.shape[1])
        blocked, added = (_cut_mask(mask, piece) for mask in (self.masks.blocked, self.masks.added))
        found = masks.Masks(sizes, blocked, added)
        call = Call(
            self.query[piece.batch, piece.rows],
            self.key[piece.batch],
            self.value[piece.batch],
            blocked,
            added,
            need_weights=per_head is not None,
            average_attn_weights=not per_head,
            fully_masked=self.fully_masked,
        )
        return Prepared(self.spec, call, found, True, found.fully_masked(self.spec.extra_columns), True)

    def exact(self, piece: Piece, per_head: bool | None) -> dict[str, np.ndarray]:
        """The reference's output and attention weights of a piece."""
        return named(reference.attend(self.spec, self.weights, self.prepared(piece, per_head).call))

    def all_weights(self) -> np.ndarray:
        """The reference's attention weights of each head, float32 (N, H, L, S'): for pictures."""
        n, length, _ = self.query.shape
        shape = (n, self.spec.num_heads, length, self.key.shape[1] + self.spec.extra_columns)
        found = np.zeros(shape, np.float32)
        for piece in self.pieces():
            piece.of_weights(found)[...] = self.exact(piece, True)["attn_weights"]
        return found


def _cut_mask(mask: np.ndarray | None, piece: Piece) -> np.ndarray | None:
    """The part of a mask of four axes, each of them whole or 1."""
    if mask is None:
        return None
    mask = mask[piece.batch] if mask.shape[0] > 1 else mask
    return mask[:, :, piece.rows] if mask.shape[2] > 1 else mask


def known_accuracy(framework: str, dtype: str) -> Accuracy:
    """What is known of a framework in a dtype; of an unknown one that it rounds as IEEE 754 says."""
    return accuracy(framework, dtype) if framework in mapping.names() else Accuracy(dtype)


def distances(
    material: Material,
    observed: Mapping[str, np.ndarray | None],
    expected: Accuracy,
    pieces: Sequence[Piece],
) -> dict[str, Distance]:
    """What is observed of a call beside the reference.

    Args:
        material: what it was computed from.
        observed: "output" (N, L, E) and "attn_weights", those that are there.
        expected: the dtype, and what is known of the framework.
        pieces: of the call, those to judge.
    """
    there = {name: array for name, array in observed.items() if array is not None}
    shapes = _shapes(material, there)
    found = {name: Distance("broken", f"shape {there[name].shape}, expected {shapes[name]}") for name in there}
    there = {name: array for name, array in there.items() if array.shape == shapes[name]}
    weights = there.get("attn_weights")
    per_head = None if weights is None else weights.ndim == 4
    parts: dict[str, list[tuple[Piece, Distance]]] = {name: [] for name in there}
    for piece in pieces if there else ():
        prepared = material.prepared(piece, per_head)
        exact = named(reference.attend(material.spec, material.weights, prepared.call))
        limits = bounds(prepared, material.weights, exact, expected)
        for name, array in there.items():
            parts[name].append((piece, judge(piece.cut(name, array), exact[name], limits[name])))
    return {**found, **{name: merged(name, each) for name, each in parts.items() if each}}


def _shapes(material: Material, there: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    n, length, _ = material.query.shape
    columns = material.key.shape[1] + material.spec.extra_columns
    heads = (material.spec.num_heads,) if "attn_weights" in there and there["attn_weights"].ndim == 4 else ()
    return {"output": (n, length, material.spec.out_features), "attn_weights": (n, *heads, length, columns)}


def merged(name: str, parts: Sequence[tuple[Piece, Distance]]) -> Distance:
    """The distance of a whole tensor from those of its pieces: the worst of them, with its place in the whole."""
    rank = VERDICTS.index
    verdict = max((distance.verdict for _, distance in parts), key=rank)
    among = [(piece, distance) for piece, distance in parts if distance.verdict == verdict]
    piece, worst = max(among, key=lambda each: -1.0 if math.isnan(each[1].times_bound) else each[1].times_bound)
    errors = [distance.max_error for _, distance in parts if distance.max_error == distance.max_error]
    means = [distance.mean_error for _, distance in parts if distance.mean_error == distance.mean_error]
    times = [
        distance.times_mean_bound for _, distance in parts if distance.times_mean_bound == distance.times_mean_bound
    ]
    nan = float("nan")
    return dataclasses.replace(
        worst,
        max_error=max(errors, default=nan),
        mean_error=sum(means) / len(means) if means else nan,
        times_mean_bound=max(times, default=nan),
        index=None if worst.index is None else piece.place(name, worst.index),
    )


def chosen(first: Material, second: Material, outputs: tuple[np.ndarray | None, np.ndarray | None]) -> list[Piece]:
    """The pieces to judge: all of them, or those in which the two sides' outputs differ most."""
    pieces = first.pieces()
    total = sum(first.work(piece) + second.work(piece) for piece in pieces)
    if total <= _WORK:
        return pieces
    ordered = sorted(pieces, key=lambda piece: -_difference(piece, outputs))
    return sorted(_affordable(ordered, first, second), key=lambda piece: (piece.batch.start, piece.rows.start))


def affordable_whole(material: Material) -> bool:
    """Whether a call, and its gradients, can be judged in one piece."""
    pieces = material.pieces()
    return len(pieces) <= 2 and 3.0 * sum(map(material.work, pieces)) <= _WORK


def _affordable(pieces: Sequence[Piece], first: Material, second: Material) -> Iterator[Piece]:
    left = _WORK
    for number, piece in enumerate(pieces):
        left -= first.work(piece) + second.work(piece)
        if left < 0 and number:
            return
        yield piece


def _difference(piece: Piece, outputs: tuple[np.ndarray | None, np.ndarray | None]) -> float:
    first, second = outputs
    if first is None or second is None or first.shape != second.shape or first.ndim != 3:
        return 0.0
    a, b = float64(piece.of_output(first)), float64(piece.of_output(second))
    with np.errstate(invalid="ignore"):
        largest = np.abs(a - b).max(axis=-1) / np.maximum(np.abs(a).max(axis=-1), 1e-300)
    return float(np.where(np.isnan(largest), np.inf, largest).max(initial=0.0))
