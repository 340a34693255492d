"""Whether two stored tensors have the same bits, read in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from mhabridge.checkpoint.storage import transposing
from mhabridge.checkpoint.storage.memory import Scratch, same, start_between
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor, bytes_of

_PIECE = 4 << 20  # bytes of each side; after each of smaller ones threads wait for Python's lock

Watch = Callable[[memoryview], None]


def same_bits(
    mine: StoredFile,
    view: StoredTensor,
    theirs: StoredFile,
    other: StoredTensor,
    scratch: Scratch | None = None,
    watch: Watch | None = None,
) -> bool:
    """Whether two tensors (or views) have the same dtype, shape and bits; no checksum is looked at.

    One of them may be transposed. Of others, only those that do not lie in the file as they are are read whole.

    Args:
        mine: the file of the first.
        view: the first.
        theirs: the file of the second.
        other: the second.
        scratch: memory to work in.
        watch: called with each piece of the first, in C order, once it is compared.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (view.dtype, view.shape) != (other.dtype, other.shape):
        return False
    watch = watch or (lambda piece: None)
    view, other = (dataclasses.replace(one, checksum=None) for one in (view, other))
    if not other.plain and not view.plain:
        first, second = bytes_of(mine.words(view)), bytes_of(theirs.words(other))
        watch(first)
        return same(first, second)
    scratch, swapped = scratch or Scratch(), view.plain and not other.plain
    if swapped:
        mine, view, theirs, other = theirs, other, mine, view
    buffer, position = scratch.beside.take(min(_PIECE, other.nbytes), start_between(other.place)).data, 0
    for piece in _pieces(mine, view, scratch):
        for start in range(0, len(piece), _PIECE):
            part = piece[start : start + _PIECE]
            theirs.fill(other, position + start, [buffer[: len(part)]])
            if not same(part, buffer[: len(part)]):
                return False
            watch(buffer[: len(part)] if swapped else part)
        position += len(piece)
    return True


def _pieces(file: StoredFile, view: StoredTensor, scratch: Scratch) -> Iterator[memoryview]:
    """A tensor's bytes in C order."""
    matrix = transposing.source_of(view)
    if matrix is not None:
        yield from transposing.panels(file, matrix, scratch)
    elif not view.plain:
        yield bytes_of(file.words(view))
    else:
        buffer = scratch.take(min(_PIECE, view.nbytes), start_between(view.place)).data
        for position in range(0, view.nbytes, _PIECE):
            piece = buffer[: min(_PIECE, view.nbytes - position)]
            file.fill(view, position, [piece])
            yield piece


def all_zero(file: StoredFile, view: StoredTensor) -> bool:
    """Whether a tensor is all zeros, of either sign."""
    words = file.words(view)
    magnitude = np.array((1 << (8 * view.item_size - 1)) - 1, words.dtype)  # all but the sign
    return not np.any(words & magnitude)
