"""Opens a checkpoint as named arrays: names, shapes and dtypes at once, numbers only when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType

import numpy as np

from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.storage.stored import StoredFile


class TensorFile(Mapping[str, np.ndarray]):
    """An open checkpoint: a mapping from names to arrays, each read when it is looked up.

    bfloat16 comes as ``ml_dtypes.bfloat16``. Use it in a ``with`` statement, or call ``close``.

    Args:
        stored: the open file.

    Attributes:
        path: the file.
        shapes: of every tensor, by name.
        dtype_names: the dtype's name of every tensor, by name.
        notes: what the reader noticed and people should know.
    """

    def __init__(self, stored: StoredFile) -> None:
        self._stored = stored
        self.path = stored.path
        self.shapes = {name: tensor.shape for name, tensor in stored.items()}
        self.dtype_names = {name: tensor.dtype for name, tensor in stored.items()}
        self.notes = stored.notes

    def __getitem__(self, name: str) -> np.ndarray:
        return self._stored.read(name)

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

    def close(self) -> None:
        """Let go of the file."""
        self._stored.close()


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a checkpoint of any format that ``mhabridge.checkpoint.formats.known`` lists.

    Raises:
        ArgumentTypeError: that is no path.
        CheckpointError: the file is missing, damaged, of an unknown format, or asks for something that we refuse to do.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "layer.npz"
        >>> np.savez(file, q_weight=np.eye(2, dtype="float32"))
        >>> with open_tensors(file) as tensors:
        ...     print(tensors.shapes, tensors.dtype_names, tensors["q_weight"][0])
        {'q_weight': (2, 2)} {'q_weight': 'float32'} [1. 0.]
    """
    return TensorFile(open_checkpoint(path))
