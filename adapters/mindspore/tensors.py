"""Between NumPy arrays and MindSpore's tensors, bit for bit."""

from __future__ import annotations

import signal
import threading
from typing import Any

import mindspore
import numpy as np

from mhabridge import dtypes
from mhabridge.spec import MHASpec


def dtype_name(kind: Any) -> str:
    """NumPy's name of MindSpore's dtype."""
    return str(kind).lower()


def cast(array: np.ndarray, spec: MHASpec) -> Any:
    """A tensor with these values, rounded to the layer's dtype."""
    return to_tensor(dtypes.round_to(array, spec.dtype))


def to_tensor(array: np.ndarray) -> Any:
    """A tensor of its own; bfloat16 goes over as float32, which holds it exactly."""
    if dtypes.name_of(array) == "bfloat16":
        return mindspore.Tensor(dtypes.to_float64(array).astype(np.float32)).astype(mindspore.bfloat16)
    return mindspore.Tensor(np.array(array, order="C"))


def to_numpy(tensor: Any) -> np.ndarray:
    """A copy of the values; bfloat16 as its bits."""
    array = np.array(tensor.asnumpy())
    _keep_ctrl_c()
    return dtypes.to_words(array)


def _keep_ctrl_c() -> None:
    """MindSpore's first operation takes SIGINT over and ends the process with it; give it back to Python's handler."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
