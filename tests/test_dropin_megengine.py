"""MegEngine's drop-in and ``mb.attend`` on MegEngine modules, in MegEngine's own environment (worker_megengine.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, backends, manual_seed
from mhabridge.backends import shipping
from mhabridge.backends.worker import Worker
from mhabridge.calls import Result
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from mhabridge.initial import initial_values
from tests.cases import MASKS, L, N, S, masks_of, material, output_shape, reference_answer, spec_of

pytestmark = pytest.mark.frameworks

# What PyTorch's constructor can say.
LAYERS = (
    "plain",
    "batch first",
    "no bias",
    "kdim and vdim",
    "only vdim",
    "one head",
    "as many heads as features",
    "bias_kv",
    "zero_attn",
    "bias_kv and zero_attn",
)
# Each converts a bool or integer mask, or merges masks: where a write by a bool mask would race.
RACED = (
    "padding bool",
    "padding byte",
    "padding float",
    "attn bool",
    "attn byte",
    "attn int",
    "attn half",
    "attn per head bool",
    "causal and padding",
    "padding bool and attn float",
    "padding float and attn bool",
    "all three",
)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    info = next(info for info in backends() if info.name == "megengine")
    if not info.ok:
        pytest.skip(f"megengine: {info.reason}")
    modules = {
        "mhabridge.bridge": shipping.source("mhabridge.bridge"),
        "dropin": Path(__file__).with_name("worker_megengine.py").read_text(encoding="utf-8"),
    }
    made = Worker(info.python, "megengine", extra_modules=modules)
    yield made
    made.close()


def ask(worker: Worker, function: str, spec: MHASpec, weights: MHAWeights, inputs: Any, **more: Any) -> Any:
    payload = {"spec": spec.to_dict(), "weights": weights.to_tree(), "inputs": list(inputs), "call": {}, **more}
    return worker.call(f"dropin:{function}", payload, timeout=100)


def seeds_of(spec: MHASpec, call: dict[str, Any]) -> list[np.ndarray | None]:
    """Gradients of a loss with respect to the output and, where they are returned, the weights."""
    rng = np.random.default_rng(4)
    columns = S + spec.extra_columns
    shape = (N, L, columns) if call.get("average_attn_weights", True) else (N, spec.num_heads, L, columns)
    weights = rng.standard_normal(shape).astype(np.float32) if call.get("need_weights", True) else None
    return [rng.standard_normal(output_shape(spec)).astype(np.float32), weights]


def off(spec: MHASpec, weights: MHAWeights, inputs: Any, found: Result, seeds: Any = None, **call: Any) -> list[str]:
    """The tensors of an answer that rounding does not explain."""
    if seeds is not None:
        call.update(grad_output=seeds[0], grad_attn_weights=seeds[1])
    prepared, exact = reference_answer(spec, weights, inputs, **call)
    limits = bounds(prepared, weights, named(exact), accuracy("megengine", spec.dtype))
    tensors = named(found)
    assert set(tensors) == set(named(exact))
    distances = {name: judge(tensors[name], array, limits[name]) for name, array in named(exact).items()}
    return [f"{name}: {distance}" for name, distance in distances.items() if not distance.ok]


def check(worker: Worker, spec: MHASpec, inputs: Any = None, grads: bool = False, **call: Any) -> Result:
    """A call of the drop-in in evaluation, judged against the float64 reference; also its gradients."""
    return _check(worker, spec, inputs, grads, {}, **call)


def check_native(worker: Worker, spec: MHASpec, inputs: Any = None, grads: bool = False, **call: Any) -> Result:
    """The same through ``mb.attend`` on a native module."""
    return _check(worker, spec, inputs, grads, {"native": True}, **call)


def _check(worker: Worker, spec: MHASpec, inputs: Any, grads: bool, more: dict[str, Any], **call: Any) -> Result:
    weights, arrays = material(spec)
    inputs = arrays if inputs is None else inputs
    if grads:
        more = {**more, "seeds": seeds_of(spec, call)}
    found = Result.from_tree(ask(worker, "attend", spec, weights, inputs, call=call, **more))
    assert not off(spec, weights, inputs, found, more.get("seeds"), **call)
    return found


# -- answers and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_answers(worker: Worker, name: str, mask: str) -> None:
    spec = spec_of(name)
    check(worker, spec, **masks_of(mask, spec.num_heads))


@pytest.mark.parametrize("mask", ["none", "attn bool", "attn float", "attn per head float", "causal and padding"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_evaluation_through_output_weights_and_masks(worker: Worker, name: str, mask: str) -> None:
    spec = spec_of(name)
    found = check(worker, spec, grads=True, **masks_of(mask, spec.num_heads))
    assert ("attn_mask" in found.grads) == ("float" in mask)


@pytest.mark.parametrize("call", [{"need_weights": False}, {"average_attn_weights": False}])
@pytest.mark.parametrize("name", ["plain", "bias_kv and zero_attn"])
def test_what_is_returned(worker: Worker, name: str, call: dict[str, Any]) -> None:
    spec = spec_of(name)
    found = check(worker, spec, grads=True, **call, **masks_of("padding float"))
    expected = None if "need_weights" in call else (N, 4, L, S + spec.extra_columns)
    assert (None if found.attn_weights is None else found.attn_weights.shape) == expected


@pytest.mark.parametrize("name", ["plain", "batch first", "bias_kv"])
@pytest.mark.parametrize("average", [True, False])
def test_unbatched(worker: Worker, name: str, average: bool) -> None:
    spec = spec_of(name)
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((length, 16)).astype(np.float32) for length in (L, S, S)]
    masks = {"key_padding_mask": np.arange(S) > 4, "attn_mask": rng.standard_normal((4, L, S)).astype(np.float32)}
    check(worker, spec, inputs, average_attn_weights=average, **masks)


@pytest.mark.parametrize("sizes", [(0, L, S), (N, 0, S), (N, L, 0)])
def test_empty(worker: Worker, sizes: tuple[int, int, int]) -> None:
    n, length, source = sizes
    inputs = [np.ones((n, size, 16), np.float32) for size in (length, source, source)]
    check(worker, spec_of("batch first"), inputs, key_padding_mask=np.zeros((n, source), bool))


@pytest.mark.parametrize("name", ["batch first", "bias_kv"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(0, L, S), (N, 0, S)])
def test_gradients_of_nothing_are_zero(worker: Worker, sizes: tuple[int, int, int], masked: bool, name: str) -> None:
    n, length, source = sizes
    spec = spec_of(name, batch_first=True)
    inputs = [np.ones((n, size, 16), np.float32) for size in (length, source, source)]
    call = {"key_padding_mask": np.zeros((n, source), bool), "is_causal": True} if masked else {}
    seeds = [np.ones((n, length, 16), np.float32), np.ones((n, length, source + spec.extra_columns), np.float32)]
    found = Result.from_tree(ask(worker, "attend", spec, material(spec)[0], inputs, call=call, seeds=seeds))
    assert found.output.shape == seeds[0].shape
    assert found.attn_weights is not None
    assert found.attn_weights.shape == seeds[1].shape
    assert set(found.grads) == {"query", "key", "value", *spec.parameter_shapes()}
    assert all(not grad.any() for grad in found.grads.values())
    check(worker, spec)  # later calls still answer


@pytest.mark.parametrize("policy", ["nan", "zero"])
@pytest.mark.parametrize("name", ["plain", "bias_kv"])
def test_fully_masked_rows(worker: Worker, name: str, policy: str) -> None:
    mask = np.zeros((N * 4, L, S), bool)
    mask[1, 2] = mask[4, 0] = True
    found = check(worker, spec_of(name), grads=policy == "zero", attn_mask=mask, fully_masked=policy)
    assert np.isnan(found.output).any() == (policy == "nan" and name == "plain")


def test_policy_error(worker: Worker) -> None:
    spec = spec_of("plain")
    call = {"attn_mask": np.arange(L)[:, None] == np.full(S, 3), "fully_masked": "error"}
    with pytest.raises(ArgumentError, match="batch 0, head 0, row 3"):
        ask(worker, "attend", spec, *material(spec), call=call)


@pytest.mark.parametrize("direct", [True, False], ids=["drop-in", "native module"])
def test_large_and_low_scores(worker: Worker, direct: bool) -> None:
    """MegEngine's softmax is NaN for rows whose scores all lie below about -88."""
    spec = spec_of("batch first")
    inputs = [array * np.float32(50) for array in material(spec)[1]]
    low = np.full((L, S), -200, np.float32)
    found = (check if direct else check_native)(worker, spec, inputs, attn_mask=low)
    assert np.isfinite(found.output).all()


