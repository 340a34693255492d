"""What the tests of checkpoint formats share: files from arrays, comparing files with arrays, other interpreters."""

from __future__ import annotations

import functools
import io
import json
import os
import pathlib
import subprocess

import ml_dtypes
import numpy as np
import pytest

from mhabridge.backends import backends
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.checkpoint.storage.writing import Outgoing, Sink

GOLDEN = pathlib.Path(__file__).parent / "golden"


def array_of(dtype: str, values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def outgoing(name: str, dtype: str, values: np.ndarray, tied: str | None = None) -> Outgoing:
    """A tensor to be written, from its values."""
    array = array_of(dtype, values)
    return Outgoing(name, dtype, array.shape, lambda sink: sink.write(array.tobytes()), tied)


def written(path: pathlib.Path, module, tensors, *args, **kwargs) -> pathlib.Path:
    """A file that a format's ``write`` made."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        module.write(Sink(descriptor), tensors, *args, **kwargs)
    finally:
        os.close(descriptor)
    return path


def assert_holds(file: StoredFile, expected: dict[str, tuple[str, np.ndarray]]) -> None:
    """The file has exactly these tensors, with these dtypes, shapes and bits."""
    assert sorted(file) == sorted(expected)
    for name, (dtype, values) in expected.items():
        assert_same(name, file.read(name), array_of(dtype, values))
        pieces = b"".join(bytes(piece) for piece in file.chunks(file[name], size=16))
        little = array_of(dtype, values)
        assert pieces == little.tobytes(), f"{name}: other bytes in pieces than at once"


def assert_same(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype, f"{name}: {found.dtype} instead of {expected.dtype}"
    assert found.shape == expected.shape, f"{name}: {found.shape} instead of {expected.shape}"
    assert found.tobytes() == expected.tobytes(), f"{name}: {found} instead of {expected}"


@functools.lru_cache(maxsize=1)
def _pythons() -> dict[str, str]:
    return {info.name: info.python for info in backends() if info.ok}


def run_in(name: str, code: str, *arguments: object):
    """What code prints as JSON on its last line, run by a framework's own interpreter."""
    if name not in _pythons():
        pytest.skip(f"{name}: no such environment here")
    done = subprocess.run(
        [_pythons()[name], "-I", "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# Prints name -> [dtype, shape, bytes in hexadecimal] of a dict of arrays.
PRINT_ARRAYS = """
import json
def show(arrays):
    print(json.dumps({n: [str(a.dtype), list(a.shape), a.tobytes().hex()] for n, a in arrays.items()}))
"""


def assert_shown(shown, expected: dict[str, tuple[str, np.ndarray]]) -> None:
    """What ``PRINT_ARRAYS`` printed is these arrays."""
    assert sorted(shown) == sorted(expected)
    for name, (dtype, values) in expected.items():
        array = array_of(dtype, values)
        assert tuple(shown[name]) == (str(array.dtype), list(array.shape), array.tobytes().hex()), name


def content(build) -> bytes:
    """The bytes that a function writes to a binary file."""
    buffer = io.BytesIO()
    build(buffer)
    return buffer.getvalue()
