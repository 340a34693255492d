"""What was observed, and how well a ``State`` explains it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mhabridge import dtypes, masks
from mhabridge.backends.running import Prepared, prepare
from mhabridge.checks import sizes_of
from mhabridge.diff.diagnosis.computing import Computer, Cut
from mhabridge.diff.diagnosis.state import Memo, State, clean_state
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.rounding import SAMPLES, SPREAD, Accuracy, Bound, bounds_of, noisy
from mhabridge.errors import ArgumentError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FORWARD = ("output", "attn_weights")
FILTER_ROWS = 32  # query rows that the cheap filter looks at, over all batch elements
FILTER_FEATURES = 64
FILTER_LARGE = 16_384  # keys by features beyond which it looks at fewer rows still
FILTER_SAMPLES = 4  # its bounds are a yardstick only
VERIFY_FLOPS = 6e7  # of one computation of what is judged with full bounds
FEW_ROWS = 32  # before there are fewer than those, fewer batch elements are looked at
VERIFY_SCORES = 1e6  # attention weights of such a computation; each is drawn many times
MIXED_SCORES = 3e6  # the same of what cannot be cut
SCORES = 4e6  # attention weights that are computed at once where the whole call is looked at
MIXED_FLOPS = 1e9  # of one computation that cannot be cut; a larger one is not tried
_ARGUMENTS = (
    "key_padding_mask",
    "attn_mask",
    "is_causal",
    "need_weights",
    "average_attn_weights",
    "fully_masked",
    "training",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call whose answer is to be explained.

    Args:
        spec: the layer.
        state: the computation as it should be.
        observed: "output" and "attn_weights", those that are there, batch first.
        strange: names of observed tensors whose shape does not even fit the call.
        expected: what the backend computes in.
        training: dropout is active.
        sizes: N, H, L, S.
        memo: where arrays are kept.
    """

    spec: MHASpec
    state: State
    observed: Mapping[str, np.ndarray]
    strange: tuple[str, ...]
    expected: Accuracy
    training: bool
    sizes: masks.Sizes
    memo: Memo

    @property
    def per_head(self) -> bool:
        """Whether the weights of each head were observed."""
        weights = self.observed.get("attn_weights")
        return weights is not None and weights.ndim == 4

    @functools.cached_property
    def off(self) -> np.ndarray:
        """How far off each row is from the computation as it should be, (N, L); infinite where only one is finite."""
        return _where_off(self)


def read(
    spec: MHASpec,
    weights: MHAWeights,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    call: Mapping[str, Any],
    observed: Mapping[str, np.ndarray],
    expected: Accuracy,
) -> Case:
    """A case from what a user passed and got.

    Args:
        spec: the layer.
        weights: its parameters, as they should be.
        inputs: query, key and value in the user's axis order.
        call: the other arguments of ``Backend.run``; those that do not matter here are ignored.
        observed: tensors by name, in the user's shapes.
        expected: what the backend computes in.

    Raises:
        ArgumentError: the call is wrong in itself.
    """
    options = {name: call[name] for name in _ARGUMENTS if name in call}
    options["need_weights"] = True
    prepared = prepare(spec, weights, *inputs, any_dtype=True, **options)
    sizes = sizes_of(spec, inputs[0], inputs[1], prepared.batched)
    memo = Memo()
    parts = _mask_parts(options, sizes)
    found = {name: _canonical(prepared, name, observed[name]) for name in FORWARD if observed.get(name) is not None}
    fitting = {name: array for name, array in found.items() if _fits(array, name, sizes)}
    strange = tuple(name for name in found if name not in fitting)
    state = clean_state(prepared, weights, parts, memo)
    return Case(spec, state, fitting, strange, expected, bool(options.get("training")), sizes, memo)


