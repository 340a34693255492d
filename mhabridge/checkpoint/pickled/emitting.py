"""Writes the few operations of a pickle that checkpoints need; all of them are in protocol 2.

Nothing is kept in a memo unless it is asked for: readers do not need it, and names repeat only a few bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from mhabridge.checkpoint.pickled import pickles
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.errors import CheckpointError

STOP = b"."
MARK = b"("
TUPLE = b"t"  # of all since the mark
CALL = b"R"
BUILD = b"b"
SET_ITEMS = b"u"
PERSISTENT = b"Q"
EMPTY_TUPLE = b")"
ORDERED_DICT = b"ccollections\nOrderedDict\n" + EMPTY_TUPLE + CALL

_SMALL = 2**31


def start(protocol: int) -> bytes:
    """The first bytes of a pickle."""
    return b"\x80" + bytes([protocol])


def name(module: str, attribute: str) -> bytes:
    """A reference to a class or function."""
    return f"c{module}\n{attribute}\n".encode()


def remember(index: int) -> bytes:
    """Puts the last value into the memo."""
    return b"r" + struct.pack("<I", index)


def recall(index: int) -> bytes:
    """A value from the memo."""
    return b"j" + struct.pack("<I", index)


def value(data: Any) -> bytes:
    """Plain data: None, bool, int, float, str, and lists, tuples and dicts of those.

    Raises:
        CheckpointError: a text is longer than our own reader takes.
        TypeError: something else.

    Example:
        >>> import pickle
        >>> pickle.loads(start(2) + value({"epoch": 3, "best": [0.5, None, (True,)], "big": -(2**40)}) + STOP)
        {'epoch': 3, 'best': [0.5, None, (True,)], 'big': -1099511627776}
    """
    if data is None or isinstance(data, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[data]
    if isinstance(data, int):
        return _integer(data)
    if isinstance(data, float):
        return b"G" + struct.pack(">d", data)
    if isinstance(data, str):
        text = data.encode("utf-8")
        if len(text) > pickles.LONG_TEXT:
            raise CheckpointError(
                f"{data[:60]!r}...",
                given=f"a text of {len(text)} bytes",
                expected=f"at most {pickles.LONG_TEXT}",
                advice="Leave it out with drop (--drop), or write .safetensors.",
            )
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(data, (list, tuple)):
        inner = b"".join(map(value, data))
        return b"](" + inner + b"e" if isinstance(data, list) else MARK + inner + TUPLE
    if isinstance(data, dict):
        return b"}(" + _entries(data) + SET_ITEMS
    raise TypeError(f"{type(data).__name__} is not plain data")


def _integer(number: int) -> bytes:
    if -_SMALL <= number < _SMALL:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data


def holds(entry: StoredObject) -> bool:
    """Whether an entry that is no tensor can be kept: it is plain data, and its value is known.

    Example:
        >>> holds(StoredObject("epoch", "3", 3)), holds(StoredObject("optimizer", "a dict of 2 entries"))
        (True, False)
    """
    return not entry.inert and (entry.value is not None or entry.text == "None")


def levels(
    tensors: Sequence[Outgoing], objects: Sequence[StoredObject], nested: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The plain entries of each of the dicts in each other, from the top to the state dict itself.

    Args:
        tensors: of the state dict.
        objects: the plain entries.
        nested: the keys under which the state dict lies.

    Raises:
        CheckpointError: an entry is not plain data, or a name occurs twice.

    Example:
        >>> levels([], [StoredObject("epoch", "3", 3), StoredObject("model.step", "7", 7)], ("model",))
        [{'epoch': 3}, {'step': 7}]
    """
    found: list[dict[str, Any]] = [{} for _ in range(len(nested) + 1)]
    checking.require_names([tensor.name for tensor in tensors])
    taken = [*({key} for key in nested), {tensor.name for tensor in tensors}]
    prefixes = ["".join(f"{key}." for key in nested[:depth]) for depth in range(len(nested) + 1)]
    for entry in objects:
        if not holds(entry):
            given = f"{entry.text}, which asks for {', '.join(entry.inert)}" if entry.inert else entry.text
            raise CheckpointError(entry.name, given=given, expected="plain data", advice="Leave it out.")
        depth = max(depth for depth, prefix in enumerate(prefixes) if entry.name.startswith(prefix))
        key = entry.name[len(prefixes[depth]) :]
        if key in taken[depth]:
            raise _twice(entry.name)
        taken[depth].add(key)
        found[depth][key] = entry.value
    return found


def _twice(name: str) -> CheckpointError:
    return CheckpointError(name, given="two entries of this name", expected="one", advice="One would be lost.")


def wrapped(
    tensors: Sequence[Outgoing], objects: Sequence[StoredObject], nested: Sequence[str], attribute: bytes = b""
) -> tuple[bytes, bytes]:
    """What comes before and after the names and tensors of a state dict, with everything that lies beside it.

    Args:
        tensors: of the state dict.
        objects: the plain entries.
        nested: the keys under which the state dict lies.
        attribute: operations that set something on the state dict itself.

    Raises:
        CheckpointError: an entry is not plain data, or a name occurs twice.
    """
    *outer, inner = levels(tensors, objects, nested)
    before, after = [], [SET_ITEMS + attribute]
    for key, plain in zip(nested, outer, strict=True):
        before += [b"}(", _entries(plain), value(key)]
        after.append(SET_ITEMS)
    return b"".join([*before, ORDERED_DICT, MARK, _entries(inner)]), b"".join(after)


def _entries(plain: dict[str, Any]) -> bytes:
    return b"".join(value(part) for pair in plain.items() for part in pair)
