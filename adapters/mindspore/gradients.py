"""Gradients that can be believed: the first one of a process is a known one, and so is the first after one that failed.

MindSpore 2.10 keeps something of the first gradient for all later ones: over one source position that is wrong for
them. A gradient that raises makes it forget, and the next one is the first again.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Iterator

import mindspore
import numpy as np

from mhabridge import reference
from mhabridge.calls import Call
from mhabridge.errors import BackendError

from .parameters import spec_of, weights_of
from .tensors import to_numpy


@contextlib.contextmanager
def believed() -> Iterator[None]:
    """Around gradients.

    Raises:
        BackendError: gradients of this process are wrong.
    """
    prove_gradients()
    try:
        yield
    except BaseException:
        prove_gradients.cache_clear()
        raise


@functools.lru_cache(maxsize=None)
def prove_gradients() -> None:
    """Take a small known gradient, once in a process: d(sum(softmax(x w) y)) / dx, with three positions.

    Raises:
        BackendError: it is wrong: something took a gradient over one source position first.
    """
    rng = np.random.RandomState(0)
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 4), (3, 2, 4), (3, 2, 4)))
    layer = mindspore.nn.MultiheadAttention(4, 2)
    spec = spec_of(layer)
    grad = mindspore.grad(lambda q: layer(q, mindspore.Tensor(key), mindspore.Tensor(value))[0].sum())
    found = to_numpy(grad(mindspore.Tensor(query)))
    arrays = [np.ascontiguousarray(array.swapaxes(0, 1)) for array in (query, key, value)]
    call = Call(arrays[0], arrays[1], arrays[2], grad_output=np.ones((2, 2, 4)))
    known = reference.attend(spec, weights_of(layer, spec), call).grads["query"]
    if not np.allclose(found, known.swapaxes(0, 1), rtol=1e-3, atol=1e-4):
        raise BackendError(
            "mindspore",
            given="wrong gradients for a small known layer, in this process",
            expected="right ones",
            advice="MindSpore 2.10 does that after a first gradient over one source position. Start a new process.",
        )