def _mask_parts(options: Mapping[str, Any], sizes: masks.Sizes) -> dict[str, masks.Masks]:
    padding, attention = options.get("key_padding_mask"), options.get("attn_mask")
    parts = {}
    if padding is not None:
        parts["key_padding_mask"] = masks.canonical(padding, None, sizes=sizes)
    if attention is not None:
        parts["attn_mask"] = masks.canonical(None, attention, sizes=sizes)
    if options.get("is_causal"):
        parts["is_causal"] = masks.canonical(None, None, True, sizes=sizes)
    return parts


def _canonical(prepared: Prepared, name: str, array: Any) -> np.ndarray:
    """Batch first; an array of another number of axes stays as it is, and fits nothing."""
    array = np.asarray(array)
    if not prepared.batched:
        return np.asarray(array[None])
    return prepared.canonical(array) if name == "output" and array.ndim == 3 else array


def _fits(array: np.ndarray, name: str, sizes: masks.Sizes) -> bool:
    """Whether it has the batch elements and rows of the call."""
    if dtypes.name_of(array) not in dtypes.FLOATS or array.ndim not in ((3,) if name == "output" else (3, 4)):
        return False
    rows = array.shape[-2]
    return bool(array.size) and array.shape[0] == sizes.batch and rows == sizes.target


def swapped(
    spec: MHASpec,
    weights: MHAWeights,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    call: Mapping[str, Any],
    observed: Mapping[str, np.ndarray],
    expected: Accuracy,
) -> Case | None:
    """The case as a layer sees it that takes the batch for the sequence; None where its shapes would not fit."""
    if inputs[0].ndim != 3 or inputs[0].shape[:2] != inputs[1].shape[:2]:
        return None
    other = spec.replace(batch_first=not spec.batch_first)
    try:
        return read(other, weights, inputs, call, observed, expected)
    except ArgumentError:  # masks that do not fit
        return None


# -- how well a state explains it --------------------------------------------------------------------------------------


