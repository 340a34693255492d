"""A sweep over the space of layers and calls: seeded, every pair of feature values at least once, on every backend.

600 cases for each backend; ``--sweep 5000`` runs more. Each case runs in the mode that it drew, "auto" or "composed",
and in mode "native". No case is skipped: outputs, weights and gradients are judged, or the call is refused, and then
the features that the error names are those of tests/refusals.toml that the case has.

Where "auto" answers with the native layer, "native" is the same computation: of those only every tenth runs twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, UnsupportedError, dtypes, mapping, reference
from mhabridge.backends.running import prepare
from mhabridge.calls import Call
from mhabridge.envelope import FEATURES as NATIVE_FEATURES
from mhabridge.errors import ArgumentError
from tests.test_conformance import answer, check_on, refusals, refused

pytestmark = pytest.mark.frameworks

FEATURES: dict[str, tuple[Any, ...]] = {
    "sizes": ((8, 1), (16, 4), (12, 3)),
    "kdim": (None, 5),
    "vdim": (None, 7),
    "biases": ({}, {"bias": False}, {"k_bias": False}, {"bias": False, "out_bias": True}),
    "extra": ({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}),
    "projections": ("usual", "other", "no value", "no query and key", "no output"),
    "batch_first": (False, True),
    "residual": (False, True),
    "scale": (None, 0.3),
    "dtype": ("float32", "float16", "float64", "bfloat16"),
    "key_padding_mask": (None, "bool", "uint8", "int64", "float32", "float16"),
    "attn_mask": (None, "bool", "uint8", "float32", "float64"),
    "heads_masked": (False, True),
    "is_causal": (False, True),
    "need_weights": (True, False),
    "average_attn_weights": (True, False),
    "dead": (None, "nan", "zero"),
    "batched": (True, False),
    "gradients": (None, "output", "weights", "both"),
    "lengths": ((2, 4, 5), (1, 3, 3), (3, 1, 6), (2, 5, 1)),
    "size_of_inputs": (1.0, 8.0),
    "mode": ("auto", "composed"),
}
CHUNK = 25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chunk" in metafunc.fixturenames:
        metafunc.parametrize("chunk", range(-(-metafunc.config.getoption("--sweep") // CHUNK)))


def draw(number: int) -> dict[str, Any]:
    """Case ``number``: one value of each feature, made to fit each other.

    Half of the layers, and half of their calls, are such as native layers take, or these would hardly ever be asked.
    """
    rng = np.random.default_rng([2026, number])
    case = {name: values[int(rng.integers(len(values)))] for name, values in FEATURES.items()}
    usual_layer, usual_call = rng.integers(2, size=2)
    if usual_layer:
        case.update(projections="usual", residual=False, scale=None)
    if usual_layer and usual_call:
        case.update(extra={}, dtype="float32", gradients=case["gradients"] and "output")
    if case["gradients"] in ("weights", "both"):
        case["need_weights"] = True
    if not case["batched"]:
        case["lengths"] = (1, *case["lengths"][1:])
    if case["residual"] and case["projections"] in ("other", "no output"):
        case["projections"] = "usual"
    return case


def layer(case: dict[str, Any]) -> MHASpec:
    embed, heads = case["sizes"]
    kdim = embed if case["projections"] == "no query and key" else case["kdim"]
    projections = {
        "usual": {},
        "other": {"q_proj_size": 2 * heads, "k_proj_size": 2 * heads, "v_proj_size": 3 * heads, "out_proj_size": 5},
        "no value": {"v_proj_size": 0},
        "no query and key": {"q_proj_size": 0, "k_proj_size": 0},
        "no output": {"out_proj_size": 0},
    }[case["projections"]]
    fields = {**case["biases"], **case["extra"], **projections}
    fields = {k: v for k, v in fields.items() if not (v is True and fields.get(k.replace("bias", "proj_size")) == 0)}
    names = ("vdim", "batch_first", "residual", "scale", "dtype")
    return MHASpec(embed, heads, kdim=kdim, **{name: case[name] for name in names}, **fields)


def arguments(case: dict[str, Any], spec: MHASpec, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    batch, target, source = case["lengths"]
    shapes = ((target, spec.embed_dim), (source, spec.key_features), (source, spec.value_features))
    arrays = []
    for length, features in shapes:
        shape = (batch, length, features) if spec.batch_first else (length, batch, features)
        shape = shape if case["batched"] else (length, features)
        arrays.append(dtypes.round_to(rng.standard_normal(shape) * case["size_of_inputs"], spec.dtype))
    call = {name: case[name] for name in ("is_causal", "need_weights", "average_attn_weights", "mode")}
    call.update(masks(case, spec, rng))
    call.update(seeds(case, spec, rng))
    return tuple(arrays), call


def masks(case: dict[str, Any], spec: MHASpec, rng: np.random.Generator) -> dict[str, Any]:
    batch, target, source = case["lengths"]
    found: dict[str, Any] = {}
    if case["key_padding_mask"]:
        blocked = rng.random((batch, source)) < 0.3
        blocked[:, 0] = False
        blocked = blocked if case["batched"] else blocked[0]
        found["key_padding_mask"] = as_mask(blocked, case["key_padding_mask"], rng)
    if case["attn_mask"]:
        heads = batch * spec.num_heads if case["heads_masked"] else 1
        blocked = rng.random((heads, target, source)) < 0.3
        blocked[..., 0] = False
        if case["dead"]:
            blocked[0, -1] = True
        found["attn_mask"] = as_mask(blocked if case["heads_masked"] else blocked[0], case["attn_mask"], rng)
    if case["dead"]:
        found["fully_masked"] = case["dead"]
    return found


def as_mask(blocked: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind.startswith("float"):
        return np.where(blocked, -np.inf, rng.standard_normal(blocked.shape)).astype(kind)
    return blocked.astype(kind) * (7 if kind == "uint8" else 1)


def seeds(case: dict[str, Any], spec: MHASpec, rng: np.random.Generator) -> dict[str, Any]:
    batch, target, source = case["lengths"]
    outer = (batch, target) if spec.batch_first else (target, batch)
    output = (*(outer if case["batched"] else (target,)), spec.out_features)
    heads = () if case["average_attn_weights"] else (spec.num_heads,)
    weights = (*((batch,) if case["batched"] else ()), *heads, target, source + spec.extra_columns)
    found = {}
    if case["gradients"] in ("output", "both"):
        found["grad_output"] = dtypes.round_to(rng.standard_normal(output), spec.dtype)
    if case["gradients"] in ("weights", "both"):
        found["grad_attn_weights"] = dtypes.round_to(rng.standard_normal(weights), spec.dtype)
    return found


def scores_too_low(spec: MHASpec, weights: MHAWeights, call: Call) -> bool:
    """Whether all scores of a row lie where MegEngine's softmax loses digits."""
    largest = reference.score_rows(spec, weights, call)
    return bool(((largest < -80.0) & np.isfinite(largest)).any())


