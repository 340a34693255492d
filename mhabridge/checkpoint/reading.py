"""Opens a checkpoint as named tensors: names, shapes and dtypes at once, numbers only when they are asked for.

Nothing is unpickled: a NumPy archive with objects in it is refused.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  (names bfloat16 for NumPy, which safetensors needs)
import numpy as np

from mhabridge import dtypes
from mhabridge.errors import CheckpointError

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
        CheckpointError: the file is missing, damaged, not what its name says, or of a kind that is not read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "layer.npz"
        >>> np.savez(file, q_weight=np.eye(2, dtype="float32"))
        >>> with open_tensors(file) as tensors:
        ...     print(tensors.shapes, tensors.dtype_names, tensors["q_weight"][0])
        {'q_weight': (2, 2)} {'q_weight': 'float32'} [1. 0.]
    """
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
        what = "a folder" if file.is_dir() else "nothing there"
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
        tensors.get_tensor,
        stack.close,
    )


def _open_npz(file: Path) -> TensorFile:
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(file))
        members = {name[: -len(".npy")]: name for name in archive.namelist() if name.endswith(".npy")}
        if len(members) != len(archive.namelist()):
            raise ValueError("two members have the same name, or one is no .npy")
        headers = {name: _npy_header(archive, member) for name, member in members.items()}
        close = stack.pop_all().close
    return TensorFile(
        file,
        {name: shape for name, (shape, _) in headers.items()},
        {name: "bfloat16" if dtype == dtypes.BFLOAT16_WORDS else dtype.name for name, (_, dtype) in headers.items()},
        lambda name: _npy_array(archive, members[name]),
        close,
    )


def _npy_header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of one member, without its numbers."""
    with archive.open(member) as stream:
        version = _NPY.read_magic(stream)
        readers = {(1, 0): _NPY.read_array_header_1_0, (2, 0): _NPY.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{member} is of .npy version {version}")
        shape, _, dtype = readers[version](stream)
        size = archive.getinfo(member).file_size - stream.tell()
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
