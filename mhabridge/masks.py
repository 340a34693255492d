"""What a mask means, and its canonical form.

Frameworks accept bool, byte and float masks and disagree about them; here every mask is taken apart into two facts:
which
positions are *blocked* (attention is forbidden) and what is *added* to the scores of the others. Both have four axes,
each of them 1 or
the full size of (N, H, L, S), so a (L, S) mask is never blown up to (N, H, L, S) unless it has to be.

| mask | meaning |
|---|---|
| bool | True: may not attend |
| uint8 | non-zero: may not attend |
| wider integers | 0 and 1 as bool; anything else is refused |
| float | added to the scores; -inf: may not attend; NaN and +inf are refused |

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError

POLICIES = ("nan", "zero", "error")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that a call's masks have to fit.

    Args:
        batch: N (1 for an unbatched call).
        heads: H.
        target: L.
        source: S, without the columns that add_bias_kv and add_zero_attn append.
        batched: False for a call whose query is (L, E).
    """

    batch: int
    heads: int
    target: int
    source: int
    batched: bool = True


@dataclasses.dataclass(frozen=True)
class Masks:
    """The canonical form of a call's masks together.

    Args:
        sizes: what the masks fit.
        blocked: bool, four axes, or None when nothing is blocked.
        added: float64, finite, four axes, or None when nothing is added.
        float_masks: the names of the masks that were float (they have gradients), with their shapes.
    """

    sizes: Sizes
    blocked: np.ndarray | None = None
    added: np.ndarray | None = None
    float_masks: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def fully_masked(self, extra_columns: int = 0) -> np.ndarray:
        """Which rows have every position blocked: bool (N, H, L).

        Columns that add_bias_kv and add_zero_attn append count as open; without any source position (S = 0) there is
        nothing to block, so no row counts as masked.
        """
        sizes = self.sizes
        shape = (sizes.batch, sizes.heads, sizes.target)
        if self.blocked is None or extra_columns or not sizes.source:
            return np.zeros(shape, bool)
        return np.broadcast_to(self.blocked.all(axis=-1), shape)

    def gradients(self, grad: np.ndarray) -> dict[str, np.ndarray]:
        """The gradient of each float mask, in its own shape, from that of the added mask (N, H, L, S)."""
        return {name: _reduce(grad, name, shape) for name, shape in self.float_masks}


def canonical(key_padding_mask: Any = None, attn_mask: Any = None, is_causal: bool = False, *, sizes: Sizes) -> Masks:
    """The canonical form of two masks and the causal flag.

    Args:
        key_padding_mask: (N, S), or (S,) for an unbatched call; bool, integer or float.
        attn_mask: (L, S) or (N * H, L, S), for an unbatched call (L, S) or (H, L, S); bool, integer or float.
        is_causal: block j > i (aligned top left, also for L != S), together with the masks.
        sizes: what they have to fit.

    Raises:
        ArgumentError: a wrong shape; NaN or +inf in a float mask; an integer other than 0 and 1 in a wide integer mask.
        ArgumentTypeError: not an array of bool, integers or one of the four float dtypes.

    Example:
        >>> masks = canonical(np.array([[False, True]]), is_causal=True, sizes=Sizes(1, 1, 2, 2))
        >>> masks.blocked[0, 0].tolist()
        [[False, True], [False, True]]
    """
    parts = [
        _take_apart(key_padding_mask, "key_padding_mask", padding_shape, sizes),
        _take_apart(attn_mask, "attn_mask", attention_shape, sizes),
    ]
    blocked = [part.blocked for part in parts if part is not None and part.blocked is not None]
    added = [part.added for part in parts if part is not None and part.added is not None]
    if _flag(is_causal, "is_causal"):
        blocked.append(np.triu(np.ones((sizes.target, sizes.source), bool), k=1)[None, None])
    total = _join(np.add, added)
    if total is not None:  # two masks near the end of float64's range must not add up to -inf, which means "blocked"
        total = np.clip(total, -dtypes.LARGEST["float64"], dtypes.LARGEST["float64"])
    float_masks = [part.float_mask for part in parts if part is not None and part.float_mask is not None]
    return Masks(sizes, _join(np.logical_or, blocked), total, tuple(float_masks))