@pytest.mark.parametrize("mask", ["none", "causal and padding", "attn float"])
@pytest.mark.parametrize("name", ["plain", "kdim and vdim", "bias_kv"])
def test_half_precision(worker: Worker, name: str, mask: str) -> None:
    found = check(worker, spec_of(name, dtype="float16"), **masks_of(mask))
    assert found.output.dtype == np.float16


@pytest.mark.parametrize("mask", RACED)
def test_many_calls_in_the_queue_give_one_answer(worker: Worker, mask: str) -> None:
    spec = spec_of("plain")
    weights, inputs = material(spec)
    found = ask(worker, "repeat", spec, weights, inputs, call=masks_of(mask), times=200)
    assert len(found) == 1
    assert not off(spec, weights, inputs, Result(*found[0]), **masks_of(mask))


def test_a_wrong_answer_is_seen(worker: Worker) -> None:
    spec = spec_of("plain")
    weights, inputs = material(spec)
    call = masks_of("attn float")
    seeds = seeds_of(spec, call)
    found = Result.from_tree(ask(worker, "attend", spec, weights, inputs, call=call, seeds=seeds))
    other = {"attn_mask": call["attn_mask"] * np.float32(1.001)}
    assert len(off(spec, weights, inputs, found, seeds, **other)) >= 2


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_dropout_in_training_only(worker: Worker, rate: float) -> None:
    spec = MHASpec(8, 2, dropout=rate)
    weights = MHAWeights.random(spec)
    x = np.random.default_rng(0).standard_normal((30, 4, 8)).astype(np.float32)
    call = {"average_attn_weights": False}
    still = ask(worker, "attend", spec, weights, [x] * 3, call=call)["attn_weights"]
    drawn = ask(worker, "attend", spec, weights, [x] * 3, call=call, training=True)["attn_weights"]
    assert (still > 0).all()
    assert abs(float((drawn == 0).mean()) - rate) < 0.05  # 7200 draws: a standard deviation of 0.006
    kept = drawn != 0
    np.testing.assert_allclose(drawn[kept], (still / max(1 - rate, 1e-9))[kept], rtol=1e-5)


