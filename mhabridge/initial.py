"""Initial values of the drop-in layers: PyTorch's distributions, and after ``manual_seed`` the same numbers everywhere.

A framework's own initial values cannot serve: MegEngine's shrink as 1/E (11 times too small at E = 128), MindSpore's
out bias is not zero, and each has its own random numbers. So the drop-ins draw theirs here, in NumPy, and load them.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import math

import numpy as np

from mhabridge import dtypes
from mhabridge.errors import ArgumentError, ArgumentTypeError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


class _Stream:
    """The one stream of random numbers; seeded by the operating system until ``manual_seed``."""

    state = np.random.RandomState()


def manual_seed(seed: int) -> None:
    """Start the drop-ins' random numbers again: layers made after it have the same values in every framework.

    Args:
        seed: an integer in [0, 2**32).

    Raises:
        ArgumentError: out of that range.
        ArgumentTypeError: not an integer.

    Example:
        >>> manual_seed(7)
        >>> first = initial_values(MHASpec(4, 2))
        >>> manual_seed(7)
        >>> initial_values(MHASpec(4, 2)) == first
        True
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ArgumentTypeError("seed", given=repr(seed), expected="an integer")
    if not 0 <= seed < 2**32:
        raise ArgumentError("seed", given=str(seed), expected="an integer in [0, 2**32)")
    _Stream.state = np.random.RandomState(int(seed))


def initial_values(spec: MHASpec) -> MHAWeights:
    """PyTorch's initial values (torch.nn.MultiheadAttention._reset_parameters), drawn from the stream.

    q, k and v are Xavier-uniform: as one (3E, E) matrix when their shapes agree, else each by itself. The output's
    weight is uniform in +-1/sqrt(fan_in). bias_k and bias_v are Xavier-normal. All other biases are zero.
    """
    shapes = spec.parameter_shapes()
    alike = shapes.get("q_weight") == shapes.get("k_weight") == shapes.get("v_weight")
    drawn = {}
    for name, shape in shapes.items():
        if name in ("bias_k", "bias_v"):
            drawn[name] = _Stream.state.standard_normal(shape) / math.sqrt(shape[0])
        elif name.endswith("_bias"):
            drawn[name] = np.zeros(shape)
        else:
            drawn[name] = draw_uniform(_bound(name, shape, alike), shape)
    return MHAWeights(**{name: dtypes.round_to(values, spec.dtype) for name, values in drawn.items()})


def draw_uniform(bound: float, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers uniform in +-``bound`` from the stream, in float64."""
    return _Stream.state.uniform(-bound, bound, shape)


def _bound(name: str, shape: tuple[int, ...], alike: bool) -> float:
    rows, columns = shape
    if name == "out_weight":
        return 1.0 / math.sqrt(columns)
    return math.sqrt(6.0 / ((3 * rows if alike else rows) + columns))