# What a native layer refuses because of a number, when it could take all features of the call.
NUMBERS: dict[str, Callable[[MHASpec, MHAWeights, Call], bool]] = {
    "scale": lambda spec, weights, call: not np.isclose(spec.score_scale, (spec.embed_dim / spec.num_heads) ** -0.5),
    "scores": scores_too_low,
}


class Case:
    """A case of the sweep, ready to run on any backend."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.drawn = draw(number)
        self.spec = layer(self.drawn)
        self.weights = MHAWeights.random(self.spec, number)
        self.arrays, self.call = arguments(self.drawn, self.spec, np.random.default_rng([7, number]))

    def run(self, backend: str, mode: str, refuse: bool) -> Any:
        """Judge the answer in a mode, or see the call refused."""
        return check_on(backend, self.spec, self.weights, self.arrays, refuse, **{**self.call, "mode": mode})

    def beyond_native(self, backend: str) -> set[str]:
        """What tests/refusals.toml says that the native layer refuses of this case, by name; empty: it answers."""
        row = refusals()[backend]
        call = prepare(self.spec, self.weights, *self.arrays, **self.call).call
        if self.spec.dtype in row["missing_dtypes"]:
            return {self.spec.dtype}
        found = {name for name in (*row["features"], *row["dtypes"]) if NATIVE_FEATURES[name](self.spec, call)}
        return found or {name for name in row["numbers"] if NUMBERS[name](self.spec, self.weights, call)}


def run_case(backend: str, number: int) -> None:
    case = Case(number)
    try:
        mode, beyond = case.drawn["mode"], case.beyond_native(backend)
        result = case.run(backend, mode, refused(backend, mode, "dtypes", case.spec.dtype))
        is_native = result is not None and result.notes[0].startswith("native")
        if backend != mapping.REFERENCE and result is not None and mode == "auto":
            assert is_native == (not beyond), (result.notes, beyond)
        if beyond:
            see_refused(backend, case, beyond)
        elif not is_native or number % 10 == 0:
            case.run(backend, "native", False)
    except Exception as error:
        raise AssertionError(f"case {number}: {case.drawn}") from error


def see_refused(backend: str, case: Case, beyond: set[str]) -> None:
    """Mode "native" refuses a case, and names what is listed for it, all of it and nothing else."""
    with pytest.raises(UnsupportedError) as found:
        answer(backend, case.spec, case.weights, case.arrays, **{**case.call, "mode": "native"})
    assert set(found.value.subject.split(", ")) == beyond
    assert all(f"{name}: " in found.value.advice for name in beyond)


def test_sweep(backend_name: str, chunk: int) -> None:
    for number in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        run_case(backend_name, number)


def test_native_layers_answer_many_of_the_cases(backend_name: str) -> None:
    """``test_sweep`` holds each case to what is listed; so this counts the native answers among the first 600."""
    answered = sum(not Case(number).beyond_native(backend_name) for number in range(600))
    assert answered >= refusals()[backend_name]["sweep_answers"]


def test_the_sweep_covers_every_pair_of_values() -> None:
    cases = [draw(number) for number in range(600)]
    impossible = 0
    for (one, ones), (two, twos) in itertools.combinations(FEATURES.items(), 2):
        found = {(repr(case[one]), repr(case[two])) for case in cases}
        for a, b in itertools.product(ones, twos):
            if (repr(a), repr(b)) not in found:
                impossible += 1
                assert cannot_be(one, a, two, b), (one, a, two, b)
    assert impossible < 30


def cannot_be(one: str, a: Any, two: str, b: Any) -> bool:
    """The pairs that do not fit each other: see ``draw``."""
    pair = {one: a, two: b}
    if pair.get("need_weights") is False and pair.get("gradients") in ("weights", "both"):
        return True
    if pair.get("residual") is True and pair.get("projections") in ("other", "no output"):
        return True
    return pair.get("batched") is False and "lengths" in pair and pair["lengths"][0] != 1


def test_a_case_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep judges: a reference that answers another question fails it."""
    from mhabridge import reference

    true = reference.attend
    number = next(n for n in range(99) if draw(n)["dtype"] == "float32" and not draw(n)["dead"])

    def wrong(spec: MHASpec, weights: Any, call: Any, **options: Any) -> Any:
        return true(spec.replace(scale=2.0 * spec.score_scale), weights, call, **options)

    run_case("numpy", number)
    monkeypatch.setattr("tests.cases.reference.attend", wrong)
    with pytest.raises(AssertionError, match=f"case {number}"):
        run_case("torch", number)


@pytest.mark.parametrize(("beyond", "listed"), [({"residual"}, []), (set(), ["float16"])])
def test_a_refusal_that_is_not_listed_is_seen_and_a_listed_one_that_is_not_made(
    beyond: set[str], listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (Case(n) for n in range(99))
    case = next(case for case in cases if case.spec.dtype == "float16" and case.beyond_native("torch") == beyond)
    run_case("torch", case.number)
    row = {**refusals()["torch"], "features": listed}
    monkeypatch.setattr("tests.test_sweep.refusals", lambda: {"torch": row})
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_case("torch", case.number)


def test_layers_that_cannot_be_are_not_drawn() -> None:
    for number in range(600):
        try:
            layer(draw(number))
        except ArgumentError as error:
            pytest.fail(f"case {number}: {error}")
