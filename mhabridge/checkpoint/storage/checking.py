"""What every reader asks before it believes a file: that it is a regular one, and that declared shapes are shapes."""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.storage.regular import open_regular
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject
from mhabridge.errors import CheckpointError

MOST_TENSORS = 250_000  # in one checkpoint: more than twice as many as the largest models have
LONGEST_NAME = 60_000  # bytes; archives have room for 65,535, pickles are read to 65,536
_MOST_LETTERS = 16 << 20  # of all names together; an index of as many bytes as that has letters is read
_MOST_COMMAS = 8 * MOST_TENSORS  # in a JSON text: seven for a tensor of three axes in a safetensors header
_MOST_AXES = 64  # as NumPy 2; the product of many lengths could otherwise take any time
_LONGEST = 2**62


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a regular file, while the block runs.

    Raises:
        CheckpointError: it is missing, a folder, a pipe, or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        yield descriptor
    except OSError as error:
        raise CheckpointError(
            str(path), given=f"what cannot be read ({error.strerror})", expected="a checkpoint file"
        ) from error
    finally:
        os.close(descriptor)


def damaged(path: Path, why: str, expected: str) -> CheckpointError:
    """The error for a file that is not what it says.

    Example:
        >>> print(damaged(Path("a.npz"), "it ends early", "a whole .npz file"))
        a.npz: given content that cannot be read (it ends early); expected a whole .npz file. Copy or download it again.
    """
    return CheckpointError(
        str(path),
        given=f"content that cannot be read ({why})",
        expected=expected,
        advice="Copy or download it again.",
    )


def json_of(text: bytes | str, **how: Any) -> Any:
    """What a hostile JSON text says; its parts take a bounded amount of memory.

    Args:
        text: in UTF-8.
        how: more arguments for ``json.loads``.

    Raises:
        ValueError: it is no JSON, nested too deep, or has too many parts.

    Example:
        >>> json_of(b"[" * 100_000)
        Traceback (most recent call last):
        ValueError: it is nested too deep
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if data.count(b",") > _MOST_COMMAS:
        raise ValueError(f"more than {_MOST_COMMAS} values")
    try:
        return json.loads(data.decode("utf-8"), **how)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_shape(lengths: Sequence[Any]) -> bool:
    """Whether these are the lengths of a tensor's axes: integers from 0 on, and no more elements than a file can hold.

    Example:
        >>> is_shape([2, 0]), is_shape([-1]), is_shape([True]), is_shape([2] * 100)
        (True, False, False, False)
    """
    if len(lengths) > _MOST_AXES:
        return False
    size = 1
    for length in lengths:
        if type(length) is not int or not 0 <= length < _LONGEST:
            return False
        size *= max(length, 1)
    return size < _LONGEST


def require_checksums(file: StoredFile) -> None:
    """Read all of an open file, which compares the checksums that it has; it is closed when one is wrong.

    Raises:
        CheckpointError: one is wrong.
    """
    try:
        for tensor in file.values():
            collections.deque(file.chunks(tensor), maxlen=0)
    except CheckpointError:
        file.close()
        raise


def require_kept(objects: Sequence[StoredObject], holds: Callable[[StoredObject], bool], expected: str) -> None:
    """Refuse entries that are no tensors and that the target format cannot hold.

    Raises:
        CheckpointError: there are such entries.
    """
    lost = [entry.name for entry in objects if not holds(entry)]
    if lost:
        raise CheckpointError(
            ", ".join(lost[:8]),
            given="what is no plain value, or none that this format can hold",
            expected=expected,
            advice="Leave it out with drop (--drop).",
        )


def require_names(names: Sequence[str]) -> None:
    """Refuse names that occur twice, or are no text (half of a surrogate pair), and more than readers take.

    Raises:
        CheckpointError: there is such a name, or there are too many.
    """
    if len(names) > MOST_TENSORS or sum(map(len, names)) > _MOST_LETTERS:
        raise CheckpointError(
            "the target",
            given=f"{len(names)} names of {sum(map(len, names))} letters together",
            expected=f"at most {MOST_TENSORS} of {_MOST_LETTERS}",
            advice="Leave some out with drop (--drop), or write several files.",
        )
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise CheckpointError(name, given="two entries of this name", expected="one")
        try:
            length = len(name.encode("utf-8"))
        except UnicodeError as error:
            raise CheckpointError(repr(name), given=f"no text ({error})", expected="a name in UTF-8") from None
        if length > LONGEST_NAME:
            raise CheckpointError(
                f"{name[:80]}...", given=f"a name of {length} bytes", expected=f"one of at most {LONGEST_NAME}"
            )