# -- a module of MegEngine's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [{}, {"bias": False, "batch_first": True}, {"kdim": 6}, {"add_bias_kv": True}])
def test_a_fresh_layer(worker: Worker, layer: dict[str, Any]) -> None:
    layer = {"embed_dim": 8, "num_heads": 2, **layer}
    found = worker.call("dropin:fresh", {"seed": 7, "layer": layer})
    spec, weights = MHASpec.from_dict(found["spec"]), MHAWeights.from_tree(found["weights"])
    assert spec == MHASpec(**layer)
    manual_seed(7)
    assert weights == initial_values(spec)
    assert found["training"]
    assert found["is a module"]
    size = sum(array.size for name, array in weights.arrays().items() if name not in ("bias_k", "bias_v"))
    extra = {"bias_k": (1, 1, 8), "bias_v": (1, 1, 8)} if spec.add_bias_kv else {}
    assert found["shapes"] == {"io_weight_bias": (1, size), **extra}
    assert found["repr"].startswith("MultiheadAttention(embed_dim=8, num_heads=2, dropout=0.0")
    assert found["repr"] in found["repr inside"]


def test_the_same_initial_values_as_torch(worker: Worker) -> None:
    pytest.importorskip("torch")
    from mhabridge.adapters.torch import MultiheadAttention

    from mhabridge import extract

    layer = {"embed_dim": 8, "num_heads": 2, "vdim": 6, "add_bias_kv": True}
    found = worker.call("dropin:fresh", {"seed": 11, "layer": layer})
    manual_seed(11)
    assert MHAWeights.from_tree(found["weights"]) == extract(MultiheadAttention(**layer))[1]


