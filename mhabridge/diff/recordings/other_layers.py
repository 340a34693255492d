"""Recorded layers that are no attention: those whose formula is known are computed again, in float64.

Linear and LayerNorm are judged as attention is (``mhabridge.diff.rounding``): the same formula, several times, with
other rounding errors. ReLU, Embedding, Dropout in evaluation and Identity do not round at all. Everything else has no
reference here, and is compared by how far it may have drifted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.planning import modules
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.recordings.arrays import coarsest_of, float64
from mhabridge.diff.recordings.judging import known_accuracy
from mhabridge.diff.recordings.matching import kind_of
from mhabridge.diff.rounding import SAMPLES, Accuracy, Bound, bounds_of, noisy
from mhabridge.errors import UnsupportedError
from mhabridge.recording.reading import RecordedCall, RecordedLayer, Recording
from mhabridge.reference import FLOAT64, Arithmetic

_QUANTIZED = frozenset({"qat", "quantized", "quantizable", "intrinsic"})  # packages of layers that round to integers
_LARGEST = 1 << 24  # elements of input and output together: more is not computed again

Formula = Callable[[Arithmetic, np.ndarray, Mapping[str, np.ndarray], float], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Known:
    """A kind of layer whose formula is known.

    Args:
        formula: from the input, the parameters by PyTorch's names and epsilon to the output.
        module: its name in the tables of modules, for its parameters; "" for a layer that has none.
        rounds: whether the formula rounds.
        refused: a setting under which it computes something else.
    """

    formula: Formula
    module: str = ""
    rounds: bool = False
    refused: str = ""


def _linear(arithmetic: Arithmetic, x: np.ndarray, parameters: Mapping[str, np.ndarray], epsilon: float) -> np.ndarray:
    y = arithmetic.matmul(arithmetic.cast(x), arithmetic.cast(parameters["weight"]).T)
    return y + arithmetic.cast(parameters["bias"]) if "bias" in parameters else y


def _norm(arithmetic: Arithmetic, x: np.ndarray, parameters: Mapping[str, np.ndarray], epsilon: float) -> np.ndarray:
    x = arithmetic.cast(x)
    ones = arithmetic.cast(np.full((x.shape[-1], 1), 1.0 / x.shape[-1]))
    centred = x - arithmetic.matmul(x, ones)
    variance = arithmetic.matmul(centred * centred, ones)
    y = arithmetic.store(centred / np.sqrt(variance + arithmetic.cast(np.asarray(epsilon))))
    y = y * arithmetic.cast(parameters["weight"])
    return np.asarray(y + arithmetic.cast(parameters["bias"]) if "bias" in parameters else y)


def _relu(arithmetic: Arithmetic, x: np.ndarray, parameters: Mapping[str, np.ndarray], epsilon: float) -> np.ndarray:
    y: np.ndarray = np.maximum(arithmetic.cast(x), 0)
    return y


def _same(arithmetic: Arithmetic, x: np.ndarray, parameters: Mapping[str, np.ndarray], epsilon: float) -> np.ndarray:
    return arithmetic.cast(x)


def _lookup(arithmetic: Arithmetic, x: np.ndarray, parameters: Mapping[str, np.ndarray], epsilon: float) -> np.ndarray:
    return arithmetic.cast(parameters["weight"][x])


KNOWN = {
    "linear": Known(_linear, "linear", rounds=True, refused="activation_flag"),
    "layernorm": Known(_norm, "norm", rounds=True),
    "embedding": Known(_lookup, "embedding"),
    "relu": Known(_relu),
    "dropout": Known(_same),
    "identity": Known(_same),
}
# What layers call the number under the root.
EPSILON = ("eps", "epsilon")


def epsilon_of(layer: RecordedLayer) -> float | None:
    """A layer's epsilon; None where it has none."""
    found = next((layer.settings[name] for name in EPSILON if name in layer.settings), None)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def parameters_of(recording: Recording, layer: RecordedLayer, call: RecordedCall) -> dict[str, np.ndarray]:
    """A layer's parameters at a call, by PyTorch's names where the tables know them; by their own names otherwise.

    Raises:
        UnsupportedError: one of them was left out.
    """
    there = recording.parameters(call)
    shapes = {name: tuple(array.shape) for name, array in there.items()}
    known = KNOWN.get(kind_of(layer))
    found = modules.readings(shapes) if known and known.module else []
    names = next((reading.parts for reading in found if known and reading.kind == known.module), {})
    return {names.get(name, name): array for name, array in there.items()}


