"""``mb.diff``: the same spec, weights and inputs on each backend, judged against the float64 reference."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from typing import Any

import numpy as np

from mhabridge import dtypes, mapping, reference
from mhabridge.backends.registry import Backend, ctrl_c_ends_workers
from mhabridge.backends.registry import backend as find_backend
from mhabridge.backends.running import Prepared, prepare, restore
from mhabridge.calls import Result
from mhabridge.diff import training
from mhabridge.diff.comparing import VERDICTS, compare
from mhabridge.diff.diagnosis import Diagnosis
from mhabridge.diff.inputs import random_inputs
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.report import REFERENCE, DiffReport, Entry, Picture, Run, Step
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, MHABridgeError, UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]  # query, key, value


@dataclasses.dataclass(frozen=True)
class _Job:
    """One call that every backend gets."""

    spec: MHASpec
    weights: MHAWeights
    arrays: Inputs
    call: dict[str, Any]
    timeout: float | None


def diff(
    spec: MHASpec,
    backends: Any,
    weights: MHAWeights | None = None,
    inputs: Any = None,
    seed: int = 0,
    dtype: str | None = None,
    grads: bool = False,
    steps: int = 0,
    pictures: bool = False,
    **call: Any,
) -> DiffReport:
    """Run one call on several backends and judge each answer by what rounding justifies.

    Backends in other interpreters run at the same time.

    Args:
        spec: the layer.
        backends: names, such as ["torch", "mindspore", "megengine"].
        weights: the layer's parameters; None draws some by ``seed``.
        inputs: {"query": ..., "key": ..., "value": ...} or the three in a sequence, NumPy arrays in the spec's axis
            order; None draws some by ``seed``.
        seed: for what is drawn.
        dtype: compute in this dtype: weights and inputs are rounded to it on purpose, first.
        grads: also compare the gradients of inputs and parameters, for a loss drawn by ``seed``.
        steps: also train every backend for so many steps, see ``diff/training.py``.
        pictures: keep what the page draws: ``report.to_html`` has heat maps then.
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
    training.check(steps, names)
    spec, weights, arrays = _material(spec, weights, inputs, seed, dtype)
    timeout = call.pop("timeout", None)
    if grads:
        call.update(_random_grads(spec, weights, arrays, call, seed))
    prepared = prepare(spec, weights, *arrays, **call)
    if not prepared.finite:
        raise ArgumentError(
            "weights and inputs", given="NaN or an infinity", expected="finite numbers: nothing can be judged by others"
        )
    exact = named(restore(prepared, reference.attend(spec, weights, prepared.call)))
    if not exact["output"].size:
        raise ArgumentError("inputs", given="no output element (N or L is 0)", expected="something to compare")
    job = _Job(spec, weights, (arrays[0], arrays[1], arrays[2]), call, timeout)
    runs, answers = _ask(names, job)
    frameworks = {run.backend: run.framework for run in runs}
    entries = _judged(prepared, weights, exact, frameworks, answers)
    trained: tuple[Step, ...] = ()
    if steps and answers:
        target = np.random.default_rng([seed, 4]).standard_normal(exact["output"].shape)
        task = training.Task(spec, weights, arrays, call, target, steps, timeout=timeout)
        trained, failed = training.train(task, [*answers])
        runs = [_failed_in_training(run, failed.get(run.backend)) for run in runs]
    return DiffReport(
        tuple(runs),
        tuple(entries),
        pairs=tuple(_pairs(answers, entries)),
        diagnoses=tuple(_diagnosed(entries, job, frameworks, answers)),
        pictures=tuple(_pictures(prepared, answers, exact)) if pictures else (),
        steps=trained,
        spec=spec,
        seed=seed,
        dtype=spec.dtype,
    )


def _failed_in_training(run: Run, error: MHABridgeError | None) -> Run:
    return run if error is None else dataclasses.replace(run, status="failed", reason=f"in training: {error}")


def _names(backends: Any) -> list[str]:
    names = [name.strip() for name in backends.split(",")] if isinstance(backends, str) else list(backends)
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


def _ask(names: list[str], job: _Job) -> tuple[list[Run], dict[str, dict[str, np.ndarray]]]:
    """Every backend's answer, in the order of the names: workers at the same time, this process's one after another."""
    found = [_found(name) for name in names]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool, ctrl_c_ends_workers():
        # A framework in this process stays in this thread: MegEngine works in the main one only.
        waiting = {i: pool.submit(_run, each, job) for i, each in enumerate(found) if _elsewhere(each)}
        done = {i: _run(each, job) for i, each in enumerate(found) if i not in waiting}
        done.update({i: future.result() for i, future in waiting.items()})
    runs = [done[i][0] for i in range(len(names))]
    results = {name: done[i][1] for i, name in enumerate(names)}
    return runs, {name: named(result) for name, result in results.items() if result is not None}


def _found(name: str) -> Backend | Run:
    """A backend, or the row that says why there is none."""
    try:
        return find_backend(name)
    except MHABridgeError as error:
        return Run(name, name.partition("@")[0], "", "", "failed", str(error))


def _elsewhere(backend: Backend | Run) -> bool:
    return isinstance(backend, Backend) and backend.info.where == "worker"


