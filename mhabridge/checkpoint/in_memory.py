"""The tensors of a plan as arrays, each made when it is looked up, in the bytes that a file would have got."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.storage.stored import NOT_IN_NUMPY
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError


class MemorySink(Sink):
    """Bytes go into memory, which ``aim`` chooses, instead of a file."""

    def __init__(self) -> None:
        super().__init__(-1)
        self._memory = memoryview(b"")

    def aim(self, memory: memoryview) -> None:
        """Fill this memory from now on."""
        self._memory, self.position = memory, 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._room(len(view))[:] = view

    def copy(self, source: int, offset: int, length: int) -> None:
        """Append bytes of a file."""
        left = self._room(length)
        while left:
            got = os.preadv(source, [left], offset)
            if not got:
                raise CheckpointError("source", given="a file that ends too early", expected=f"{len(left)} bytes more")
            left, offset = left[got:], offset + got

    def _room(self, length: int) -> memoryview:
        start, self.position = self.position, self.position + length
        if self.position > len(self._memory):
            raise CheckpointError(
                "target", given=f"{self.position} bytes", expected=f"{len(self._memory)}, as its shape and dtype say"
            )
        return self._memory[start : self.position]


class Arrays(Mapping[str, np.ndarray]):
    """Arrays of their own by name; bfloat16 as ``dtypes.BFLOAT16_WORDS``, other dtypes that NumPy lacks as bytes.

    Args:
        outgoing: what makes them.

    Example:
        >>> zeros = Outgoing("bias", "float32", (2,), lambda sink: sink.write(bytes(8)))
        >>> Arrays([zeros])["bias"]
        array([0., 0.], dtype=float32)
    """

    def __init__(self, outgoing: Sequence[Outgoing]) -> None:
        self.outgoing = {one.name: one for one in outgoing}
        self._sink = MemorySink()

    def __getitem__(self, name: str) -> np.ndarray:
        one = self.outgoing[name]
        memory = np.empty(one.nbytes, np.uint8)
        self._sink.aim(memory.data)
        one.write_to(self._sink)
        return memory.view(_kind(one.dtype)).reshape(one.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.outgoing

    def __iter__(self) -> Iterator[str]:
        return iter(self.outgoing)

    def __len__(self) -> int:
        return len(self.outgoing)

    def only(self, names: Collection[str]) -> Arrays:
        """Some of them, in this order."""
        return Arrays([self.outgoing[name] for name in names])


def same_numbers(arrays: Arrays, name: str, other: str) -> bool:
    """Whether two tensors are alike bit for bit; they are only made where the file does not say that they are tied.

    Example:
        >>> made = [Outgoing(name, "uint8", (2,), lambda sink, data=data: sink.write(data)) for name, data in
        ...     [("a", b"12"), ("b", b"12"), ("c", b"21")]]
        >>> same_numbers(Arrays(made), "a", "b"), same_numbers(Arrays(made), "a", "c")
        (True, False)
    """
    one, two = arrays.outgoing[name], arrays.outgoing[other]
    if one.tied is not None and one.tied == two.tied:
        return True
    return (one.dtype, one.shape) == (two.dtype, two.shape) and arrays[name].tobytes() == arrays[other].tobytes()


def _kind(dtype: str) -> np.dtype:
    if dtype == "bfloat16":
        return dtypes.BFLOAT16_WORDS
    return np.dtype(np.uint8 if dtype in NOT_IN_NUMPY else dtype)