def distance(
    recording: Recording, layer: RecordedLayer, call: RecordedCall, inputs: list[np.ndarray], output: np.ndarray
) -> Distance | None:
    """A layer's output beside the reference; None where the formula is not known.

    Args:
        recording: where it was recorded.
        layer: the layer.
        call: of it.
        inputs: what it was given, in order.
        output: what it answered.
    """
    known = KNOWN.get(kind_of(layer)) if _is_native(recording.framework, layer) else None
    if known is None or len(inputs) != 1 or inputs[0].size + output.size > _LARGEST:
        return None
    if (known.formula is _same and call.training) or layer.settings.get(known.refused):
        return None
    try:
        parameters = parameters_of(recording, layer, call)
    except UnsupportedError:  # comparing the parameters says so
        return None
    if not _fits(known, inputs[0], parameters) or (known.module == "norm" and epsilon_of(layer) is None):
        return None
    shape = _shape(known, inputs[0], parameters)
    if output.shape != shape:  # before anything is computed: a damaged file must not ask for all of the memory
        return Distance("broken", f"shape {output.shape}, expected {shape}")
    arrays = [array for array in (*inputs, *parameters.values(), output) if dtypes.name_of(array) in dtypes.FLOATS]
    expected = known_accuracy(recording.framework, coarsest_of(arrays))
    return _judged(known, inputs[0], parameters, epsilon_of(layer) or 0.0, expected, output)


def _fits(known: Known, x: np.ndarray, parameters: Mapping[str, Any]) -> bool:
    """Whether the input can be what such a layer takes; axes that do not fit are another layer's."""
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if known.module:
        arrays = [array for array in (weight, bias) if array is not None]
        if weight is None or not weight.size or not all(dtypes.name_of(each) in dtypes.FLOATS for each in arrays):
            return False
        if weight.ndim != (1 if known.module == "norm" else 2) or (bias is not None and bias.shape != weight.shape[:1]):
            return False
    if known.module == "embedding":
        return x.dtype.kind in "iu" and bool(((x >= 0) & (x < len(parameters["weight"]))).all())
    if dtypes.name_of(x) not in dtypes.FLOATS or not x.ndim:
        return False
    return weight is None or not known.module or bool(x.shape[-1] == weight.shape[-1])


def _shape(known: Known, x: np.ndarray, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the output."""
    if known.module == "embedding":
        return (*x.shape, parameters["weight"].shape[1])
    return (*x.shape[:-1], parameters["weight"].shape[0]) if known.module == "linear" else x.shape


def _is_native(framework: str, layer: RecordedLayer) -> bool:
    """Whether a class is the framework's own: others may be called the same and compute something else."""
    package, *parts = layer.of_class.split(".")
    return package == framework and parts[:1] in (["nn"], ["module"]) and not _QUANTIZED.intersection(parts)


def _judged(
    known: Known,
    x: np.ndarray,
    parameters: Mapping[str, np.ndarray],
    epsilon: float,
    expected: Accuracy,
    output: np.ndarray,
) -> Distance:
    with np.errstate(all="ignore"):
        exact = {"output": float64(known.formula(FLOAT64, x, parameters, epsilon))}
    if not known.rounds:
        unit = dtypes.UNIT_ROUNDOFF[expected.dtype]
        return judge(output, exact["output"], Bound(2.0 * unit * np.abs(exact["output"]), float("inf")))
    # Half precision is summed up and normalised in float32 unless the tables say otherwise, and rounded at the end.
    inner = noisy(Accuracy(expected.sums), np.random.default_rng(0))
    outer = noisy(expected, np.random.default_rng(1))
    samples = []
    with np.errstate(all="ignore"):
        for _ in range(SAMPLES):
            cast = {name: outer.cast(array) for name, array in parameters.items()}
            made = known.formula(inner, outer.cast(x), cast, epsilon)
            samples.append({"output": outer.store(made)})
    return judge(output, exact["output"], bounds_of(exact, samples, expected.dtype)["output"])