@pytest.mark.parametrize("bias_kv", [False, True])
def test_copies_are_equal_and_independent(worker: Worker, bias_kv: bool) -> None:
    spec = MHASpec(8, 2, add_bias_kv=bias_kv)
    found = ask(worker, "copies", spec, MHAWeights.random(spec), [])
    assert found["equal"] == found["kept"] == dict.fromkeys(("deepcopy", "module", "state"), True)
    assert found["training"] == [False, False]


@pytest.mark.parametrize("name", ["batch first", "only vdim"])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_go_both_ways(worker: Worker, name: str, bias: bool) -> None:
    spec = spec_of(name, bias=bias)
    weights, inputs = material(spec)
    found = ask(worker, "exchange", spec, weights, inputs)
    assert found["back"]
    for answers in (found["drop-in"], found["native"]):
        assert not off(spec, weights, inputs, Result(*answers))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal and padding", "padding float and attn bool"])
@pytest.mark.parametrize("name", ["plain", "bias_kv and zero_attn"])
def test_traced(worker: Worker, name: str, mask: str, symbolic: bool) -> None:
    spec = spec_of(name)
    weights, inputs = material(spec)
    runs = ask(worker, "traced", spec, weights, inputs, call=masks_of(mask), symbolic=symbolic)
    assert len(runs) == 3
    for answers in runs:
        assert not off(spec, weights, inputs, Result(*answers), **masks_of(mask))


def test_training_inside_a_model_traced_or_not(worker: Worker) -> None:
    batches = list(np.random.default_rng(2).standard_normal((20, 4, 3, 8)).astype(np.float32))
    losses = [worker.call("dropin:train", {"batches": batches, "symbolic": how}) for how in (None, False, True)]
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)


