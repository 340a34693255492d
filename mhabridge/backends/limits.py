"""Time limits, as callers give them."""

from __future__ import annotations

import numbers
import threading
from typing import Any

from mhabridge.errors import ArgumentError, ArgumentTypeError


def seconds(timeout: Any, name: str = "timeout") -> float | None:
    """A limit in seconds; None for no limit, and so for one that is longer than the system can wait.

    Args:
        timeout: a positive number, or None.
        name: the argument's name, for an error.

    Raises:
        ArgumentTypeError: it is no number.
        ArgumentError: it is NaN, zero or negative.

    Example:
        >>> seconds(60), seconds(None), seconds(float("inf"))
        (60.0, None, None)
    """
    expected = "a positive number of seconds, or None for no limit"
    if timeout is None:
        return None
    if not isinstance(timeout, numbers.Real) or isinstance(timeout, bool):
        raise ArgumentTypeError(name, given=f"{timeout!r:.80} ({type(timeout).__name__})", expected=expected)
    number: Any = timeout
    if not number > 0:
        raise ArgumentError(name, given=repr(timeout), expected=expected)
    return float(number) if number <= threading.TIMEOUT_MAX else None
