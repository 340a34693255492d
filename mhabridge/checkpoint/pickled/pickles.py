"""Reads a pickle without running it: our own loop over the opcodes of protocols 0 to 5, which makes inert records.

No name is looked up and nothing is called, so there is nothing for a hostile file to reach. What it can still do is ask
for memory and time: the number of operations, the length of numbers and texts, and every length against the file's
own size are checked. Cycles and deep nesting are harmless here, since nothing recurses; whoever interprets the records
has to bound that (see ``values``).

The opcodes are those of CPython's ``pickletools``, but for extension codes and out-of-band buffers: no checkpoint has
them.
"""

from __future__ import annotations

import codecs
import dataclasses
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mhabridge.checkpoint.pickled.inert import Made, Name, Node, Persistent, Slice, Table
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.streams import DAMAGED, ByteStream
from mhabridge.errors import CheckpointError

# A tensor takes about 30 operations of 6 bytes each, and each leaves at most about 130 bytes of memory behind. Many are
# allowed only where there is a file of that size: a small one must not make us take much memory.
ALWAYS_ALLOWED = 2_000_000
MAX_OPCODES = 40 * checking.MOST_TENSORS
_BYTES_EACH = 4
MAX_NAMES = 20_000  # different ones; a checkpoint has some dozens
MAX_INTEGER = 1024  # bytes
MAX_LINE = 2048  # bytes of a name or a number written as text
LONG_TEXT = 64 * 1024  # bytes; longer ones stay in the file
_FREQUENT = frozenset(("storage", "cpu", "f4", "f2", "b", "<", "|"))  # in each tensor: kept in memory once
MAX_TEXTS = 64 * 1024 * 1024  # bytes of all texts together


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is in one pickle.

    Args:
        root: the object that it stands for, as inert records.
        names: every name that it asks for, in order, also for what it throws away again.
        ids: every persistent id, in order.
        operations: how many the pickle has.
    """

    root: Node
    names: tuple[Name, ...]
    ids: tuple[Persistent, ...]
    operations: int = 0


def load(stream: ByteStream) -> Loaded:
    """One pickle, up to its end mark; the stream is left behind that.

    Args:
        stream: where it starts. Offsets in ``Slice`` records count from the start of the stream's file.

    Raises:
        CheckpointError: it is no pickle, damaged, cut off, or larger than any checkpoint's.

    Example:
        >>> import pathlib, pickle, tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(pickle.dumps([3, print], protocol=4)), file.flush()
        ...     load(ByteStream(file.fileno(), pathlib.Path("example"))).root
        [3, Name(module='builtins', name='print')]
    """
    machine, start = _Machine(stream), stream.position
    allowed, steps = most_operations(stream.left), _STEPS
    at, buffer, last = stream.at, stream.buffer, -1
    try:
        for count in range(allowed):  # noqa: B007 - how many there were is told
            if at > last:
                stream.at = at
                at, buffer = _looked_ahead(stream)
                last = len(buffer) - _LONGEST
            code = buffer[at]
            step, unpack, size, reads = steps[code]
            operand, at = at + 1, at + size
            if reads:
                stream.at = at
            if unpack is None:
                step(machine)
            else:
                step(machine, unpack(buffer, operand)[0])
            if reads:
                at, buffer = stream.at, stream.buffer
                last = len(buffer) - _LONGEST
    except _Ended:
        stream.at = at
        return Loaded(machine.result(start), tuple(machine.names), tuple(machine.ids), count)
    except (IndexError, KeyError, ValueError, TypeError) as error:
        if not reads:
            stream.at = at
        raise machine.damaged(f"an operation {bytes([code])!r} that does not fit ({error})") from error
    raise CheckpointError(
        str(stream.path),
        given=f"a pickle of more than {allowed} operations",
        expected="a checkpoint's",
        advice="Save the state dict alone, as a safetensors file for instance.",
    )


def _looked_ahead(stream: ByteStream) -> tuple[int, bytes]:
    """Where the next operation is in the buffer, and the buffer; the operation is there with its operand.

    Raises:
        CheckpointError: the file ends before.
    """
    stream.look_ahead(_LONGEST)
    at, buffer = stream.at, stream.buffer
    size = _STEPS[buffer[at]][2] if at < len(buffer) else 1
    if at + size > len(buffer):
        raise stream.cut_off(size)
    return at, buffer


def most_operations(size: int) -> int:
    """How many operations a pickle of so many bytes may have.

    Example:
        >>> most_operations(1000), most_operations(12_000_000), most_operations(2**40)
        (2000000, 3000000, 10000000)
    """
    return min(max(ALWAYS_ALLOWED, size // _BYTES_EACH), MAX_OPCODES)


class _Ended(Exception):
    """The pickle's end mark."""


