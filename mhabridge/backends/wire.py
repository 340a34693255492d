"""How values travel between this process and a worker: never pickled, arrays as raw bytes beside a plain skeleton.

A *tree* is None, a bool, int, float, str, bytes or NumPy array, or a dict with str keys, a list or a tuple of trees.
It is sent as one message: the length of a header, the header, and perhaps the bytes of its arrays. The header is JSON,
which is in C on both sides (execnet's own serialiser took a third of a small call):

- ``tree``: an object is a dict; a list starts with its kind: "list" or "tuple" and the items, or "array" or "bytes" and
  an index into ``arrays``;
- ``arrays``: dtype, shape, memory order ("C" or "F") and path of each. Only large arrays on this host have a path, a
  file of their own that is mapped into memory. It is unlinked at once, so nobody ever writes to it again, the array
  stays valid for as long as anyone holds it, and nothing is left to clean up;
- ``stream``: where the bytes of all other arrays come from, one after the other: "message" (its end; if they are few),
  "chunks" (the items that follow it; between hosts), or the path of a file.

Received arrays are writable and belong to the receiver alone.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import struct
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge import dtypes
from mhabridge.errors import ArgumentTypeError, BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

INLINE_BYTES = 64 * 1024  # for all arrays of a message; beyond that a file is as quick as the pipe, then quicker
MAPPED_BYTES = 16 * 1024 * 1024  # below this a file is read: a mapping holds a file descriptor for as long as it lives
KEPT_BYTES = 64 * 1024 * 1024  # the largest file that is kept for the next message
CHUNK_BYTES = 1024 * 1024
_PLAIN = (type(None), bool, int, float, str)
_WRITEV = 256  # arrays in one write; Linux takes 1024
_NUMBERS = "biufc"  # kinds of dtypes
_LENGTH = struct.Struct("!I")


def send(put: Callable[[Any], None], tree: Any, outbox: Outbox | None = None) -> None:
    """Send a tree.

    Args:
        put: sends one item, as ``execnet.Channel.send`` does.
        tree: what to send; bfloat16 arrays travel as words.
        outbox: files for bulk arrays; None when the receiver is on another host.

    Raises:
        ArgumentTypeError: the tree holds something else; the error names the path. Nothing was sent.
        BackendError: there is no room for the arrays. Nothing was sent.

    Example:
        >>> items = []
        >>> send(items.append, {"query": np.arange(3.0), "shape": (1, 3)})
        >>> receive(iter(items).__next__)
        {'query': array([0., 1., 2.]), 'shape': (1, 3)}
    """
    arrays: list[np.ndarray] = []
    skeleton = _take_apart(tree, ("payload",), arrays)
    flats = [_flat_bytes(array) for array in arrays]
    paths, stream, rest = _place([flat for _, flat in flats], outbox)
    heads = [
        (_dtype_text(array.dtype), array.shape, order, path) for array, (order, _), path in zip(arrays, flats, paths)
    ]
    header = json.dumps({"tree": skeleton, "arrays": heads, "stream": stream}).encode()
    inline = rest if stream == "message" else []
    put(b"".join([_LENGTH.pack(len(header)), header, *(flat.data for flat in inline)]))
    if stream == "chunks":
        _put_chunks(put, rest)


def receive(get: Callable[[], Any], public: bool = False) -> Any:
    """Receive a tree.

    Args:
        get: receives one item, as ``execnet.Channel.receive`` does.
        public: bfloat16 as ``ml_dtypes.bfloat16``; otherwise as words.
    """
    message = get()
    start = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    header = json.loads(message[_LENGTH.size : start])
    with _reader(header["stream"], message[start:], get) as readinto:
        arrays = [_load(head, readinto) for head in header["arrays"]]
    return _put_together(header["tree"], [dtypes.to_public(array) for array in arrays] if public else arrays)


def _take_apart(tree: Any, path: tuple[Any, ...], arrays: list[np.ndarray]) -> Any:
    """The tree for the header; ``path`` is (the parent's path, a key or index), of which only an error makes a text."""
    kind = type(tree)
    if kind in _PLAIN:
        return tree
    if kind is dict:
        return {_key(key, path): _take_apart(value, (path, key), arrays) for key, value in tree.items()}
    if kind is list or kind is tuple:
        return [kind.__name__, *(_take_apart(value, (path, index), arrays) for index, value in enumerate(tree))]
    if kind in (np.ndarray, np.memmap, bytes):
        arrays.append(np.frombuffer(tree, np.uint8) if kind is bytes else _checked(tree, path))
        return ["bytes" if kind is bytes else "array", len(arrays) - 1]
    expected = "a plain value, an array, or a dict, list or tuple of them"
    raise ArgumentTypeError(_text(path), given=kind.__name__, expected=expected)


def _text(path: tuple[Any, ...]) -> str:
    return str(path[0]) if len(path) == 1 else f"{_text(path[0])}[{path[1]!r}]"


def _key(key: Any, path: tuple[Any, ...]) -> str:
    if type(key) is not str:
        raise ArgumentTypeError(_text(path), given=f"the key {key!r}", expected="keys of type str")
    return key


def _checked(array: np.ndarray, path: tuple[Any, ...]) -> np.ndarray:
    if array.dtype.kind in _NUMBERS:
        return array
    words = dtypes.to_words(array)
    if words.dtype == dtypes.BFLOAT16_WORDS:
        return words
    raise ArgumentTypeError(_text(path), given=f"an array of {array.dtype}", expected="numbers or bools")


def _put_together(skeleton: Any, arrays: list[np.ndarray]) -> Any:
    if type(skeleton) is dict:
        return {key: _put_together(value, arrays) for key, value in skeleton.items()}
    if type(skeleton) is not list:
        return skeleton
    kind = skeleton[0]
    if kind == "array":
        return arrays[skeleton[1]]
    if kind == "bytes":
        return arrays[skeleton[1]].tobytes()
    parts = [_put_together(value, arrays) for value in skeleton[1:]]
    return tuple(parts) if kind == "tuple" else parts


def _dtype_text(dtype: np.dtype) -> str:
    return dtype.str if dtype.kind in _NUMBERS else "bfloat16"


def _flat_bytes(array: np.ndarray) -> tuple[str, np.ndarray]:
    """The array's bytes in memory order "C" or "F": a view where there is one."""
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    return order, np.ascontiguousarray(array.T if order == "F" else array).reshape(-1).view(np.uint8)


def _place(flats: list[np.ndarray], outbox: Outbox | None) -> tuple[list[str | None], str, list[np.ndarray]]:
    """The path of each array that has one, the stream of the others, and the others."""
    large = [outbox is not None and flat.size >= MAPPED_BYTES for flat in flats]
    rest = [flat for flat, alone in zip(flats, large) if not alone]
    inline = sum(flat.size for flat in rest) <= INLINE_BYTES
    if outbox is None:
        return [None] * len(flats), "message" if inline else "chunks", rest
    paths: list[str | None] = []
    try:
        for flat, alone in zip(flats, large):
            paths.append(outbox.alone(flat) if alone else None)
        return paths, "message" if inline else outbox.stream(rest), rest
    except BackendError:
        for path in filter(None, paths):
            os.unlink(path)
        raise


class Outbox:
    """Files for bulk arrays to another process on this host; one for each sender.

    Args:
        places: directories, in order of preference. The files that are left in them are theirs to remove.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self.places = places
        self._stream: str | None = None
        self._stream_size = 0

    def alone(self, flat: np.ndarray) -> str:
        """A file for these bytes alone; the receiver unlinks it."""
        return self._new_file([flat])

    def stream(self, flats: list[np.ndarray]) -> str:
        """A file with these bytes one after the other.

        It serves again for the next message, since the receiver has copied from it by then: writing to fresh pages
        takes more than twice as long.
        """
        size = sum(flat.size for flat in flats)
        if self._stream and max(size, self._stream_size) <= KEPT_BYTES:
            with contextlib.suppress(OSError), open(self._stream, "r+b", buffering=0) as file:
                _write_all(file.fileno(), flats)
                self._stream_size = max(size, self._stream_size)
                return self._stream
        if self._stream:
            with contextlib.suppress(FileNotFoundError):  # somebody tidied the temporary directory up
                os.unlink(self._stream)
        self._stream, self._stream_size = None, size
        self._stream = self._new_file(flats)
        return self._stream

    def _new_file(self, flats: list[np.ndarray]) -> str:
        """In the first place with room. Written, not mapped: to map a file on a full tmpfs ends in SIGBUS."""
        problems = []
        for place in self.places:
            try:
                handle, path = tempfile.mkstemp(prefix="array-", dir=place)
            except OSError as error:
                problems.append(f"{place}: {error.strerror}")
                continue
            try:
                _write_all(handle, flats)
                return path
            except OSError as error:
                problems.append(f"{place}: {error.strerror}")
                os.unlink(path)
            finally:
                os.close(handle)
        raise BackendError(
            "arrays",
            given="; ".join(problems),
            expected=f"room for {sum(flat.size for flat in flats)} bytes",
            advice="Make room there, or set TMPDIR to a directory that has some.",
        )


def _write_all(handle: int, flats: list[np.ndarray]) -> None:
    rest = [flat.data for flat in flats]
    while rest:
        written = os.writev(handle, rest[:_WRITEV])
        while rest and written >= rest[0].nbytes:
            written -= rest.pop(0).nbytes
        if written:
            rest[0] = rest[0][written:]


def _put_chunks(put: Callable[[Any], None], flats: list[np.ndarray]) -> None:
    for flat in flats:
        for start in range(0, flat.size, CHUNK_BYTES):
            put(flat[start : start + CHUNK_BYTES].tobytes())


@contextlib.contextmanager
def _reader(stream: str, inline: bytes, get: Callable[[], Any]) -> Iterator[Callable[[memoryview], Any]]:
    """What fills a buffer, or its beginning, with the next bytes of the stream, and says how many they were."""
    if stream == "chunks":
        yield lambda buffer: _take_chunk(buffer, get())
    elif stream == "message":
        yield io.BytesIO(inline).readinto
    else:
        with open(stream, "rb", buffering=0) as file:
            yield file.readinto


def _take_chunk(buffer: memoryview, chunk: bytes) -> int:
    buffer[: len(chunk)] = chunk  # no chunk belongs to two arrays
    return len(chunk)


def _load(head: list[Any], readinto: Callable[[memoryview], Any]) -> np.ndarray:
    text, shape, order, path = head
    dtype = dtypes.BFLOAT16_WORDS if text == "bfloat16" else np.dtype(text)
    if path:
        return np.frombuffer(_map(path), dtype).reshape(shape, order=order)
    array = np.empty(shape, dtype, order=order)
    rest = array.reshape(-1, order=order).view(np.uint8).data
    while rest:
        count = readinto(rest)
        if not count:
            raise EOFError(f"{len(rest)} bytes of an array are missing")
        rest = rest[count:]
    return array


def _map(path: str) -> mmap.mmap:
    """The file in memory, private and writable; its name is gone."""
    with open(path, "rb") as file:
        os.unlink(path)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