def choose(case: Case, mixes: str = "", filtering: bool = False) -> Cut | None:
    """Which part of the call to look at: all of it if that is cheap, else where it is off most and some of the rest.

    Args:
        case: the call.
        mixes: what cannot be computed by itself, as ``State.mixes`` says.
        filtering: for the cheap filter.

    Returns:
        None where the least that can be computed by itself is too much.
    """
    sizes = case.sizes
    features = case.spec.embed_dim
    source = 4.0 * sizes.source * features**2
    row = 4.0 * features**2 + 4.0 * sizes.source * features
    if mixes:
        least = (source + sizes.target * row) * (sizes.batch if mixes == "batches" else 1)
        whole = case.spec.num_heads * sizes.target * sizes.source * (sizes.batch if mixes == "batches" else 1)
        if least > MIXED_FLOPS or whole > MIXED_SCORES:
            return None
    if mixes == "batches":
        return Cut()
    count, rows = sizes.batch, sizes.target
    if filtering:
        large = sizes.source * features > FILTER_LARGE
        count = min(count, 2 if large else 4)
        rows = rows if mixes else min(rows, 6 if large else max(8, FILTER_ROWS // count))
    elif count * (source + rows * row) > VERIFY_FLOPS:
        count = min(count, max(2, int(VERIFY_FLOPS / (source + rows * row))))
        rows = rows if mixes else min(rows, max(32, int((VERIFY_FLOPS / count - source) / row)))
    scores = case.spec.num_heads * sizes.source
    count = max(1, min(count, int(VERIFY_SCORES / (scores * min(rows, FEW_ROWS)))))
    rows = rows if mixes else max(1, min(rows, int(VERIFY_SCORES / (scores * count))))
    error = case.off if count < sizes.batch or rows < sizes.target else None
    wide = filtering and case.spec.out_features > FILTER_FEATURES
    return Cut(
        batches=None if error is None or count == sizes.batch else _worst(error.max(axis=1), count),
        rows=None if error is None or rows == sizes.target else _worst(error.max(axis=0), rows),
        features=_spread(case.spec.out_features, FILTER_FEATURES) if wide else None,
    )


def _where_off(case: Case) -> np.ndarray:
    """How far off each row is, (N, L); infinite where NaN or inf is on one side only."""
    total = np.zeros((case.sizes.batch, case.sizes.target))
    step = max(1, int(SCORES / (case.spec.num_heads * case.sizes.source)))
    for number in range(case.sizes.batch):
        for start in range(0, case.sizes.target, step):
            rows = np.arange(start, min(start + step, case.sizes.target))
            total[number, rows] = _rows_off(Bench(case, Cut(np.array([number]), rows), bounds=False))[0]
    return total


def _rows_off(bench: Bench) -> np.ndarray:
    exact = bench.computer.run(bench.case.state, "attn_weights" in bench.observed)
    total = np.zeros(bench.cut.of(np.empty((bench.case.sizes.batch, bench.case.sizes.target, 0))).shape[:2])
    for name, observed in bench.observed.items():
        if observed.shape != exact[name].shape:
            continue
        with np.errstate(invalid="ignore"):
            error = np.abs(observed - exact[name])
        alike = np.isnan(observed) & np.isnan(exact[name])
        error = np.where(alike, 0.0, np.where(np.isnan(error), np.inf, error)).max(axis=-1)
        total = np.maximum(total, error if error.ndim == 2 else error.max(axis=1))
    return total


def _worst(error: np.ndarray, count: int) -> np.ndarray:
    """Half of them the largest errors, the others spread evenly over the rest; in order."""
    largest = np.argsort(-error, kind="stable")[: (count + 1) // 2]
    rest = np.setdiff1d(np.arange(len(error)), largest)
    return np.sort(np.concatenate([largest, rest[_spread(len(rest), count - len(largest))]]))


def _spread(size: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int)) if count else np.arange(0)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well one computation explains the observed tensors.

    Args:
        times: the largest error as a multiple of its bound (elements and means); at most 1 explains.
        unlikely: minus the logarithm of how likely the errors are, if rounding is normally distributed; only
            differences between fits mean something.
        distances: each tensor's.
    """

    times: float
    unlikely: float
    distances: Mapping[str, Distance]

    @property
    def ok(self) -> bool:
        """Whether rounding explains what is left."""
        return all(distance.ok for distance in self.distances.values())


class Bench:
    """One part of a case, on which states are tried."""

    def __init__(self, case: Case, cut: Cut, bounds: bool = True, samples: int = SAMPLES) -> None:
        self.case, self.cut = case, cut
        self._samples = samples
        self._drawn = 0.0  # work of noisy computations
        self.computer = Computer(cut=cut)
        self.native = {name: self._part(name, array) for name, array in case.observed.items()}
        self.observed = {name: dtypes.to_float64(array) for name, array in self.native.items()}
        self._weights_misfit: dict[Any, float] = {}
        if bounds:
            exact = self.computer.run(case.state)
            self.bounds = self.bounds_of(case.state, exact, case.expected)
            self._inverse = {name: self._scales(name, exact[name]) for name in self.observed}
            self._scaled = {name: self.observed[name] * self._inverse[name] for name in self.observed}
            self._finite = {name: np.isfinite(array) for name, array in self.observed.items()}

    def _part(self, name: str, array: np.ndarray) -> np.ndarray:
        part = self.cut.of(array)
        return part if name != "output" or self.cut.features is None else part[..., self.cut.features]

    def _scales(self, name: str, exact: np.ndarray) -> np.ndarray:
        """One over what rounding justifies in each row of the clean computation."""
        each = np.broadcast_to(self.bounds[name].each, exact.shape).max(axis=-1, keepdims=True)
        fits = exact.shape[:-1] == self.observed[name].shape[:-1]
        positive = each[each > 0]
        usual = float(np.median(positive)) if positive.size else 1.0
        return 1.0 / np.maximum(each, 1e-3 * usual) if fits else np.asarray(1.0 / usual)

    def bounds_of(self, state: State, exact: dict[str, np.ndarray], expected: Accuracy) -> dict[str, Bound]:
        """What rounding justifies in a computation.

        Args:
            state: the computation.
            exact: its float64 results by name.
            expected: what it is computed in.
        """
        arithmetic = noisy(expected, np.random.default_rng(0))
        samples = []
        for _ in range(self._samples):
            computer = Computer(arithmetic, self.cut)
            samples.append(computer.run(state, "attn_weights" in exact))
            self._drawn += computer.work
        return bounds_of(exact, samples, expected.dtype)

    @property
    def work(self) -> float:
        """How much was computed on it so far, as ``Computer.work`` counts."""
        return self.computer.work + self._drawn

    def misfit(self, state: State, limit: float = math.inf) -> float:
        """How far off a state is: the root mean square of error over clean bound, of the worse tensor.

        Args:
            state: the computation.
            limit: the output is not looked at if the weights are off by more.
        """
        with np.errstate(all="ignore"):
            weights = self.weights_misfit(state)
            if weights > limit or "output" not in self.observed:
                return weights
            return max(weights, self._misfit("output", self.computer.output(state)))

    def misfits(self, state: State) -> tuple[float, ...]:
        """The same for each tensor by itself: what goes wrong after the weights does not show in them."""
        with np.errstate(all="ignore"):
            found = [self.weights_misfit(state)] if "attn_weights" in self.observed else []
            if "output" in self.observed:
                found.append(self._misfit("output", self.computer.output(state)))
        return tuple(found)

    def weights_misfit(self, state: State) -> float:
        """The same for the returned attention weights alone; 0 if they were not observed."""
        if "attn_weights" not in self.observed:
            return 0.0
        key = self.computer.weights_key(state)
        if key not in self._weights_misfit:
            self._weights_misfit[key] = self._misfit("attn_weights", self.computer.returned(state))
        return self._weights_misfit[key]

    def _misfit(self, name: str, predicted: np.ndarray) -> float:
        scaled = self._scaled[name]
        if predicted.shape != scaled.shape:
            return math.inf
        error = (predicted * self._inverse[name] - scaled).ravel()
        square = float(np.dot(error, error))
        if math.isfinite(square):
            return math.sqrt(square / error.size)
        finite = self._finite[name]
        if (np.isfinite(predicted) != finite).any() or not finite.any():
            return math.inf if (np.isfinite(predicted) != finite).any() else 0.0
        return math.sqrt(float(np.mean(np.square(error.reshape(finite.shape)[finite]))))

    def fit(self, state: State, expected: Accuracy | None = None) -> Fit:
        """Judge what was observed by what rounding does to this computation."""
        expected = self.case.expected if expected is None else expected
        exact = {name: array for name, array in self.computer.run(state).items() if name in self.observed}
        if any(exact[name].shape != self.observed[name].shape for name in exact):
            return Fit(math.inf, math.inf, {name: Distance("broken") for name in exact})
        clean = state is self.case.state and expected == self.case.expected
        found = self.bounds if clean else self.bounds_of(state, exact, expected)
        distances = {name: judge(self.native[name], exact[name], found[name]) for name in exact}
        times = max(_times(distance) for distance in distances.values())
        unlikely = sum(_unlikely(self.observed[name], exact[name], found[name].each) for name in exact)
        return Fit(times, unlikely, distances)


def _times(distance: Distance) -> float:
    times = max(distance.times_bound, distance.times_mean_bound)
    return math.inf if distance.verdict == "broken" or math.isnan(times) else times


def _unlikely(observed: np.ndarray, exact: np.ndarray, each: np.ndarray) -> float:
    finite = np.isfinite(exact) & np.isfinite(observed)
    sigma = np.maximum(np.broadcast_to(each, exact.shape)[finite] / SPREAD, 1e-300)
    if not sigma.size:
        return 0.0
    return float(np.sum(0.5 * np.square((observed[finite] - exact[finite]) / sigma) + np.log(sigma)))