class _Machine:
    """The stack, the marks and the memo. Its methods are the operations; operands that are missing raise IndexError."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.stack: list[Node] = []
        self.outer: list[list[Node]] = []  # the stacks below the open marks
        self.memo: dict[int, Node] = {}
        self.names: dict[Name, Name] = {}
        self.ids: list[Persistent] = []
        self.text_left = MAX_TEXTS

    def damaged(self, given: str) -> CheckpointError:
        where = self.stream.position
        return CheckpointError(str(self.stream.path), given=f"{given}, before byte {where}", advice=DAMAGED)

    def end(self) -> None:
        raise _Ended

    def unknown(self) -> None:
        code = self.stream.buffer[self.stream.at - 1 : self.stream.at]
        raise self.damaged(f"the byte {code!r} where an operation of a pickle belongs")

    def result(self, start: int) -> Node:
        if len(self.stack) != 1 or self.outer:
            raise self.damaged(f"a pickle (from byte {start} on) that ends with {len(self.stack)} values")
        return self.stack[0]

    # ---- reading operands

    def line(self) -> bytes:
        return self.stream.line(MAX_LINE)

    def text_at(self, offset: int, length: int, encoding: str) -> str | Slice:
        if length > LONG_TEXT:
            return Slice(offset, length, encoding)
        self.text_left -= length
        if self.text_left < 0:
            raise ValueError(f"more than {MAX_TEXTS} bytes of text")
        return self.stream.read_at(offset, length).decode(encoding)

    def text(self, length: int) -> None:
        if length > LONG_TEXT:
            self.stack.append(Slice(self.stream.skip(length), length, "utf-8"))
            return
        self.text_left -= length
        if self.text_left < 0:
            raise ValueError(f"more than {MAX_TEXTS} bytes of text")
        text = self.stream.take(length).decode("utf-8")
        self.stack.append(sys.intern(text) if text in _FREQUENT else text)

    def payload(self, length: int) -> None:
        self.stack.append(Slice(self.stream.skip(length), length))

    def old_string(self, length: int) -> None:
        """A string of Python 2: a name as a rule, but an array's bytes too."""
        offset = self.stream.skip(length)
        try:
            self.stack.append(self.text_at(offset, length, "utf-8") if length <= MAX_LINE else Slice(offset, length))
        except UnicodeDecodeError:
            self.stack.append(Slice(offset, length))

    def quoted_string(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
            raise ValueError("a string without quotes")
        self.stack.append(codecs.escape_decode(line[1:-1])[0].decode("utf-8"))

    def escaped_text(self) -> None:
        self.stack.append(self.text_at(*self.stream.skip_line(), "raw-unicode-escape"))

    def integer_line(self) -> None:
        line = self.line()
        truths = {b"00": False, b"01": True}
        self.stack.append(truths[line] if line in truths else int(line.rstrip(b"L")))

    def float_line(self) -> None:
        self.stack.append(float(self.line()))

    def long(self, length: int) -> None:
        if not 0 <= length <= MAX_INTEGER:
            raise ValueError(f"an integer of {length} bytes")
        self.stack.append(int.from_bytes(self.stream.take(length), "little", signed=True))

    def protocol(self, version: int) -> None:
        if version > 5:
            raise ValueError("an unknown protocol")

    def frame(self, length: int) -> None:
        if length > self.stream.left:
            raise ValueError(f"a frame of {length} bytes in {self.stream.left}")

    # ---- the stack and the memo

    def push(self, value: Node) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def marked(self) -> list[Node]:
        """What was pushed since the last mark, which goes away."""
        found, self.stack = self.stack, self.outer.pop()
        return found

    def push_marked(self, make: Callable[[list[Node]], Node]) -> None:
        found, self.stack = self.stack, self.outer.pop()
        self.stack.append(make(found))

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def drop_marked(self) -> None:
        self.marked()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: int) -> None:
        if not 0 <= index <= MAX_OPCODES:
            raise ValueError(f"a memo index of {index}")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    # ---- making things

    def named(self, module: str, name: str) -> Name:
        found = Name(module, name)
        found = self.names.setdefault(found, found)  # one record of each: a checkpoint asks for some a million times
        if len(self.names) > MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES} names")
        return found

    def name(self) -> None:
        self.stack.append(self.named(self.line().decode("utf-8"), self.line().decode("utf-8")))

    def stacked_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self.stack.append(self.named(module, name))

    def refer(self, id: Node) -> None:
        self.ids.append(Persistent(id))
        self.stack.append(self.ids[-1])

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._make(function, args)

    def call_with_keywords(self) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._make(function, args, keywords)

    def old_instance(self) -> None:
        name = self.named(self.line().decode("utf-8"), self.line().decode("utf-8"))
        self._make(name, tuple(self.marked()))

    def old_object(self) -> None:
        function, *args = self.marked()
        self._make(function, tuple(args))

    def _make(self, function: Node, args: Node, keywords: Node = None) -> None:
        if not isinstance(args, tuple):
            raise ValueError("arguments that are no tuple")
        if isinstance(keywords, Table) and not keywords.pairs:
            keywords = None
        self.stack.append(Made(function, args, keywords))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Made):
            raise ValueError("a state for something that has none")
        if made.state is not None:
            raise ValueError("two states for one object")
        made.state = state

    def append(self, items: list[Node]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Made)):
            raise ValueError("items for something that is no list")
        if isinstance(target, list):
            target.extend(items)
        else:
            target.items = _grown(target.items, items)

    def set_pairs(self, flat: list[Node]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (Table, Made)):
            raise ValueError("keys for something that is no dict")
        target.pairs = _grown(target.pairs, _paired(flat))

    def join(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("too few values")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def _grown(have: Sequence[Node], more: list[Node]) -> list[Node]:
    if not isinstance(have, list):
        return [*have, *more]
    have.extend(more)
    return have


def _paired(flat: list[Node]) -> list[tuple[Node, Node]]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))