def check_policy(fully_masked: str) -> str:
    """The policy for fully masked rows, if it is one of ``POLICIES``."""
    if fully_masked not in POLICIES:
        raise ArgumentError("fully_masked", given=repr(fully_masked), expected="one of " + ", ".join(POLICIES))
    return fully_masked


def refuse_fully_masked(dead: np.ndarray) -> None:
    """Raise for the first fully masked row (policy "error").

    Args:
        dead: bool (N, H, L).

    Raises:
        ArgumentError: with batch, head and row, and how many there are.
    """
    if not dead.any():
        return
    batch, head, row = (int(index[0]) for index in np.nonzero(dead))
    raise ArgumentError(
        "attn_mask, key_padding_mask",
        given=f"a fully masked row at batch {batch}, head {head}, row {row} (of {int(dead.sum())} such rows)",
        expected="at least one open position in every row",
        advice='Unmask one, or choose fully_masked="nan" or "zero".',
    )


def merge(blocked: np.ndarray | None, added: np.ndarray | None, dtype: str) -> np.ndarray | None:
    """One additive float mask in ``dtype``, -inf where blocked; four axes; None when there is nothing to say.

    A finite value stays finite: one beyond the range of ``dtype`` becomes its largest number, since -inf would mean
    something else.

    Example:
        >>> merge(np.array([[[[True, False]]]]), np.array([[[[0.5, -1e300]]]]), "float32").tolist()
        [[[[-inf, -3.4028234663852886e+38]]]]
    """
    if blocked is None and added is None:
        return None
    limit = dtypes.LARGEST[dtype]
    values = np.zeros((1, 1, 1, 1)) if added is None else np.clip(added, -limit, limit)
    if blocked is not None:
        values = np.where(blocked, -np.inf, values)
    return dtypes.round_to(values, dtype)


# -- MegEngine's cuDNN-style pairs ---------------------------------------------------------------------------------


