"""Opens a checkpoint as named tensors: names, shapes and dtypes at once, numbers only when they are asked for.

Nothing is unpickled: a NumPy archive with objects in it is refused.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  (names bfloat16 for NumPy, which safetensors needs)
import numpy as np

from mhabridge import dtypes
from mhabridge.errors import ArgumentTypeError, CheckpointError

_NPY: Any = np.lib.format  # not annotated in NumPy 1


class TensorFile(Mapping[str, np.ndarray]):
    """An open checkpoint: a mapping from names to arrays, each read when it is looked up.

    bfloat16 comes as ``ml_dtypes.bfloat16``. Use it in a ``with`` statement, or call ``close``.

    Args:
        path: the file.
        shapes: of every tensor, by name.
        dtype_names: the dtype's name of every tensor, by name.
        load: reads one tensor.
        close: lets go of the file.
    """

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype_names: dict[str, str],
        load: Callable[[str], np.ndarray],
        close: Callable[[], None],
    ) -> None:
        self.path = path
        self.shapes = shapes
        self.dtype_names = dtype_names
        self.close = close
        self._load = load

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        with _explained(self.path, name):
            # Through words, since an imported MindSpore makes "bfloat16" mean its own dtype to NumPy (seen with 2.10).
            return dtypes.to_public(dtypes.to_words(self._load(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a checkpoint: ``.safetensors`` or ``.npz``.

    Raises:
        ArgumentTypeError: that is no path.
        CheckpointError: the file is missing, damaged, not what its name says, or of a kind that is not read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "layer.npz"
        >>> np.savez(file, q_weight=np.eye(2, dtype="float32"))
        >>> with open_tensors(file) as tensors:
        ...     print(tensors.shapes, tensors.dtype_names, tensors["q_weight"][0])
        {'q_weight': (2, 2)} {'q_weight': 'float32'} [1. 0.]
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError("path", given=repr(path), expected="a path: a string or a pathlib.Path")
    file = Path(path)
    opener = _OPENERS.get(file.suffix.lower())
    if opener is None:
        raise CheckpointError(
            str(file),
            given=f"a file named {file.suffix or 'without an ending'}",
            expected="one of " + ", ".join(_OPENERS),
            advice="Save the tensors with safetensors, from the framework that wrote the file.",
        )
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no regular file" if file.exists() else "nothing there"
        raise CheckpointError(str(file), given=what, expected="a checkpoint file", advice="Check the path.")
    with _explained(file):
        return opener(file)


def _open_safetensors(file: Path) -> TensorFile:
    try:
        from safetensors import safe_open
    except ImportError:
        raise CheckpointError(
            str(file), given="no safetensors library", advice="Install it with: pip install 'mhabridge[checkpoint]'"
        ) from None
    stack = contextlib.ExitStack()
    tensors = stack.enter_context(safe_open(str(file), framework="numpy"))
    slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (it is no mapping)
    return TensorFile(
        file,
        {name: tuple(found.get_shape()) for name, found in slices.items()},
        {name: _SAFETENSORS_DTYPES.get(found.get_dtype(), found.get_dtype()) for name, found in slices.items()},
        lambda name: _safetensors_array(file, tensors, slices, name),
        stack.close,
    )


def _safetensors_array(file: Path, tensors: Any, slices: dict[str, Any], name: str) -> np.ndarray:
    dtype = slices[name].get_dtype()
    if dtype not in _SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{file}: {name}",
            given=f"dtype {dtype}, which NumPy does not have",
            expected="one of " + ", ".join(_SAFETENSORS_DTYPES),
            advice="Quantised weights have to be dequantised first, by the library that wrote them.",
        )
    array: np.ndarray = tensors.get_tensor(name)
    return array


def _open_npz(file: Path) -> TensorFile:
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(file))
        members = _npy_members(archive, file)
        size = file.stat().st_size
        headers = {name: _npy_header(archive, member, size) for name, member in members.items()}
        close = stack.pop_all().close
    return TensorFile(
        file,
        {name: shape for name, (shape, _) in headers.items()},
        {name: "bfloat16" if dtype == dtypes.BFLOAT16_WORDS else dtype.name for name, (_, dtype) in headers.items()},
        lambda name: _npy_array(archive, members[name]),
        close,
    )


def _npy_members(archive: zipfile.ZipFile, file: Path) -> dict[str, str]:
    """The members of an archive by their tensors' names."""
    listed = archive.namelist()
    promised = _promised_members(archive, file)
    if len(listed) != promised:
        raise ValueError(f"{len(listed)} members are listed, and {promised} promised")
    strange = [name for name in listed if not name.endswith(".npy")]
    if strange:
        raise ValueError(f"{', '.join(map(repr, strange[:8]))} in the archive, which is no .npy")
    if len(set(listed)) != len(listed):
        twice = sorted({name for name in listed if listed.count(name) > 1})
        raise ValueError(f"two members have the same name: {', '.join(map(repr, twice[:8]))}")
    return {name[: -len(".npy")]: name for name in listed}


def _promised_members(archive: zipfile.ZipFile, file: Path) -> int:
    """How many members the archive's last record promises.

    zipfile does not look: one wrong bit in the length of a member's comment makes it skip those that follow.
    """
    with file.open("rb") as stream:
        stream.seek(-_END.size - len(archive.comment), os.SEEK_END)
        mark, _, _, _, count, *_ = _END.unpack(stream.read(_END.size))
    if mark != b"PK\x05\x06":
        raise ValueError("the archive goes on after its end")
    return len(archive.namelist()) if count == _IN_ZIP64 else int(count)


def _npy_header(archive: zipfile.ZipFile, member: str, archive_size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of one member, without its numbers."""
    packed = archive.getinfo(member)
    if packed.compress_size > archive_size or packed.file_size > _DEFLATE_LIMIT * packed.compress_size:
        raise ValueError(f"{member} claims {packed.file_size} bytes, more than can be in the archive")
    with archive.open(member) as stream:
        version = _NPY.read_magic(stream)
        readers = {(1, 0): _NPY.read_array_header_1_0, (2, 0): _NPY.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{member} is of .npy version {version}")
        shape, _, dtype = readers[version](stream)
        size = packed.file_size - stream.tell()
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{member} has the shape {shape}")
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects, which would have to be unpickled")
    if dtype.kind == "V" and dtype != dtypes.BFLOAT16_WORDS:
        raise ValueError(f"{member} is of dtype {dtype}; the .npy format does not keep bfloat16, so use safetensors")
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member} has {size} bytes of numbers, which is not what shape {shape} of {dtype} takes")
    return shape, dtype


def _npy_array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as stream:
        array: np.ndarray = _NPY.read_array(stream, allow_pickle=False)
    return array


_OPENERS: dict[str, Callable[[Path], TensorFile]] = {".safetensors": _open_safetensors, ".npz": _open_npz}
_END = struct.Struct("<4s4H2LH")  # end of central directory (APPNOTE.TXT 4.3.16); the second number is the count
_IN_ZIP64 = 0xFFFF  # then the count is in another record
_DEFLATE_LIMIT = 1032  # deflate makes nothing smaller than by this factor (https://zlib.net/zlib_tech.html)
_SAFETENSORS_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
}


@contextlib.contextmanager
def _explained(file: Path, name: str = "") -> Iterator[None]:
    """Turn whatever a damaged file makes the libraries raise (there is no end to it) into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{file}: {name}" if name else str(file),
            given=f"content that cannot be read ({error})",
            expected=f"a whole {file.suffix} file",
            advice="Copy or download it again, and check that the name says what it is.",
        ) from error