_SET, _FROZENSET = Name("builtins", "set"), Name("builtins", "frozenset")


def _push(make: Callable[[], Node]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make())


def _two(machine: _Machine) -> list[Node]:
    value, key = machine.stack.pop(), machine.stack.pop()
    return [key, value]


_Operation = Callable[[_Machine], None] | tuple[Callable[[_Machine, Any], None], str]

# What each operation does, and the number that follows its byte, as ``struct`` has it.
_OPERATIONS: dict[bytes, _Operation] = {
    b".": _Machine.end,
    b"N": _push(lambda: None),
    b"\x88": _push(lambda: True),
    b"\x89": _push(lambda: False),
    b")": _push(tuple),
    b"]": _push(list),
    b"}": _push(Table),
    b"\x8f": _push(lambda: Made(_SET)),
    b"J": (_Machine.push, "<i"),
    b"K": (_Machine.push, "<B"),
    b"M": (_Machine.push, "<H"),
    b"G": (_Machine.push, ">d"),
    b"\x80": (_Machine.protocol, "<B"),
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.drop_marked,
    b"2": _Machine.duplicate,
    b"q": (_Machine.put, "<B"),
    b"r": (_Machine.put, "<I"),
    b"\x94": lambda machine: machine.put(len(machine.memo)),
    b"h": (_Machine.get, "<B"),
    b"j": (_Machine.get, "<I"),
    b"\x93": _Machine.stacked_name,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"\x92": _Machine.call_with_keywords,
    b"o": _Machine.old_object,
    b"b": _Machine.build,
    b"a": lambda machine: machine.append([machine.stack.pop()]),
    b"e": lambda machine: machine.append(machine.marked()),
    b"\x90": lambda machine: machine.append(machine.marked()),
    b"s": lambda machine: machine.set_pairs(_two(machine)),
    b"u": lambda machine: machine.set_pairs(machine.marked()),
    b"l": lambda machine: machine.push_marked(list),
    b"d": lambda machine: machine.push_marked(lambda flat: Table(_paired(flat))),
    b"t": lambda machine: machine.push_marked(tuple),
    b"\x91": lambda machine: machine.push_marked(lambda items: Made(_FROZENSET, (items,))),
    b"\x85": lambda machine: machine.join(1),
    b"\x86": lambda machine: machine.join(2),
    b"\x87": lambda machine: machine.join(3),
    b"Q": lambda machine: machine.refer(machine.stack.pop()),
}

# Those that go on to read from the stream.
_READING: dict[bytes, _Operation] = {
    b"I": _Machine.integer_line,
    b"L": _Machine.integer_line,
    b"F": _Machine.float_line,
    b"\x8a": (_Machine.long, "<B"),
    b"\x8b": (_Machine.long, "<i"),
    b"S": _Machine.quoted_string,
    b"T": (_Machine.old_string, "<i"),
    b"U": (_Machine.old_string, "<B"),
    b"V": _Machine.escaped_text,
    b"X": (_Machine.text, "<I"),
    b"\x8c": (_Machine.text, "<B"),
    b"\x8d": (_Machine.text, "<Q"),
    b"B": (_Machine.payload, "<I"),
    b"C": (_Machine.payload, "<B"),
    b"\x8e": (_Machine.payload, "<Q"),
    b"\x96": (_Machine.payload, "<Q"),
    b"\x95": (_Machine.frame, "<Q"),
    b"p": lambda machine: machine.put(int(machine.line())),
    b"g": lambda machine: machine.get(int(machine.line())),
    b"c": _Machine.name,
    b"i": _Machine.old_instance,
    b"P": lambda machine: machine.refer(machine.line().decode("utf-8")),
}


def _compiled(
    code: bytes,
) -> tuple[Callable[..., None], Callable[[bytes, int], tuple[Any, ...]] | None, int, bool]:
    """What to call, what reads the number that it is called with, how many bytes the operation has so far, and whether
    it reads more.
    """
    reads = code not in _OPERATIONS
    given = _READING.get(code, _Machine.unknown) if reads else _OPERATIONS[code]
    if not isinstance(given, tuple):
        return given, None, 1, reads
    step, form = given
    kind = struct.Struct(form)
    return step, kind.unpack_from, 1 + kind.size, reads


_STEPS = [_compiled(bytes([code])) for code in range(256)]
_LONGEST = max(size for _, _, size, _ in _STEPS)
