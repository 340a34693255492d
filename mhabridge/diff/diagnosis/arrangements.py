"""What a rearrangement of rows is called: heads in another order, heads interleaved, a packed projection by heads.

An order says for each row of one matrix which row of another it is. Nothing here looks at numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

_SHOWN = 32


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A name for an order.

    Args:
        name: of the fault.
        words: what was done.
        mend: what undoes it.
    """

    name: str
    words: str
    mend: str


def arrangement(order: Sequence[int], heads: int | None, axis: str = "rows") -> Arrangement:
    """The name of a permutation.

    Args:
        order: for each row the row that it should be; every row once, and not all in their places.
        heads: how many there are; None where that is not known.
        axis: "rows" or "columns".

    Example:
        >>> arrangement([2, 3, 0, 1], 2).words
        'the heads are in the order [1, 0]'
        >>> arrangement([0, 2, 1, 3], 2).name
        'heads interleaved'
    """
    found = np.asarray(order)
    return (
        _by_heads(found, heads)
        or _interleaved(found, heads, axis)
        or _rotary(found, heads, axis)
        or _reversed(found, axis)
        or Arrangement(
            f"{axis} permuted",
            f"the {axis} are in another order, which is none of the known ones",
            f"take the {axis} in the order {_shown(np.argsort(found))}",
        )
    )


def _by_heads(order: np.ndarray, heads: int | None) -> Arrangement | None:
    """Whole blocks in another order; the largest ones that explain it, which are as large as heads or larger."""
    sizes = [len(order) // heads] if heads else [size for size in _divisors(len(order)) if size > 1][::-1]
    for size in sizes:
        blocks = order.reshape(-1, size)
        if size > 1 and (blocks[:, 0] % size == 0).all() and (blocks == blocks[:, :1] + np.arange(size)).all():
            places = blocks[:, 0] // size
            what = "the heads" if heads else f"blocks of {size} (heads?)"
            return Arrangement(
                "heads permuted",
                f"{what} are in the order {_shown(places)}",
                f"take {what} in the order {_shown(np.argsort(places))}",
            )
    return None


def _interleaved(order: np.ndarray, heads: int | None, axis: str) -> Arrangement | None:
    for count in _inner_divisors(len(order)):
        size = len(order) // count
        if (order == np.arange(len(order)).reshape(count, size).T.ravel()).all():
            told = heads in (count, size)
            known = count if heads == count or not told else size
            ways = "(heads, head size)", "(head size, heads)"
            one, other = ways if known == count else ways[::-1]
            text = f"the {axis} lie as {other} = ({size}, {count})"
            return Arrangement(
                "heads interleaved", f"{text} instead of {one}", f"bring the {axis} into the order {one}"
            )
    return None


def _rotary(order: np.ndarray, heads: int | None, axis: str) -> Arrangement | None:
    places = np.arange(len(order))
    for count in [heads] if heads else _divisors(len(order)):
        size = len(order) // count
        if size % 2 or size < 4:
            continue
        for shape, words in (((count, 2, size // 2), "halves"), ((count, size // 2, 2), "pairs")):
            if (order == places.reshape(shape).swapaxes(1, 2).ravel()).all():
                made = "pairs" if words == "halves" else "halves"
                return Arrangement(
                    "rows inside heads permuted",
                    f"inside each head the {axis} lie in {made} (for rotary embeddings) instead of {words}",
                    f"bring the {axis} inside each of {count} heads from {made} into {words}",
                )
    return None


def _reversed(order: np.ndarray, axis: str) -> Arrangement | None:
    if (order == np.arange(len(order))[::-1]).all():
        return Arrangement(f"{axis} reversed", f"the {axis} are in reverse order", f"reverse the {axis}")
    return None


def packed_arrangement(order: Sequence[int], heads: int | None) -> Arrangement | None:
    """The name of an order of all rows of q, k and v together, such as head by head (GPT-NeoX); None if it has none.

    Args:
        order: for each row of the packed projection the row that it should be.
        heads: how many there are; None where that is not known.

    Example:
        >>> rows = np.arange(24).reshape(3, 2, 4).swapaxes(0, 1).ravel()
        >>> packed_arrangement(rows, 2).words
        'the rows lie as (heads 2, 3, head size 4) instead of (3, heads 2, head size 4)'
    """
    found = np.asarray(order)
    for made, told in _packings(len(found), heads):
        if (found == made).all():
            text = f"the rows lie as {told[0]} instead of {told[1]}"
            return Arrangement("packed projection in another order", text, f"bring the rows into the order {told[1]}")
    return None


def _packings(length: int, heads: int | None) -> Iterator[tuple[np.ndarray, tuple[str, str]]]:
    for count in [heads] if heads else _divisors(length // 3):
        sizes, names = (3, count, length // 3 // count), ("3", f"heads {count}", f"head size {length // 3 // count}")
        for axes in itertools.permutations(range(3)):
            made = np.arange(length).reshape(sizes).transpose(axes).ravel()
            told = "(" + ", ".join(names[axis] for axis in axes) + ")", "(" + ", ".join(names) + ")"
            yield made, told
            yield np.argsort(made), told[::-1]


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _inner_divisors(number: int) -> list[int]:
    return _divisors(number)[1:-1]


def _shown(order: np.ndarray) -> str:
    text = ", ".join(map(str, order[:_SHOWN].tolist()))
    return f"[{text}{', ...' if len(order) > _SHOWN else ''}]"