def _run(backend: Backend | Run, job: _Job) -> tuple[Run, Result | None]:
    if isinstance(backend, Run):
        return backend, None
    run = _described(Run(backend.info.name, "", "", "", "failed"), backend)
    try:
        result = backend.run(job.spec, job.weights, *job.arrays, timeout=job.timeout, **job.call)
        run = _described(run, backend)  # a worker tells its version once it runs
        run = dataclasses.replace(run, environment=_environment(backend))
    except UnsupportedError as error:
        return dataclasses.replace(run, status="refused", reason=str(error)), None
    except MHABridgeError as error:
        return dataclasses.replace(run, reason=_why(error, job)), None
    return dataclasses.replace(run, status="answered", notes=result.notes), result


def _why(error: MHABridgeError, job: _Job) -> str:
    """What went wrong; of a worker that died, how and where in a few words first."""
    ending = error.ending if isinstance(error, BackendError) else ""
    if not ending:
        return str(error)
    where = "forward or backward" if job.call.get("grad_output") is not None else "forward"
    return f"died: {ending} in {where}. {error}"


def _described(run: Run, backend: Backend) -> Run:
    info = backend.info
    return dataclasses.replace(run, framework=info.framework, version=info.version or "", where=info.where)


def _environment(backend: Backend) -> dict[str, str]:
    known = backend.call("describe", {})
    return {name: str(known[name]) for name in ("python", "numpy", "host")}


def _judged(
    prepared: Prepared,
    weights: MHAWeights,
    exact: dict[str, np.ndarray],
    frameworks: dict[str, str],
    answers: dict[str, dict[str, np.ndarray]],
) -> list[Entry]:
    """Every backend beside the float64 reference."""
    expected = {name: accuracy(frameworks[name], prepared.spec.dtype) for name in answers}
    limits = {each: bounds(prepared, weights, exact, each) for each in set(expected.values())}
    entries = []
    for name, answer in answers.items():
        for tensor in dict.fromkeys((*exact, *answer)):
            distance = None
            if tensor in exact:
                dtype = _dtype_of(tensor, frameworks[name], prepared.spec.dtype)
                distance = judge(answer.get(tensor), exact[tensor], limits[expected[name]][tensor], dtype)
            entries.append(_entry(tensor, REFERENCE, name, exact.get(tensor), answer.get(tensor), (_EXACT, distance)))
    return entries


_EXACT = Distance("equal", max_error=0.0, mean_error=0.0, times_bound=0.0, times_mean_bound=0.0)


def _dtype_of(tensor: str, framework: str, dtype: str) -> str:
    """What a backend must answer in; the reference has float64, and a mask's gradient the mask's own dtype."""
    free = framework == mapping.REFERENCE or tensor in ("grads.attn_mask", "grads.key_padding_mask")
    return "" if free else dtype


def _entry(
    tensor: str,
    first: str,
    second: str,
    a: np.ndarray | None,
    b: np.ndarray | None,
    distances: tuple[Distance | None, Distance | None],
) -> Entry:
    allowed = None if a is None else ~np.isfinite(dtypes.to_float64(a))
    if first == REFERENCE and a is not None and b is not None and dtypes.name_of(b) in dtypes.FLOATS:
        a = np.asarray(dtypes.round_to(a, dtypes.name_of(b)))  # "equal" is what the dtype can hold of the reference
    return Entry("", tensor, first, second, compare(a, b, distances=distances, allowed=allowed))


def _pairs(answers: dict[str, dict[str, np.ndarray]], entries: list[Entry]) -> list[Entry]:
    """Each two backends beside each other, the worst first."""
    known = {(entry.second, entry.tensor): entry.comparison.distances[1] for entry in entries}
    pairs = []
    for a, b in itertools.combinations(answers, 2):
        for tensor in dict.fromkeys((*answers[a], *answers[b])):
            distances = known.get((a, tensor)), known.get((b, tensor))
            pairs.append(_entry(tensor, a, b, answers[a].get(tensor), answers[b].get(tensor), distances))
    return sorted(pairs, key=lambda pair: (-VERDICTS.index(pair.comparison.verdict), -pair.comparison.max_abs))


def _diagnosed(
    entries: list[Entry], job: _Job, frameworks: dict[str, str], answers: dict[str, dict[str, np.ndarray]]
) -> list[Diagnosis]:
    """What explains each backend that rounding does not."""
    off = dict.fromkeys(entry.second for entry in entries if not entry.ok)
    if not off:
        return []
    from mhabridge.diff.diagnosis.search import diagnose

    return [
        diagnose(
            job.spec,
            job.weights,
            job.arrays,
            job.call,
            answers[name],
            accuracy(frameworks[name], job.spec.dtype),
            side=name,
        )
        for name in off
    ]


def _pictures(
    prepared: Prepared, answers: dict[str, dict[str, np.ndarray]], exact: dict[str, np.ndarray]
) -> list[Picture]:
    """Each backend beside the reference, and each two beside each other; gradients of parameters are not drawn."""
    from mhabridge.diff.pictures import picture

    sides = {REFERENCE: exact, **answers}
    return [
        picture("", tensor, a, b, sides[a][tensor], sides[b][tensor], unbatched=not prepared.batched)
        for a, b in itertools.combinations(sides, 2)
        for tensor in ("output", "attn_weights", "grads.query", "grads.key", "grads.value")
        if tensor in sides[a] and tensor in sides[b] and sides[a][tensor].shape == sides[b][tensor].shape
    ]
