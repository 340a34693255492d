"""What a port computes, as data: a ``State`` says which tensors go where and what is done with them.

The clean state is the layer and the call as they should be; a hypothesis turns one state into another, so two
hypotheses after each other are a pair. Tensors carry the recipe of how they came about, and equal recipes have equal
keys: what two states have in common is computed once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.backends.running import Prepared
from mhabridge.masks import Masks
from mhabridge.weights import MHAWeights

LARGEST_MEMO = 192 * 2**20  # bytes

LETTERS = ("q", "k", "v")


class Memo:
    """Arrays by key, the ones longest unused dropped first; and short numbers for long recipes."""

    def __init__(self, limit: int = LARGEST_MEMO) -> None:
        self._limit, self._held = limit, 0
        self._numbers: dict[tuple[Hashable, ...], int] = {}
        self._arrays: collections.OrderedDict[Hashable, np.ndarray] = collections.OrderedDict()

    def number(self, *recipe: Hashable) -> int:
        """The same number for the same recipe."""
        return self._numbers.setdefault(recipe, len(self._numbers))

    def array(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of that key, made if it is not there."""
        found = self._arrays.get(key)
        if found is not None:
            self._arrays.move_to_end(key)
            return found
        made = make()
        self._arrays[key] = made
        self._held += made.nbytes
        while self._held > self._limit and len(self._arrays) > 1:
            self._held -= self._arrays.popitem(last=False)[1].nbytes
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An array and the recipe that it was made by.

    Args:
        key: of the recipe.
        shape: of the array.
        make: makes it.
        memo: where it is kept.
        rows: where it consists of rows of others: those tensors, and which of their rows, counted through all. So a
            product with it is made of products with them, and is not computed again for each choice of rows.
    """

    key: int
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    memo: Memo
    rows: tuple[tuple[Tensor, ...], np.ndarray] | None = None

    @classmethod
    def of(cls, name: Hashable, array: np.ndarray, memo: Memo) -> Tensor:
        """A tensor that was given."""
        return cls(memo.number(name), array.shape, lambda: array, memo)

    @property
    def array(self) -> np.ndarray:
        """The array itself."""
        array: np.ndarray = self.memo.array(self.key, self.make)
        return array

    def then(self, what: Hashable, function: Callable[..., np.ndarray], *others: Tensor, shape: Any = None) -> Tensor:
        """What a function makes of this tensor's array, and others'.

        Args:
            what: names the function and its parameters.
            function: takes arrays, gives one.
            *others: further tensors for it.
            shape: of what it gives, if it is another.
        """
        key = self.memo.number(what, self.key, *(other.key for other in others))
        made = functools.partial(_made, function, (self, *others))
        return Tensor(key, self.shape if shape is None else shape, made, self.memo)

    @classmethod
    def of_rows(cls, what: Hashable, sources: tuple[Tensor, ...], index: np.ndarray) -> Tensor:
        """Some rows of tensors that lie on top of each other.

        Args:
            what: names the index.
            sources: with equal axes but the first.
            index: of rows, counted through all sources.
        """
        first = sources[0]
        key = first.memo.number(what, *(source.key for source in sources))
        shape = (len(index), *first.shape[1:])
        return cls(key, shape, functools.partial(_gathered, sources, index), first.memo, (sources, index))


def _gathered(sources: tuple[Tensor, ...], index: np.ndarray) -> np.ndarray:
    arrays = [source.array for source in sources]
    return np.asarray((arrays[0] if len(arrays) == 1 else np.concatenate(arrays))[index])


def _made(function: Callable[..., np.ndarray], tensors: tuple[Tensor, ...]) -> np.ndarray:
    return function(*(tensor.array for tensor in tensors))


@dataclasses.dataclass(frozen=True)
class Mask:
    """One mask and what is done with it.

    Args:
        name: "key_padding_mask", "attn_mask" or "is_causal".
        blocked: bool, four axes of 1 or (N, H, L, S) in full; None when it blocks nothing.
        added: likewise, added to the scores.
        use: "block" (as it should be), or where else the open positions are a factor 1 and the blocked ones 0:
            "scores" (those are multiplied), "scores by mask" (with blocked as 1 and open as 0), "probabilities".
        early: what is added is added before the scores are scaled.
    """

    name: str
    blocked: Tensor | None = None
    added: Tensor | None = None
    use: str = "block"
    early: bool = False

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal for masks that do the same."""
        keys = tuple(None if each is None else each.key for each in (self.blocked, self.added))
        return (*keys, self.use, self.early)


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """One computation of an attention layer; arrays are batch first.

    Args:
        query: (N, L, E), float64.
        key: (N, S, kdim).
        value: (N, S, vdim).
        parameters: by canonical name, those that are used.
        heads: H.
        scale: factor on the scores.
        masks: those of the call.
        bias_row: bias_k and bias_v are appended as a source position.
        zero_row: a zero position is appended.
        rows_swapped: the zero position stands before the learned one.
        residual: the query is added to the output.
        split: how features become heads: "" (as they should), or without moving the axes: "batch first" takes
            (N, T, H * d) for (N, H, T, d), "sequence first" (T, N, H * d).
        merge: how heads become features: likewise.
        axis: of the softmax over (N, H, L, S).
        fully_masked: what a row of blocked positions gives: "nan", "zero" or "uniform".
        returned: the attention weights: "mean" over heads, "heads", "sum", or "scores" before the softmax, with
            "scores mean" their mean.
        keep: dropout on the weights: 0 or 1 / (1 - p), (N, H, L, S').
        keep_returned: the weights are returned after that.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    parameters: Mapping[str, Tensor]
    heads: int
    scale: float
    masks: tuple[Mask, ...]
    bias_row: bool
    zero_row: bool
    residual: bool
    fully_masked: str
    returned: str
    rows_swapped: bool = False
    split: str = ""
    merge: str = ""
    axis: int = -1
    keep: Tensor | None = None
    keep_returned: bool = True

    def but(self, **changes: Any) -> State:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_parameters(self, **changes: Tensor | None) -> State:
        """A copy with some parameters changed; None takes one away."""
        merged = {**self.parameters, **changes}
        return self.but(parameters={name: each for name, each in merged.items() if each is not None})

    def has(self, *names: str) -> bool:
        """Whether all of those parameters are there."""
        return all(name in self.parameters for name in names)

    def mask(self, name: str) -> Mask | None:
        """The mask of that name."""
        return next((mask for mask in self.masks if mask.name == name), None)

    def with_mask(self, name: str, changed: Mask | None) -> State:
        """A copy with one mask changed, added, or (None) taken away."""
        others = tuple(mask for mask in self.masks if mask.name != name)
        return self.but(masks=others if changed is None else (*others, changed))

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """Equal for states that compute the same by the same recipe."""
        parameters = tuple(sorted((name, each.key) for name, each in self.parameters.items()))
        masks = tuple(sorted((mask.key for mask in self.masks), key=repr))
        plain = (self.heads, self.scale, self.bias_row, self.zero_row, self.rows_swapped, self.residual)
        ways = (self.fully_masked, self.returned, self.split, self.merge, self.axis, self.keep_returned)
        inputs = (self.query.key, self.key.key, self.value.key, None if self.keep is None else self.keep.key)
        return (parameters, masks, plain, ways, inputs)

    # What two states have in common is looked up often, so long recipes are hashed once for each state.

    @functools.cached_property
    def projected(self) -> Mapping[str, int]:
        """By letter: equal for states that project that input to the same heads by the same recipe."""
        rows = (self.bias_row, self.zero_row, self.rows_swapped)
        given = {"q": self.query, "k": self.key, "v": self.value}
        found = {}
        for letter, tensor in given.items():
            names = [f"{letter}_weight", f"{letter}_bias", *([f"bias_{letter}"] if self.bias_row else [])]
            keys = tuple(each.key if (each := self.parameters.get(name)) else None for name in names)
            appended = None if letter == "q" else rows
            found[letter] = tensor.memo.number("heads", tensor.key, keys, self.heads, self.split, appended)
        return found

    @functools.cached_property
    def attended(self) -> int:
        """Equal for states with the same attention weights before dropout, by the same recipe."""
        how = (self.scale, tuple(mask.key for mask in self.masks), self.axis, self.fully_masked)
        return self.query.memo.number("attention", self.projected["q"], self.projected["k"], how)

    @property
    def mixes(self) -> str:
        """What cannot be computed by itself: "" (each row can), "rows" (only whole sequences), "batches" (only all)."""
        if self.axis == 0 or "sequence first" in (self.split, self.merge):
            return "batches"
        return "rows" if self.axis == -2 or self.split or self.merge else ""


def clean_state(prepared: Prepared, weights: MHAWeights, parts: Mapping[str, Masks], memo: Memo) -> State:
    """The computation as it should be.

    Args:
        prepared: the call.
        weights: the layer's parameters.
        parts: each mask by itself in canonical form, by name.
        memo: where arrays are kept.
    """
    spec, call = prepared.spec, prepared.call
    arrays = {"query": call.query, "key": call.key, "value": call.value, **weights.arrays()}
    tensors = {name: Tensor.of(name, dtypes.to_float64(array), memo) for name, array in arrays.items()}
    for name, other in (("key", "query"), ("value", "query"), ("value", "key")):
        if _same(arrays[name], arrays[other]):  # self-attention: what one is projected to, the others are
            tensors[name] = tensors[other]
    return State(
        query=tensors.pop("query"),
        key=tensors.pop("key"),
        value=tensors.pop("value"),
        parameters=tensors,
        heads=spec.num_heads,
        scale=spec.score_scale,
        masks=tuple(_mask(name, part, memo) for name, part in parts.items()),
        bias_row=spec.add_bias_kv,
        zero_row=spec.add_zero_attn,
        residual=spec.residual,
        fully_masked=call.fully_masked,
        returned="mean" if call.average_attn_weights else "heads",
    )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are views of the same numbers."""
    pointers = a.__array_interface__["data"][0], b.__array_interface__["data"][0]
    return a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype and pointers[0] == pointers[1]


def _mask(name: str, part: Masks, memo: Memo) -> Mask:
    blocked = None if part.blocked is None else Tensor.of((name, "blocked"), part.blocked, memo)
    added = None if part.added is None else Tensor.of((name, "added"), part.added, memo)
    return Mask(name, blocked, added)
