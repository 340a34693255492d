"""A sweep over the space of layers and calls: seeded, every pair of feature values at least once, on every backend.

600 cases for each backend; ``--sweep 5000`` runs more. No case is skipped: what a backend does not have (a dtype) must
be refused by name, everything else is answered and judged, outputs, weights and gradients.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, dtypes
from mhabridge.errors import ArgumentError
from tests.test_conformance import check_on, refused

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


def draw(number: int) -> dict[str, Any]:
    """Case ``number``: one value of each feature, made to fit each other."""
    rng = np.random.default_rng([2026, number])
    case = {name: values[int(rng.integers(len(values)))] for name, values in FEATURES.items()}
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


def run_case(backend: str, number: int) -> None:
    case = draw(number)
    spec = layer(case)
    arrays, call = arguments(case, spec, np.random.default_rng([7, number]))
    refuse = refused(backend, case["mode"], "dtypes", spec.dtype)
    try:
        check_on(backend, spec, MHAWeights.random(spec, number), arrays, refuse, **call)
    except Exception as error:
        raise AssertionError(f"case {number}: {case}") from error


def test_sweep(backend_name: str, chunk: int) -> None:
    for number in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        run_case(backend_name, number)


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


def test_layers_that_cannot_be_are_not_drawn() -> None:
    for number in range(600):
        try:
            layer(draw(number))
        except ArgumentError as error:
            pytest.fail(f"case {number}: {error}")
