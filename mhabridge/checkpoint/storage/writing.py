"""What every format's writer gets and writes to: tensors whose bytes are made when their turn comes, and a sink.

Sizes are known before the first byte is written, so every format is written in one pass, in bounded memory.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import math
import os
from collections.abc import Callable

from mhabridge.checkpoint.storage import reserving
from mhabridge.checkpoint.storage.crc import crc32
from mhabridge.checkpoint.storage.memory import Scratch, start_between
from mhabridge.checkpoint.storage.parallel import WORTH_A_THREAD, Stopped, Workers
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredFile, StoredTensor
from mhabridge.errors import CheckpointError


class Sink:
    """Where bytes go, in order.

    Args:
        descriptor: an open file; bytes are written from its start on, wherever its own position is.
        progress: called with the number of bytes that were just written, from any of the threads.
        workers: who writes what ``later`` is given; None: the caller. Once they are stopped, nothing is written.
        divided: False when the caller is one of the workers, and writes all of it.

    Attributes:
        position: how many bytes were written, or are to be written before the next.
        scratch: memory for what is made before it is written.
    """

    def __init__(
        self,
        descriptor: int,
        progress: Callable[[int], None] | None = None,
        workers: Workers | None = None,
        divided: bool = True,
    ) -> None:
        self.descriptor = descriptor
        self.position = 0
        self._progress, self._workers, self._divided = progress, workers, divided
        self.scratch = Scratch()
        self._crc: int | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        left = memoryview(data).cast("B")
        while left:
            # So that pages are written whole.
            done = os.pwrite(self.descriptor, left[: _WRITE - self.position % _WRITE], self.position)
            if self._crc is not None:
                self._crc = crc32(left[:done], self._crc)
            left = left[done:]
            self._advance(done)

    def copy(self, source: int, offset: int, length: int) -> None:
        """Append bytes of another file.

        The kernel copies them where nobody needs to see them and whole pages become whole pages, which some file
        systems then share. Elsewhere it takes half as long again as reading and writing them (measured).

        Raises:
            EOFError: the other file ends before.
        """
        if self._crc is None and (offset - self.position) % _PAGE == 0:
            done = self._copy_in_kernel(source, offset, length)
            offset, length = offset + done, length - done
        while length:
            size = min(length, _READ - self.position % _READ)
            buffer = self.scratch.take(size, start_between(offset, self.position)).data
            got = os.preadv(source, [buffer], offset)
            if not got:
                raise EOFError(length)
            self.write(buffer[:got])
            offset, length = offset + got, length - got

    def reserve(self, length: int) -> None:
        """Make sure that there is room for so many bytes, which will be written.

        Raises:
            OSError: there is not.
        """
        reserving.reserve(self.descriptor, length)

    def later(self, length: int, emit: Callable[[Sink], None]) -> None:
        """Leave room for bytes that another thread may write, while the caller goes on behind them.

        Args:
            length: how many there are.
            emit: writes them to the sink that it is given.

        Raises:
            CheckpointError: ``emit`` wrote more or fewer; from ``wait`` when another thread did that.
        """
        if self._workers is None or not self._divided or length < WORTH_A_THREAD:
            _emit(self, length, emit)
            return
        part = copy.copy(self)
        self.position += length

        def write() -> None:
            assert part._workers is not None
            part.scratch = part._workers.scratch
            _emit(part, length, emit)

        self._workers.give(write)

    def wait(self) -> None:
        """Wait until everything that ``later`` was given is written."""
        if self._workers is not None and self._divided:
            self._workers.wait()

    def start_crc(self) -> None:
        """Sum up (CRC-32) what is written from now on."""
        self._crc = 0

    def end_crc(self) -> int:
        """The sum since ``start_crc``."""
        found, self._crc = self._crc, None
        assert found is not None
        return found

    def _copy_in_kernel(self, source: int, offset: int, length: int) -> int:
        done = 0
        while done < length and hasattr(os, "copy_file_range"):
            try:
                got = os.copy_file_range(
                    source, self.descriptor, min(length - done, _AT_ONCE), offset + done, self.position
                )
            except OSError as error:
                if error.errno in _NOT_HERE:
                    break
                raise
            if not got:
                break
            done += got
            self._advance(got)
        return done

    def _advance(self, count: int) -> None:
        self.position += count
        if self._workers is not None and self._workers.stopped:
            raise Stopped
        if self._progress is not None:
            self._progress(count)


def _emit(sink: Sink, length: int, emit: Callable[[Sink], None]) -> None:
    start = sink.position
    emit(sink)
    if sink.position - start != length:
        raise CheckpointError(
            "the target", given=f"{sink.position - start} bytes", expected=f"{length}, for which there is room"
        )


_PAGE = 4096
# Bytes. Threads wait for Python's lock after each call, so small ones cost more; but writes of 1 MiB and more take
# twice as long in the kernel (measured on ext4).
_READ = 1 << 20
_WRITE = 512 << 10
_AT_ONCE = 64 << 20  # bytes that the kernel copies before it is asked again, so that progress can be seen
# The kernel cannot copy between these two files: they are on different file systems, one is a pipe, the kernel is old.
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@dataclasses.dataclass(frozen=True, slots=True)
class Outgoing:
    """One tensor to be written.

    Args:
        name: its full name in the target.
        dtype: a key of ``ITEM_SIZES``.
        shape: of the tensor.
        emit: writes exactly ``nbytes`` bytes, in C order and little-endian, to the sink.
        tied: tensors of one value here have the same numbers, of the same dtype, in the same order; None for none.

    Attributes:
        nbytes: bytes of the tensor; kept, since a plan asks a dozen times.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    emit: Callable[[Sink], None]
    tied: str | None = None
    nbytes: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", self.size * (ITEM_SIZES[self.dtype] or 0))

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def write_to(self, sink: Sink) -> None:
        """Write the tensor's bytes, and see that there are as many as the target has room for.

        Raises:
            CheckpointError: there were more or fewer, which would put all that follows in the wrong place.
        """
        start = sink.position
        self.emit(sink)
        if sink.position - start != self.nbytes:
            raise CheckpointError(
                self.name, given=f"{sink.position - start} bytes", expected=f"{self.nbytes} of shape {self.shape}"
            )


def passed_through(file: StoredFile, tensor: StoredTensor, name: str, shape: tuple[int, ...] | None = None) -> Outgoing:
    """A tensor that is written as it was stored, perhaps under another name or (same elements, same order) shape."""

    def emit(sink: Sink) -> None:
        if not tensor.plain:
            for piece in file.chunks(tensor):
                sink.write(piece)
            return
        for extent in tensor.plain_extents():
            _copy(sink, file, extent)

    tensor.require_readable(file.path)
    shape = tensor.shape if shape is None else shape
    if math.prod(shape) != tensor.size:
        raise ValueError(f"{name}: {tensor.shape} has other elements than {shape}")
    same = f"{tensor.storage} {tensor.start} {tensor.strides} {tensor.size} {tensor.dtype}"
    return Outgoing(name, tensor.dtype, shape, emit, same)


def _copy(sink: Sink, file: StoredFile, extent: Extent) -> None:
    try:
        sink.copy(file.descriptor(extent), extent.offset, extent.length)
    except EOFError:
        raise file.became_shorter(extent) from None
