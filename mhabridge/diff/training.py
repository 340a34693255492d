"""Training both sides: where they part, and whether rounding explains it.

Each backend starts from the same weights and learns the same target with its own gradients; the optimiser is the same
NumPy code for all, in the dtype of the weights, so nothing but the frameworks' own arithmetic differs.

Two honest trainings drift apart, ever faster: each step rounds anew, and the next one carries it on. How fast is
measured in the same run: the first backend trains a second time, from weights of which each is moved by one unit in the
last place, up or down at random. Both sides have rounded k times after step k, so two trainings may be apart by

    MARGIN * sqrt(k) * (the largest growth of that unit so far)

in any parameter; the square root, since independent errors add up that way (docs/judging.md has what honest frameworks
use of it). A wrong gradient leaves that behind in the first steps. The optimiser is plain SGD: one that divides by the
size of the gradient (Adam) turns the sign of a gradient that is zero but for rounding into a whole step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from mhabridge import dtypes, mapping
from mhabridge.backends.registry import backend as find_backend
from mhabridge.diff.report import Step
from mhabridge.diff.rounding import SMALLEST_NORMAL
from mhabridge.errors import ArgumentError, ArgumentTypeError, MHABridgeError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

MARGIN = 4.0
RATE = 0.05


@dataclasses.dataclass(frozen=True)
class Task:
    """What every side learns.

    Args:
        spec: the layer.
        weights: to start from.
        arrays: query, key and value.
        call: the other arguments.
        target: of the output; the loss is the mean square error over what is finite.
        steps: how many.
        timeout: of one call, in seconds; None for no limit.
    """

    spec: MHASpec
    weights: MHAWeights
    arrays: tuple[np.ndarray, ...]
    call: dict[str, Any]
    target: np.ndarray
    steps: int
    timeout: float | None = None


def check(steps: int, names: list[str]) -> None:
    """Raise for a number of steps that is none, and for training with nobody to compare with."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise ArgumentTypeError("steps", given=type(steps).__name__, expected="a whole number")
    if steps < 0:
        raise ArgumentError("steps", given=str(steps), expected="0 (no training) or more")
    if steps and names == [mapping.REFERENCE]:
        raise ArgumentError("steps", given=f"{steps}, with the reference alone", expected="another backend beside it")


def train(task: Task, names: list[str]) -> tuple[tuple[Step, ...], dict[str, MHABridgeError]]:
    """Train each backend, and the first one twice; one ``Step`` for each step and pair.

    Args:
        task: what is learnt.
        names: of the backends; with one of them the float64 reference is the other side.

    Returns:
        The steps, and the errors of backends that could not be trained, by name.
    """
    names = names if len(names) > 1 else [mapping.REFERENCE, *names]
    trained: dict[str, list[dict[str, np.ndarray]]] = {}
    failed: dict[str, MHABridgeError] = {}
    for name in names:
        try:
            trained[name] = _weights_of(name, task)
        except MHABridgeError as error:
            failed[name] = error
    left = list(trained)
    if len(left) < 2:
        return (), failed
    grown = _weights_of(left[0], dataclasses.replace(task, weights=nudged(task.weights)))
    growth = _largest_so_far(_apart(trained[left[0]], grown))
    found: list[Step] = []
    for a, b in itertools.combinations(left, 2):
        found += _steps(a, b, _apart(trained[a], trained[b]), growth, task.spec.dtype)
    return tuple(found), failed


def _steps(
    first: str, second: str, apart: list[dict[str, float]], growth: list[dict[str, float]], dtype: str
) -> list[Step]:
    found = []
    for number, (distance, grown) in enumerate(zip(apart, growth, strict=True), 1):
        times = {name: each / (grown[name] + dtypes.UNIT_ROUNDOFF[dtype] ** 2) for name, each in distance.items()}
        worst = max(times, key=lambda name: (times[name] != times[name], times[name]))
        explained = times[worst] <= MARGIN * math.sqrt(number)
        largest, largest_grown = max(distance.values()), max(grown.values())
        found.append(Step(number, worst, first, second, largest, largest_grown, times[worst], explained))
    return found


def _apart(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> list[dict[str, float]]:
    """The largest difference in each parameter after each step."""
    return [
        {name: float(np.abs(a[name] - b[name]).max(initial=0.0)) for name in a}
        for a, b in zip(first, second, strict=True)
    ]


def _largest_so_far(apart: list[dict[str, float]]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for each in apart:
        before = found[-1] if found else dict.fromkeys(each, 0.0)
        found.append({name: max(before[name], each[name]) for name in each})
    return found


def nudged(weights: MHAWeights) -> MHAWeights:
    """Each weight moved by one unit in the last place, up or down at random.

    Example:
        >>> weights = MHAWeights.random(MHASpec(4, 2))
        >>> moved = nudged(weights).q_weight - weights.q_weight
        >>> bool((moved != 0).all() and (abs(moved) < 1e-6).all())
        True
    """
    rng = np.random.default_rng(0)
    return MHAWeights(**{name: _nudged(array, rng) for name, array in weights.arrays().items()})


def _nudged(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    name = dtypes.name_of(array)
    values = dtypes.to_float64(array)
    # Below the smallest normal number the dtype's numbers lie no closer.
    magnitude = np.maximum(np.abs(values), SMALLEST_NORMAL[name])
    size = 2.0 * dtypes.UNIT_ROUNDOFF[name] * np.exp2(np.floor(np.log2(magnitude)))
    moved = values + np.where(rng.random(array.shape) < 0.5, size, -size)
    return np.asarray(dtypes.round_to(np.where(values == 0.0, 0.0, moved), name))


def _weights_of(name: str, task: Task) -> list[dict[str, np.ndarray]]:
    """The weights in float64 after each step of one backend's training."""
    backend, weights = find_backend(name), task.weights
    plain = {key: item for key, item in task.call.items() if key not in ("grad_output", "grad_attn_weights")}
    found = []
    for _ in range(task.steps):
        output = dtypes.to_float64(backend.run(task.spec, weights, *task.arrays, timeout=task.timeout, **plain).output)
        grad = dtypes.round_to(_slope(output, task.target), task.spec.dtype)
        grads = backend.run(task.spec, weights, *task.arrays, timeout=task.timeout, grad_output=grad, **plain).grads
        weights = MHAWeights(
            **{key: _updated(array, dtypes.to_float64(grads[key])) for key, array in weights.arrays().items()}
        )
        found.append({key: dtypes.to_float64(array) for key, array in weights.arrays().items()})
    return found


def _slope(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The gradient of half the summed square error over the output, divided by the number of rows."""
    rows = max(1, output.size // output.shape[-1])
    return np.where(np.isfinite(output), (output - target) / rows, 0.0)


def _updated(array: np.ndarray, grad: np.ndarray) -> np.ndarray:
    return np.asarray(dtypes.round_to(dtypes.to_float64(array) - RATE * grad, dtypes.name_of(array)))
