"""The entries of a MindSpore .ckpt, as protobuf encodes them: https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.streams import ByteStream
from mhabridge.errors import CheckpointError

# Those that MindSpore's loader knows (2.10), but for Int4, and what it only saves.
TYPES = {
    **{
        f"{kind}{bits}": f"{kind.lower()}{bits}"
        for kind, all_bits in (("Int", (8, 16, 32, 64)), ("UInt", (8, 16, 32, 64)), ("Float", (16, 32, 64)))
        for bits in all_bits
    },
    "Bool": "bool",
    "BFloat16": "bfloat16",
}
SAVED_ONLY = {"Complex64": "complex64", "Complex128": "complex128"}

_LONGEST_NAME = 64 * 1024
_MOST_NOTES = 20
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Entry:
    """One ``Value`` of the message: a tensor, or a slice of one.

    Args:
        tag: the tensor's name.
        dims: of the whole tensor.
        kind: its type as MindSpore names it.
        offset: of the first byte of its numbers.
        length: of them.
    """

    tag: str
    dims: tuple[int, ...]
    kind: str
    offset: int
    length: int


def entries(path: Path, descriptor: int, end: int, notes: dict[str, None]) -> Iterator[Entry]:
    """The entries of an open file up to ``end``, in order; their tensors' bytes are not read.

    Raises:
        CheckpointError: that is no such message, or an entry is a map tensor.
    """
    message = _Message(path, ByteStream(descriptor, path, 0, end), notes)
    for count, (number, wire, length) in enumerate(message.fields(end), 1):
        if count > checking.MOST_TENSORS:
            raise damaged(path, f"more than {checking.MOST_TENSORS} entries")
        if (number, wire) == (1, _BYTES):
            yield message.entry(message.stream.position + length)
        else:
            message.pass_over("Checkpoint", number, wire, length)


def head_of(tag: str, dims: tuple[int, ...], kind: str, length: int) -> bytes:
    r"""What comes before the bytes of one entry.

    Example:
        >>> head_of("a", (2,), "Float32", 8)
        b'\n\x1a\n\x01a\x12\x15\x08\x02\x12\x07Float32\x1a\x08'
    """
    name = tag.encode("utf-8")
    inner = b"".join(b"\x08" + varint(length) for length in dims)
    inner += b"\x12" + varint(len(kind)) + kind.encode() + b"\x1a" + varint(length)
    outer = b"\x0a" + varint(len(name)) + name + b"\x12" + varint(len(inner) + length)
    return b"\x0a" + varint(len(outer) + len(inner) + length) + outer + inner


def varint(number: int) -> bytes:
    r"""A number in groups of seven bits, the lowest first; all bytes but the last have their highest bit set.

    Example:
        >>> varint(300)
        b'\xac\x02'
    """
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is no .ckpt, or no whole one."""
    return checking.damaged(path, why, "a whole .ckpt file of MindSpore")


class _Message:
    """Reads the fields of nested messages one after another."""

    def __init__(self, path: Path, stream: ByteStream, notes: dict[str, None]) -> None:
        self.path, self.stream, self.notes = path, stream, notes

    def fields(self, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, wire type and value of each field of the message that ends there.

        Of what has a length the value is that length: whoever asked takes or skips so many bytes before going on.
        """
        while self.stream.position < end:
            key = self._varint()
            wire, value = key & 7, 0
            if wire in (_VARINT, _BYTES):
                value = self._varint()
            elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
                self.stream.skip(8 if wire == _EIGHT_BYTES else 4)
            else:
                raise damaged(self.path, f"no field begins with {key}, before offset {self.stream.position}")
            if key < 8 or self.stream.position + (value if wire == _BYTES else 0) > end:
                raise damaged(self.path, f"a field goes beyond its message, before offset {self.stream.position}")
            yield key >> 3, wire, value

    def entry(self, end: int) -> Entry:
        tags: list[str] = []
        tensors: list[tuple[tuple[int, ...], str, int, int]] = []
        maps = 0
        for number, wire, value in self.fields(end):
            if (number, wire) == (1, _BYTES):
                tags.append(self._text(value))
            elif (number, wire) == (2, _BYTES):
                tensors.append(self._tensor(self.stream.position + value))
            else:
                maps += (number, wire) == (3, _BYTES)
                self.pass_over("Value", number, wire, value)
        if len(tags) == 1 and maps:
            raise CheckpointError(
                f"{self.path}: {tags[0]}",
                given="a map tensor (a hash table of embeddings)",
                expected="tensors",
                advice="Save the model without it; there is nothing in another framework that it could become.",
            )
        if len(tags) != 1 or len(tensors) != 1:
            raise damaged(self.path, f"no entry of one tag and one tensor before offset {end}")
        return Entry(tags[0], *tensors[0])

    def pass_over(self, message: str, number: int, wire: int, value: int) -> None:
        if wire == _BYTES:
            self.stream.skip(value)
        if len(self.notes) < _MOST_NOTES:
            self.notes[f"Field {number} of {message} is not known here, and was passed over."] = None

    def _tensor(self, end: int) -> tuple[tuple[int, ...], str, int, int]:
        dims: list[int] = []
        kinds: list[str] = []
        contents: list[tuple[int, int]] = []
        for number, wire, value in self.fields(end):
            if (number, wire) == (1, _VARINT):
                dims.append(value)
            elif (number, wire) == (1, _BYTES):
                dims += self._packed(self.stream.position + value)
            elif (number, wire) == (2, _BYTES):
                kinds.append(self._text(value))
            elif (number, wire) == (3, _BYTES):
                contents.append((self.stream.skip(value), value))
            else:
                self.pass_over("TensorProto", number, wire, value)
            self._require_shape(dims)
        if len(kinds) != 1 or len(contents) != 1:
            raise damaged(self.path, f"no tensor of one type and one content before offset {end}")
        return tuple(dims), kinds[0], *contents[0]

    def _packed(self, end: int) -> list[int]:
        found: list[int] = []
        while self.stream.position < end:
            found.append(self._varint())
            self._require_shape(found)
        if self.stream.position != end:
            raise damaged(self.path, f"dims go beyond offset {end}")
        return found

    def _require_shape(self, dims: list[int]) -> None:
        if not checking.is_shape(dims):
            raise damaged(self.path, f"the dims {str(dims)[:80]} before offset {self.stream.position}")

    def _text(self, length: int) -> str:
        if length > _LONGEST_NAME:
            raise damaged(self.path, f"a name of {length} bytes at offset {self.stream.position}")
        try:
            return self.stream.take(length).decode("utf-8")
        except UnicodeError as error:
            raise damaged(self.path, f"a name that is no text: {error}") from None

    def _varint(self) -> int:
        found = 0
        for shift in range(0, 70, 7):
            (byte,) = self.stream.take(1)
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                if found < 2**64:
                    return found
                break
        raise damaged(self.path, f"no number before offset {self.stream.position}")