# -- mb.attend on native modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_native_modules_are_composed(worker: Worker, mask: str) -> None:
    call = masks_of(mask)
    # A half precision mask's gradient is of half precision, more coarsely rounded than the reference's bound allows.
    half = "attn_mask" in call and call["attn_mask"].dtype == np.float16
    found = check_native(worker, spec_of("batch first"), grads=not half, **call)
    assert [note.partition(":")[0] for note in found.notes] == ["composed"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding bool", "attn half", "attn per head float", "all three"])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_the_operator_where_it_is_asked_for(worker: Worker, mask: str, call: dict[str, Any], training: bool) -> None:
    spec = spec_of("only vdim")
    weights, inputs = material(spec)
    call = {**call, **masks_of(mask)}
    how = {"native": True, "training": training}
    found = Result.from_tree(ask(worker, "attend", spec, weights, inputs, call={**call, "mode": "native"}, **how))
    assert found.notes[0].startswith("native")
    assert not off(spec, weights, inputs, found, **call)


def test_the_operator_unbatched_and_its_gradients_in_evaluation(worker: Worker) -> None:
    spec = spec_of("batch first")
    weights, arrays = material(spec)
    one = [np.ascontiguousarray(array[0]) for array in arrays]
    seeds = [np.ones((L, 16), np.float32), None]
    call = {"mode": "native", "is_causal": True}
    found = Result.from_tree(ask(worker, "attend", spec, weights, one, call=call, native=True, seeds=seeds))
    assert not off(spec, weights, one, found, seeds, is_causal=True)


def _outside() -> dict[str, dict[str, Any]]:
    dead = np.zeros((L, S), bool)
    dead[1] = True
    return {
        "scores": {"attn_mask": np.full((L, S), -200, np.float32)},
        "fully_masked_zero": {"attn_mask": dead, "fully_masked": "zero"},
    }


@pytest.mark.parametrize("reason", list(_outside()))
def test_the_operator_is_refused_where_it_is_wrong(worker: Worker, reason: str) -> None:
    spec = spec_of("batch first")
    with pytest.raises(UnsupportedError, match=reason):
        ask(worker, "attend", spec, *material(spec), native=True, call={"mode": "native", **_outside()[reason]})


def test_a_drop_in_has_no_native_form(worker: Worker) -> None:
    spec = spec_of("plain")
    with pytest.raises(UnsupportedError, match="always composed"):
        ask(worker, "attend", spec, *material(spec), call={"mode": "native"})


# -- mb.build and mb.convert ------------------------------------------------------------------------------------------

BATCH_FIRST = {"batch_first": True}
# Which form "auto" builds: the native module has no other axis order, no added columns, no scale and no residual.
FORMS: list[tuple[str, dict[str, Any], str]] = [
    ("native", BATCH_FIRST, ""),
    ("native", {**BATCH_FIRST, "kdim": 6, "dropout": 0.25, "out_dropout": 0.5, "bias": False}, ""),
    ("native", {**BATCH_FIRST, "dtype": "float16"}, ""),
    ("composed", {}, "batch_first"),
    ("composed", {"out_dropout": 0.5}, "batch_first"),
    ("composed", {**BATCH_FIRST, "add_bias_kv": True, "vdim": 10}, "add_bias_kv"),
    ("composed", {**BATCH_FIRST, "add_zero_attn": True}, "add_zero_attn"),
    ("composed", {**BATCH_FIRST, "scale": 0.3}, "scale"),
    ("composed", {"scale": -2.0, "residual": True, "kdim": 6, "bias": False, "add_bias_kv": True}, "scale"),
    ("composed", {"dtype": "float16", "residual": True}, "residual"),
]


def build(worker: Worker, spec: MHASpec, weights: MHAWeights, mode: str, training: bool = False) -> dict[str, Any]:
    """The description of what was built and of what that converts to, as ``worker_megengine.built`` gives them."""
    inputs = material(spec)[1]
    found = ask(worker, "built", spec, weights, inputs, call={"is_causal": True}, mode=mode, training=training)
    for layer in (found["built"], found["moved"]):
        layer.update(spec=MHASpec.from_dict(layer["spec"]), weights=MHAWeights.from_tree(layer["weights"]))
    if not training:
        assert not off(spec, weights, inputs, Result(*found["answer"]), is_causal=True)
    return dict(found)


@pytest.mark.parametrize("mode", ["auto", "composed"])
@pytest.mark.parametrize(("form", "kind", "reason"), FORMS)
def test_build_and_convert(worker: Worker, form: str, kind: dict[str, Any], reason: str, mode: str) -> None:
    spec = MHASpec(16, 4, **kind)
    weights = MHAWeights.random(spec)
    found = build(worker, spec, weights, mode, training=mode == "auto")
    if mode == "composed":
        assert found["built"]["notes"] == ["composed: the drop-in: asked for"]
        assert found["built"]["drop-in"]
    for layer in (found["moved"], *([found["built"]] if mode == "auto" else [])):
        assert layer["drop-in"] == (form == "composed")
        (note,) = layer["notes"]
        assert note.startswith(f"composed: the drop-in: {reason} is" if reason else "native: ")
    for layer in (found["built"], found["moved"]):
        assert (layer["spec"], layer["weights"]) == (spec, weights)
        assert layer["training"] == (mode == "auto")


@pytest.mark.parametrize("batch_first", [True, False])
def test_stand_in_biases_are_zero_and_said(worker: Worker, batch_first: bool) -> None:
    spec = MHASpec(16, 4, k_bias=False, batch_first=batch_first)
    weights = MHAWeights.random(spec)
    layer = build(worker, spec, weights, "auto")["built"]
    assert layer["drop-in"] != batch_first
    assert layer["spec"] == spec.replace(k_bias=True)
    assert "k_bias as zeros" in layer["notes"][1]
    assert not layer["weights"].k_bias.any()
    for name, array in weights.arrays().items():
        np.testing.assert_array_equal(layer["weights"].arrays()[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "kind", "subject"),
    [
        ("native", {}, "batch_first"),
        ("native", {**BATCH_FIRST, "residual": True}, "residual"),
        ("auto", {"out_proj_size": 8}, "out_proj_size"),
        ("composed", {"q_proj_size": 8, "k_proj_size": 8}, "q_proj_size, k_proj_size"),
        ("auto", {"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_what_is_not_built(worker: Worker, mode: str, kind: dict[str, Any], subject: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        worker.call("dropin:refuse_to_build", {"spec": MHASpec(16, 4, **kind).to_dict(), "mode": mode})
    assert caught.value.subject == subject


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "error", "subject"),
    [
        ({"num_heads": 3}, ArgumentError, "embed_dim"),
        ({"dropout": 1.5}, ArgumentError, "dropout"),
        ({"dtype": "float64"}, UnsupportedError, "dtype"),
        ({"dtype": "bfloat16"}, UnsupportedError, "dtype"),
        ({"dtype": "int32"}, ArgumentError, "dtype"),
        ({"device": "nonsense"}, ArgumentError, "device"),
    ],
)
def test_refused_layers(worker: Worker, layer: dict[str, Any], error: type[Exception], subject: str) -> None:
    with pytest.raises(error) as caught:
        worker.call("dropin:refuse", {"layer": {"embed_dim": 8, "num_heads": 2, **layer}})
    assert caught.value.subject == subject  # type: ignore[attr-defined]


def _wrong() -> dict[str, tuple[type[Exception], str, dict[str, Any]]]:
    query, key, value = material(spec_of("plain"))[1]
    return {
        "query of integers": (ArgumentTypeError, "query", {"inputs": [query.astype(np.int32), key, value]}),
        "query of half precision": (ArgumentError, "query", {"inputs": [query.astype(np.float16), key, value]}),
        "query of other features": (ArgumentError, "query", {"inputs": [query[..., :8], key, value]}),
        "query of four axes": (ArgumentError, "query", {"inputs": [query[None], key, value]}),
        "key of another batch": (ArgumentError, "key", {"inputs": [query, key[:, :1], value[:, :1]]}),
        "value of another length": (ArgumentError, "value", {"inputs": [query, key, value[:2]]}),
        "NumPy query": (ArgumentTypeError, "query", {"arrays": ["query"]}),
        "NumPy mask": (ArgumentTypeError, "attn_mask", {"arrays": ["attn_mask"], "call": masks_of("attn bool")}),
        "mask of two rows": (ArgumentError, "attn_mask", {"call": {"attn_mask": np.zeros((2, S), bool)}}),
        "padding without a batch": (
            ArgumentError,
            "key_padding_mask",
            {"call": {"key_padding_mask": np.zeros(S, bool)}},
        ),
        "mask of sevens": (ArgumentError, "attn_mask", {"call": {"attn_mask": np.full((L, S), 7, np.int32)}}),
        "flag that is none": (ArgumentTypeError, "is_causal", {"call": {"is_causal": 1}}),
        "policy unknown": (ArgumentError, "fully_masked", {"call": {"fully_masked": "maybe"}}),
    }


@pytest.mark.parametrize("what", list(_wrong()))
def test_refused_calls(worker: Worker, what: str) -> None:
    error, subject, more = _wrong()[what]
    spec = spec_of("plain")
    weights, inputs = material(spec)
    with pytest.raises(error) as caught:
        ask(worker, "refuse", spec, weights, **{"inputs": inputs, **more})
    assert caught.value.subject == subject  # type: ignore[attr-defined]
