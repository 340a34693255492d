"""``mb.diff``: the same spec, weights and inputs on each backend, judged against the float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from mhabridge import dtypes, reference
from mhabridge.backends.registry import Backend
from mhabridge.backends.registry import backend as find_backend
from mhabridge.backends.running import Prepared, prepare, restore
from mhabridge.calls import Result
from mhabridge.diff.inputs import random_inputs
from mhabridge.diff.judge import judge
from mhabridge.diff.report import DiffReport, Entry, Pair, Run
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import ArgumentError, ArgumentTypeError, MHABridgeError, UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


def diff(
    spec: MHASpec,
    backends: Any,
    weights: MHAWeights | None = None,
    inputs: Any = None,
    seed: int = 0,
    dtype: str | None = None,
    grads: bool = False,
    **call: Any,
) -> DiffReport:
    """Run one call on several backends and judge each answer by what rounding justifies.

    Args:
        spec: the layer.
        backends: names, such as ["torch", "mindspore", "megengine"].
        weights: the layer's parameters; None draws some by ``seed``.
        inputs: {"query": ..., "key": ..., "value": ...} or the three in a sequence, NumPy arrays in the spec's axis
            order; None draws some by ``seed``.
        seed: for what is drawn.
        dtype: compute in this dtype: weights and inputs are rounded to it on purpose, first.
        grads: also compare the gradients of inputs and parameters, for a loss drawn by ``seed``.
        **call: masks, is_causal, need_weights, average_attn_weights, fully_masked, mode, timeout: see ``Backend.run``.

    Returns:
        A report; a backend that refuses or dies is a row in it, not an exception.

    Raises:
        ArgumentError: the call itself is wrong, whatever the backend.

    Example:
        >>> report = diff(MHASpec(8, 2), ["numpy"])
        >>> report.ok, report.entries[0].distance.verdict
        (True, 'equal')
    """
    names = _names(backends)
    spec, weights, arrays = _material(spec, weights, inputs, seed, dtype)
    timeout = call.pop("timeout", None)
    if grads:
        call.update(_random_grads(spec, weights, arrays, call, seed))
    prepared = prepare(spec, weights, *arrays, **call)
    exact = named(restore(prepared, reference.attend(spec, weights, prepared.call)))
    if not exact["output"].size:
        raise ArgumentError("inputs", given="no output element (N or L is 0)", expected="something to compare")
    runs, answers = [], {}
    for name in names:
        run, result = _run(name, spec, weights, arrays, call, timeout)
        runs.append(run)
        if result is not None:
            answers[name] = named(result)
    entries = _judged(prepared, weights, exact, {run.backend: run.framework for run in runs}, answers)
    return DiffReport(spec, seed, spec.dtype, tuple(runs), tuple(entries), tuple(_pairs(answers)))


def _names(backends: Any) -> list[str]:
    names = backends.split(",") if isinstance(backends, str) else list(backends)
    if not names:
        raise ArgumentError(
            "backends", given="none", expected="at least one name", advice="See `mhabridge backends list`."
        )
    if len(set(names)) != len(names):
        raise ArgumentError("backends", given=", ".join(names), expected="each name once")
    return names


def _material(
    spec: MHASpec, weights: MHAWeights | None, inputs: Any, seed: int, dtype: str | None
) -> tuple[MHASpec, MHAWeights, tuple[np.ndarray, ...]]:
    if dtype is not None:
        spec = spec.replace(dtype=dtype)
    weights = MHAWeights.random(spec, seed=seed) if weights is None else weights
    if inputs is None:
        arrays = tuple(random_inputs(spec, seed).values())
    elif isinstance(inputs, dict):
        odd = sorted(set(inputs) ^ {"query", "key", "value"})
        if odd:
            raise ArgumentTypeError(
                "inputs", given=f"{', '.join(odd)} missing or unknown", expected="query, key and value"
            )
        arrays = (inputs["query"], inputs["key"], inputs["value"])
    else:
        arrays = tuple(inputs)
        if len(arrays) != 3:
            raise ArgumentTypeError("inputs", given=f"{len(arrays)} arrays", expected="query, key and value")
    if dtype is not None:
        weights = weights.astype(spec.dtype)
        arrays = tuple(dtypes.round_to(np.asarray(array), spec.dtype) for array in arrays)
    return spec, weights, arrays


def _random_grads(
    spec: MHASpec, weights: MHAWeights, arrays: tuple[np.ndarray, ...], call: dict[str, Any], seed: int
) -> dict[str, Any]:
    """A random gradient for the output: the loss whose gradients are compared."""
    plain = {name: item for name, item in call.items() if name not in ("grad_output", "grad_attn_weights")}
    prepared = prepare(spec, weights, *arrays, **plain)
    shape = restore(prepared, reference.attend(spec, weights, prepared.call)).output.shape
    rng = np.random.default_rng([seed, 3])
    return {"grad_output": dtypes.round_to(rng.standard_normal(shape), spec.dtype)}


def _run(
    name: str, spec: MHASpec, weights: MHAWeights, arrays: Any, call: dict[str, Any], timeout: float | None
) -> tuple[Run, Result | None]:
    run = Run(name, name.partition("@")[0], "", "", "failed")
    try:
        backend = find_backend(name)
        run = _described(run, backend)
        result = backend.run(spec, weights, *arrays, timeout=timeout, **call)
        run = _described(run, backend)  # a worker tells its version once it runs
    except UnsupportedError as error:
        return dataclasses.replace(run, status="refused", reason=str(error)), None
    except MHABridgeError as error:
        return dataclasses.replace(run, status="failed", reason=str(error)), None
    return dataclasses.replace(run, status="answered", notes=result.notes), result


def _described(run: Run, backend: Backend) -> Run:
    info = backend.info
    return dataclasses.replace(run, framework=info.framework, version=info.version or "", where=info.where)


def _judged(
    prepared: Prepared,
    weights: MHAWeights,
    exact: dict[str, np.ndarray],
    frameworks: dict[str, str],
    answers: dict[str, dict[str, np.ndarray]],
) -> list[Entry]:
    expected = {name: accuracy(frameworks[name], prepared.spec.dtype) for name in answers}
    limits = {each: bounds(prepared, weights, exact, each) for each in set(expected.values())}
    return [
        Entry(name, tensor, judge(answer.get(tensor), exact[tensor], limits[expected[name]][tensor]))
        for name, answer in answers.items()
        for tensor in exact
    ]


def _pairs(answers: dict[str, dict[str, np.ndarray]]) -> list[Pair]:
    """Where each two backends differ most, the worst first; what cannot be compared is judged elsewhere."""
    pairs = []
    for first, second in itertools.combinations(answers, 2):
        for tensor in answers[first]:
            a, b = answers[first][tensor], answers[second].get(tensor)
            if b is None or a.shape != b.shape or not a.size:
                continue
            difference = np.abs(dtypes.to_float64(a) - dtypes.to_float64(b))
            index = np.unravel_index(int(np.argmax(np.where(np.isfinite(difference), difference, -1.0))), a.shape)
            values = (float(a[index]), float(b[index]))
            pairs.append(Pair(tensor, first, second, float(difference[index]), tuple(int(i) for i in index), values))
    return sorted(pairs, key=lambda pair: -pair.max_difference)
