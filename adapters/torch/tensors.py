"""Between NumPy arrays and PyTorch's tensors, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mhabridge import dtypes
from mhabridge.calls import Call
from mhabridge.errors import WeightsError
from mhabridge.spec import MHASpec

compiling = getattr(getattr(torch, "compiler", None), "is_compiling", bool)  # since 2.3


def leaf(array: np.ndarray | None, call: Call) -> Any:
    """A tensor that takes part in the call's gradients, if it wants any."""
    assert array is not None
    return to_tensor(array).requires_grad_(call.wants_grads)


def cast(array: np.ndarray, spec: MHASpec) -> Any:
    """A tensor with these values, rounded to the layer's dtype."""
    return to_tensor(dtypes.round_to(array, spec.dtype))


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own (never a view of the caller's memory); bfloat16 goes over as its bits."""
    array = dtypes.to_words(np.array(array, order="C"))
    if array.dtype == dtypes.BFLOAT16_WORDS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of the values; bfloat16 as its bits.

    Raises:
        WeightsError: a meta tensor has none.
    """
    if tensor.device.type == "meta":
        raise WeightsError(
            "layer", given="a meta tensor", expected="values", advice="Load the weights before extracting."
        )
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy()).view(dtypes.BFLOAT16_WORDS)
    return np.array(tensor.numpy())
