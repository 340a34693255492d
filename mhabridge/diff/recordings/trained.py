"""Parameters that have changed since a layer's first call: training moved them, on each side by its own gradients.

Those gradients are as far apart as rounding drives them (``drift``), so what they make of two equal tensors need not be
equal: the two sides are compared like gradients. A bias is looked at as one more column of its matrix, since it is
added to what that makes: many begin as zeros, and what is left of them after a step is rounding in good part. The bias
of the keys is all rounding where nothing else is attended to than keys: it adds the same to every score of a row, which
softmax takes away, so its gradient is zero, and an optimizer that divides by a gradient's size moves it all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mhabridge.diff.comparing import Comparison
from mhabridge.diff.recordings.arrays import float64
from mhabridge.diff.recordings.drift import Apart, Drift

WITHOUT_EFFECT = "it adds the same to all scores of a row, which changes no answer: its gradient is rounding alone"


def compare_trained(
    first: Mapping[str, np.ndarray],
    second: Mapping[str, np.ndarray],
    drift: Drift,
    unit: float,
    idle: frozenset[str] = frozenset(),
) -> tuple[dict[str, Comparison], list[Apart]]:
    """Compare the parameters of one layer after training.

    Args:
        first: of one side, by name.
        second: of the other.
        drift: what the two runs have drifted apart so far.
        unit: the larger unit roundoff of the two sides.
        idle: names of what has no effect.

    Returns:
        The comparisons by name, and how far apart what rounding explains is.

    Example:
        >>> a = {"weight": np.eye(4, dtype="float32"), "bias": np.full(4, 1e-7, "float32")}
        >>> b = {"weight": np.eye(4, dtype="float32"), "bias": np.full(4, 2e-7, "float32")}
        >>> {name: found.verdict for name, found in compare_trained(a, b, Drift(), 2.0**-24)[0].items()}
        {'weight': 'equal', 'bias': 'rounding'}
    """
    later, made = drift.backward(), {}
    far: list[Apart] = []
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        comparison, found = later.compare(
            a, b, unit, whole=(with_bias(name, first, idle), with_bias(name, second, idle))
        )
        if comparison.verdict == "off" and name in idle:
            comparison = dataclasses.replace(comparison, verdict="rounding", reason=WITHOUT_EFFECT)
        elif comparison.ok:
            far.append(found)
        made[name] = comparison
    return made, far


def with_bias(name: str, named: Mapping[str, np.ndarray], idle: frozenset[str] = frozenset()) -> np.ndarray | None:
    """A matrix with its bias as one more column, unless that is idle, or the same for a bias; all else as it is."""
    stem = name.removesuffix("weight").removesuffix("bias")
    weight, bias = named.get(f"{stem}weight"), named.get(f"{stem}bias")
    if weight is None or bias is None or name not in (f"{stem}weight", f"{stem}bias") or f"{stem}bias" in idle:
        return named.get(name)
    if not weight.ndim or bias.shape != weight.shape[:1] or not weight.size:
        return named.get(name)
    return np.column_stack([float64(weight).reshape(len(weight), -1), float64(bias)])
