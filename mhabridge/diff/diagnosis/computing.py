"""Computes a ``State``: the reference's formulas, with every step open to being done wrongly.

A clean state gives what ``mhabridge.reference`` gives (a test holds the two against each other). Only a part of the
call may be computed (``Cut``), and in any arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np

from mhabridge.diff.diagnosis.state import LARGEST_MEMO, Mask, Memo, State, Tensor
from mhabridge.reference import Arithmetic

EXACT = Arithmetic(np.asarray, np.matmul)  # a state's tensors are float64 already
LARGE = 8  # a large product takes as long as small ones of so many times fewer multiply-adds
EXPONENTIAL = 20  # multiply-adds that one element of a softmax takes as long as


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """The part of a call that is computed; None: all.

    Args:
        batches: indices of batch elements.
        rows: indices of query rows.
        features: indices of output features.
    """

    batches: np.ndarray | None = None
    rows: np.ndarray | None = None
    features: np.ndarray | None = None

    def of(self, array: np.ndarray) -> np.ndarray:
        """The batch elements and rows of an array with the axes N, ..., L, features; an axis of 1 stays."""
        if self.batches is not None and array.shape[0] != 1:
            array = array[self.batches]
        if self.rows is not None and array.shape[-2] != 1:
            array = array[..., self.rows, :]
        return array


class Computer:
    """Computes states over one cut, in one arithmetic; what states have in common is computed once.

    Attributes:
        work: how much was computed so far, in multiply-adds of small products, more or less; the same on any machine.
    """

    def __init__(self, arithmetic: Arithmetic = EXACT, cut: Cut | None = None, memo: Memo | None = None) -> None:
        self.arithmetic = arithmetic
        self.cut = Cut() if cut is None else cut
        self.work = 0.0
        self._memo = Memo() if memo is None else memo
        self._passing = Memo(LARGEST_MEMO // 8)  # what few states have in common, so that it drives out nothing else
        self._outside = Cut(None if cut is None else cut.batches)  # keys and values: all rows of those batch elements

    def run(self, state: State, weights: bool = True) -> dict[str, np.ndarray]:
        """The output (N, L, out_features) and, if asked for, the attention weights as they are returned."""
        with np.errstate(all="ignore"):  # NaN and inf are results here
            found = {"output": self.output(state)}
            if weights:
                found["attn_weights"] = self.returned(state)
        return found

    # -- steps -----------------------------------------------------------------------------------------------------

    def returned(self, state: State) -> np.ndarray:
        """The attention weights as they are returned: (N, H, L, S') or (N, L, S')."""
        if state.returned.startswith("scores"):
            scores = self.scores(state)
            return scores.mean(axis=1) if state.returned == "scores mean" else scores
        attention = self.attention(state) if state.keep_returned else self.probabilities(state)
        if state.returned == "heads":
            return attention
        return np.asarray(attention.mean(axis=1) if state.returned == "mean" else attention.sum(axis=1))

    def output(self, state: State) -> np.ndarray:
        """(N, L, out_features)."""
        key = ("context", *self._dropped(state), state.projected["v"], state.merge)
        context = self._passing.array(key, lambda: self._context(state))
        output = self.project(context, state)
        if state.residual:
            query = self.arithmetic.cast(self.cut.of(state.query.array))
            output = output + (query if self.cut.features is None else query[..., self.cut.features])
        if state.fully_masked == "nan" and state.masks:
            output = np.where(self.dead(state)[..., None], np.asarray(np.nan, output.dtype), output)
        return output

    def project(self, context: np.ndarray, state: State) -> np.ndarray:
        """The output projection."""
        weight, bias = state.parameters.get("out_weight"), state.parameters.get("out_bias")
        features = self.cut.features
        if weight is None:
            return context if features is None else context[..., features]
        matrix = self._memo.array(("out", weight.key), lambda: self._columns(weight))
        self.work += context.size * matrix.shape[-1]
        output = self.arithmetic.matmul(context, matrix)
        if bias is None:
            return output
        return np.asarray(output + self.arithmetic.cast(bias.array if features is None else bias.array[features]))

    def _columns(self, weight: Tensor) -> np.ndarray:
        matrix = weight.array if self.cut.features is None else weight.array[self.cut.features]
        return self.arithmetic.cast(matrix).T

    def _context(self, state: State) -> np.ndarray:
        attention, value = self.attention(state), self.heads("v", state)
        self.work += attention.size * value.shape[-1]
        return self.merge(self.arithmetic.matmul(attention, value), state.merge)

    @staticmethod
    def merge(context: np.ndarray, how: str = "") -> np.ndarray:
        """(N, H, L, d) to (N, L, H * d)."""
        n, heads, length, size = context.shape
        if how == "batch first":
            return context.reshape(n, length, heads * size)
        if how == "sequence first":
            return context.reshape(length, n, heads * size).swapaxes(0, 1)
        return context.transpose(0, 2, 1, 3).reshape(n, length, heads * size)

    def attention(self, state: State) -> np.ndarray:
        """(N, H, L, S'), after dropout."""
        probabilities = self.probabilities(state)
        if state.keep is None:
            return probabilities
        return np.asarray(probabilities * self.arithmetic.cast(self.cut.of(state.keep.array)))

    def probabilities(self, state: State) -> np.ndarray:
        """(N, H, L, S'): the softmax of the scores."""
        return self._passing.array(("softmax", state.attended), lambda: self.softmax(self.scores(state), state))

    def scores(self, state: State) -> np.ndarray:
        """(N, H, L, S'): scaled and masked."""
        return self.score(self.heads("q", state), self.heads("k", state), state)

    def score(self, query: np.ndarray, key: np.ndarray, state: State) -> np.ndarray:
        """The scores of (N, H, L, d) and (N, H, S', d)."""
        scale = np.asarray(state.scale).astype(query.dtype)
        scores = self.arithmetic.matmul(query * scale, key.swapaxes(-1, -2))
        self.work += scores.size * (query.shape[-1] + EXPONENTIAL)
        source = scores.shape[-1] - int(state.bias_row) - int(state.zero_row)
        for mask in state.masks:
            self._apply(mask, scores[..., :source], scale)
        for mask in state.masks:  # -inf last: times and plus would undo it
            if mask.blocked is not None and mask.use == "block":
                np.copyto(
                    scores[..., :source], np.asarray(-np.inf, scores.dtype), where=self.cut.of(mask.blocked.array)
                )
        return scores

    def _apply(self, mask: Mask, scores: np.ndarray, scale: np.ndarray) -> None:
        if mask.added is not None:
            added = self.arithmetic.cast(self.cut.of(mask.added.array))
            scores += added * scale if mask.early else added
        if mask.blocked is not None and mask.use.startswith("scores"):
            blocked = self.cut.of(mask.blocked.array)
            scores *= (blocked if mask.use == "scores by mask" else ~blocked).astype(scores.dtype)

    def softmax(self, scores: np.ndarray, state: State) -> np.ndarray:
        """Over ``state.axis``, with what a fully masked row gives, and masks that come after it."""
        largest = scores.max(axis=state.axis, keepdims=True)
        exponentials = self.arithmetic.exp(scores - largest)
        probabilities = self.arithmetic.store(exponentials / exponentials.sum(axis=state.axis, keepdims=True))
        if state.fully_masked != "nan" and state.masks:
            dead = np.isneginf(scores).all(axis=-1, keepdims=True)
            instead = 0.0 if state.fully_masked == "zero" else 1.0 / scores.shape[-1]
            probabilities = np.where(dead, np.asarray(instead, scores.dtype), probabilities)
        source = scores.shape[-1] - int(state.bias_row) - int(state.zero_row)
        for mask in state.masks:
            if mask.blocked is not None and mask.use == "probabilities":
                probabilities[..., :source] *= ~self.cut.of(mask.blocked.array)
        return probabilities

    def dead(self, state: State) -> np.ndarray:
        """Rows that some head has no open position for, bool (N, L)."""
        parts = [self.cut.of(m.blocked.array) for m in state.masks if m.blocked is not None and m.use == "block"]
        query = self.cut.of(state.query.array)
        if not parts or state.bias_row or state.zero_row:
            return np.zeros(query.shape[:2], bool)
        blocked = parts[0]
        for part in parts[1:]:
            blocked = blocked | part
        return np.broadcast_to(blocked.all(axis=-1).any(axis=1), query.shape[:2])

    # -- heads -----------------------------------------------------------------------------------------------------

    def heads(self, letter: str, state: State) -> np.ndarray:
        """The projected query, key or value, (N, H, T, d), with the appended positions."""
        return self._passing.array(
            ("heads", letter == "q", state.projected[letter]), lambda: self._heads(letter, state)
        )

    def _heads(self, letter: str, state: State) -> np.ndarray:
        cut = self.cut if letter == "q" else self._outside
        given = _input(letter, state)
        weight, bias = state.parameters.get(f"{letter}_weight"), state.parameters.get(f"{letter}_bias")
        if weight is None:
            heads = np.repeat(self.arithmetic.cast(cut.of(given.array))[:, None], state.heads, axis=1)
        else:
            y = self._kept(given, cut, weight) if weight.rows is None else self._linear(given, cut, weight)
            heads = self.split(y if bias is None else y + self.arithmetic.cast(bias.array), state.heads, state.split)
        return heads if letter == "q" else self._append(heads, f"bias_{letter}", state)

    def _linear(self, given: Tensor, cut: Cut, weight: Tensor) -> np.ndarray:
        """Y = X @ W^T."""
        if weight.rows is None or self.arithmetic is not EXACT:
            x = self.arithmetic.cast(cut.of(given.array))
            self.work += x.size * weight.shape[0] / LARGE
            return self.arithmetic.matmul(x, self.arithmetic.cast(weight.array).T)
        sources, index = weight.rows
        parts = [self._kept(given, cut, source) for source in sources]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return whole[..., index]

    def _kept(self, given: Tensor, cut: Cut, weight: Tensor) -> np.ndarray:
        key = ("linear", given.key, cut is self.cut, weight.key)
        return self._memo.array(key, lambda: self._linear(given, cut, weight))

    @staticmethod
    def split(y: np.ndarray, heads: int, how: str = "") -> np.ndarray:
        """(N, T, H * d) to (N, H, T, d)."""
        n, length, features = y.shape
        if how == "batch first":
            return y.reshape(n, heads, length, features // heads)
        if how == "sequence first":
            return y.swapaxes(0, 1).reshape(n, heads, length, features // heads)
        return y.reshape(n, length, heads, features // heads).transpose(0, 2, 1, 3)

    def _append(self, x: np.ndarray, name: str, state: State) -> np.ndarray:
        n, heads, _, size = x.shape
        rows = []
        if state.bias_row and name in state.parameters:
            row = self.arithmetic.cast(state.parameters[name].array).reshape(1, heads, 1, size)
            rows.append(np.broadcast_to(row, (n, heads, 1, size)))
        elif state.bias_row:
            rows.append(np.zeros((n, heads, 1, size), x.dtype))
        if state.zero_row:
            rows.insert(0 if state.rows_swapped else len(rows), np.zeros((n, heads, 1, size), x.dtype))
        return np.concatenate([x, *rows], axis=2) if rows else x

    # -- keys ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _dropped(state: State) -> tuple[Hashable, ...]:
        return ("attention", state.attended, None if state.keep is None else state.keep.key)

    def weights_key(self, state: State) -> tuple[Hashable, ...]:
        """Of the returned weights."""
        return (*self._dropped(state), state.returned, state.keep_returned)


def _input(letter: str, state: State) -> Tensor:
    return {"q": state.query, "k": state.key, "v": state.value}[letter]