def decode_cudnn(attn_mask: Any, key_padding_mask: Any, source: int) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary masks from cuDNN-style pairs, as MegEngine's ``maybe_cudnn_style_mask`` means them.

    In MegEngine 1.13 (dnn/src/cuda/multi_head_attn/cudnn_fwbw.cpp) ``attn_mask`` holds, for every target row, the
    first allowed source
    position and the one after the last (its own causal mask is 0 and i + 1), and ``key_padding_mask`` holds, for every
    batch, the
    number of valid query rows and of valid keys. On a CPU MegEngine ignores both in silence.

    Args:
        attn_mask: (2, L) integers: starts, ends.
        key_padding_mask: (2, N) integers: query lengths, key lengths.
        source: S.

    Returns:
        attn_mask bool (L, S) and key_padding_mask bool (N, S), True where attention is forbidden.

    Raises:
        ArgumentError: a wrong shape, a value outside 0..S, a start after its end.
        UnsupportedError: a query length below L (its rows are padding; no mask over keys says that).

    Example:
        >>> attn, padding = decode_cudnn([[0, 0], [1, 2]], [[2], [2]], 2)
        >>> attn.tolist(), padding.tolist()
        ([[False, True], [False, False]], [[False, False]])
    """
    starts, ends = _pair(attn_mask, "attn_mask", "(2, L)")
    query_lengths, key_lengths = _pair(key_padding_mask, "key_padding_mask", "(2, N)")
    if (starts < 0).any() or (ends > source).any() or (starts > ends).any():
        raise ArgumentError(
            "attn_mask", given="a window that is not inside the source", expected=f"0 <= start <= end <= {source}"
        )
    if (key_lengths < 0).any() or (key_lengths > source).any():
        raise ArgumentError("key_padding_mask", given=f"key lengths {key_lengths.tolist()}", expected=f"0 to {source}")
    target = len(starts)
    if (query_lengths != target).any():
        raise UnsupportedError(
            "key_padding_mask",
            given=f"query lengths {query_lengths.tolist()}",
            expected=f"{target}, the whole target, in every batch",
            advice="Rows beyond a query's length are not computed by cuDNN; drop them from the output yourself.",
        )
    position = np.arange(source)
    outside = (position < starts[:, None]) | (position >= ends[:, None])
    return outside, position >= key_lengths[:, None]


def encode_cudnn(attn_mask: Any, key_padding_mask: Any, *, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of ``decode_cudnn``: cuDNN-style pairs from masks that only block.

    Args:
        attn_mask: (L, S), or None for an open one.
        key_padding_mask: (N, S), or None.
        sizes: of the call.

    Returns:
        int32 (2, L) starts and ends, int32 (2, N) query and key lengths.

    Raises:
        UnsupportedError: the mask is no single run of allowed positions for each row, no padding at the end, or adds
            numbers.

    Example:
        >>> encode_cudnn(np.array([[False, True], [False, False]]), None, sizes=Sizes(1, 1, 2, 2))[0].tolist()
        [[0, 0], [1, 2]]
    """
    windows = _runs(canonical(None, attn_mask, sizes=sizes), "attn_mask", (sizes.target, sizes.source))
    lengths = _runs(canonical(key_padding_mask, None, sizes=sizes), "key_padding_mask", (sizes.batch, sizes.source))
    if lengths[0].any():
        raise UnsupportedError(
            "key_padding_mask",
            given="padding that does not stand at the end",
            expected="valid keys first, then padding",
        )
    queries = np.full(sizes.batch, sizes.target, np.int32)
    return windows, np.stack([queries, lengths[1]])


def _pair(mask: Any, name: str, shape: str) -> tuple[np.ndarray, np.ndarray]:
    array = np.asarray(mask)
    if array.ndim != 2 or array.shape[0] != 2 or array.dtype.kind not in "iu":
        raise ArgumentError(
            name, given=f"{array.dtype} {array.shape}", expected=f"integers of shape {shape}: a cuDNN-style pair"
        )
    return array[0].astype(np.int64), array[1].astype(np.int64)


def _runs(masks: Masks, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Start and end (int32 (2, rows)) of the single run of allowed positions in each row."""
    if masks.added is not None and masks.added.any():
        raise UnsupportedError(name, given="a float mask that adds numbers", expected="a mask that only blocks")
    if masks.blocked is not None and masks.blocked.size > shape[0] * shape[1]:
        raise UnsupportedError(name, given="a mask for each head", expected="one for all heads and batches")
    blocked = np.zeros(shape, bool) if masks.blocked is None else masks.blocked.reshape(shape)
    edges = np.diff(np.pad(~blocked, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    if (np.count_nonzero(edges == 1, axis=1) > 1).any():
        row = int(np.argmax(np.count_nonzero(edges == 1, axis=1) > 1))
        raise UnsupportedError(name, given=f"several runs of allowed positions in row {row}", expected="one run a row")
    rows_open = (~blocked).any(axis=1)
    starts = np.where(rows_open, np.argmax(edges == 1, axis=1), 0)
    ends = np.where(rows_open, np.argmax(edges == -1, axis=1), 0)
    runs: np.ndarray = np.stack([starts, ends]).astype(np.int32)
    return runs


# -- one mask --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    blocked: np.ndarray | None
    added: np.ndarray | None
    float_mask: tuple[str, tuple[int, ...]] | None


def _take_apart(mask: Any, name: str, place: Any, sizes: Sizes) -> _Part | None:
    if mask is None:
        return None
    array = _as_mask(mask, name)
    shape = place(array, sizes)
    if array.dtype.kind in "biu":
        return _Part(blocked_by(array, name).reshape(shape), None, None)
    values = dtypes.to_float64(array)
    if np.isnan(values).any() or np.isposinf(values).any():
        what = "NaN" if np.isnan(values).any() else "+inf"
        raise ArgumentError(
            name,
            given=f"a float mask with {what}",
            expected="finite numbers, and -inf where attention is forbidden",
            advice="A float mask is added to the scores; for a yes/no mask pass bool (True: may not attend).",
        )
    blocked = np.isneginf(values)
    added = np.where(blocked, 0.0, values).reshape(shape)
    return _Part(blocked.reshape(shape) if blocked.any() else None, added, (name, array.shape))


def _as_mask(mask: Any, name: str) -> np.ndarray:
    if not isinstance(mask, (np.ndarray, np.generic, list, tuple)) or isinstance(mask, np.ma.MaskedArray):
        given = f"{type(mask).__module__}.{type(mask).__qualname__}"
        raise ArgumentTypeError(name, given=given, expected="a NumPy array of bool, integers or floats")
    try:
        array = np.asarray(mask)
    except Exception as error:  # ragged lists (ValueError), tensors that need a gradient or have no NumPy dtype (any)
        given = f"{type(mask).__name__} that is no array ({error})"
        raise ArgumentTypeError(name, given=given, expected="a NumPy array of bool, integers or floats") from error
    if array.dtype.kind in "biu" or dtypes.name_of(array) in dtypes.FLOATS:
        return array
    raise ArgumentTypeError(
        name,
        given=f"{type(mask).__name__} of {array.dtype}",
        expected="an array of bool, integers, " + ", ".join(dtypes.FLOATS),
        advice="True means that a position may not be attended to.",
    )


def blocked_by(array: np.ndarray, name: str) -> np.ndarray:
    """What a bool or integer mask blocks."""
    if array.dtype.kind != "b" and array.dtype != np.uint8 and ((array != 0) & (array != 1)).any():
        wrong = array[(array != 0) & (array != 1)].flat[0]
        raise ArgumentError(
            name,
            given=f"{int(wrong)} in a mask of {array.dtype}",
            expected="only 0 and 1 (frameworks read other integers in different ways)",
            advice="Convert it to bool (True: may not attend) or to float (added to the scores).",
        )
    return np.asarray(array != 0)


def padding_shape(array: Any, sizes: Sizes) -> tuple[int, ...]:
    """The four axes of a key_padding_mask, if its shape is right."""
    expected = (sizes.batch, sizes.source) if sizes.batched else (sizes.source,)
    if tuple(array.shape) != expected:
        letters = "(N, S)" if sizes.batched else "(S,)"
        raise ArgumentError("key_padding_mask", given=f"shape {tuple(array.shape)}", expected=f"{letters} = {expected}")
    return (sizes.batch, 1, 1, sizes.source)


def attention_shape(array: Any, sizes: Sizes) -> tuple[int, ...]:
    """The four axes of an attn_mask, if its shape is right."""
    flat = (sizes.target, sizes.source)
    full = (sizes.batch * sizes.heads, *flat)
    if tuple(array.shape) == flat:
        return (1, 1, *flat)
    if tuple(array.shape) == full:
        return (sizes.batch, sizes.heads, *flat)
    letters = "(N * H, L, S)" if sizes.batched else "(H, L, S)"
    raise ArgumentError(
        "attn_mask", given=f"shape {tuple(array.shape)}", expected=f"(L, S) = {flat} or {letters} = {full}"
    )


def _join(operation: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    if not parts:
        return None
    joined = parts[0]
    with np.errstate(over="ignore"):
        for part in parts[1:]:
            joined = operation(joined, part)
    return joined


def _reduce(grad: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "key_padding_mask":
        grad = grad.sum(axis=(1, 2))
    elif len(shape) == 2:
        grad = grad.sum(axis=(0, 1))
    return grad.reshape(shape)


def _flag(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ArgumentTypeError(name, given=repr(value), expected="True or False")
