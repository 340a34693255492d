"""Every backend answers the same calls in each mode, and each answer is judged against the float64 reference.

What a native layer may refuse is listed in tests/refusals.toml; an unlisted refusal fails, and so does an answer to a
listed call. ``auto`` and ``composed`` answer everything but the dtypes that the framework itself does not have.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, UnsupportedError, backend, mapping
from mhabridge.backends.registry import Backend
from mhabridge.calls import Result
from mhabridge.diff.inputs import random_inputs
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import ArgumentError, ArgumentTypeError, WeightsError
from tests.cases import MASKS, SPECS, L, N, S, masks_of, material, output_shape, reference_answer, spec_of

pytestmark = pytest.mark.frameworks


@functools.lru_cache(maxsize=1)
def refusals() -> dict[str, dict[str, list[str]]]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib; tests/refusals.toml is not read")
    found: dict[str, dict[str, list[str]]] = tomllib.loads(
        pathlib.Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8")
    )
    return found


MODES = ("auto", "native", "composed")


def refused(name: str, mode: str, kind: str, what: str) -> bool:
    """Whether a backend is to refuse a layer or call that has this spec, feature or dtype."""
    lists = refusals()[name]
    if kind == "dtypes" and what in lists["missing_dtypes"]:
        return True
    return mode == "native" and what in lists[kind]


def answer(name: str, spec: MHASpec, weights: MHAWeights, arrays: Any, **call: Any) -> Result:
    result: Result = backend(name).run(spec, weights, *arrays, timeout=100, **call)
    return result


def check(name: str, spec: MHASpec, refuse: bool = False, seed: int = 0, **call: Any) -> Result | None:
    """Run a call on a backend and judge every tensor of its answer; or see it refused."""
    weights, arrays = material(spec, seed)
    return check_on(name, spec, weights, arrays, refuse, **call)


def check_on(
    name: str, spec: MHASpec, weights: MHAWeights, arrays: Any, refuse: bool = False, **call: Any
) -> Result | None:
    if refuse:
        with pytest.raises(UnsupportedError) as error:
            answer(name, spec, weights, arrays, **call)
        assert error.value.advice
        return None
    result = answer(name, spec, weights, arrays, **call)
    prepared, exact = reference_answer(spec, weights, arrays, **call)
    limits = bounds(prepared, weights, named(exact), accuracy(framework_of(name), spec.dtype))
    found = named(result)
    assert set(found) == set(named(exact))
    for tensor, array in named(exact).items():
        distance = judge(found[tensor], array, limits[tensor])
        assert distance.ok, f"{name} {tensor}: {distance}"
    return result


def framework_of(name: str) -> str:
    return name.partition("@")[0]


# -- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", list(SPECS))
def test_forward(backend_name: str, name: str, mask: str) -> None:
    """In mode "auto": native where the native layer can, composed where it cannot."""
    spec = spec_of(name)
    result = check(backend_name, spec, **masks_of(mask, spec.num_heads))
    assert result is not None
    if backend_name != "numpy":
        native = not refused(backend_name, "native", "specs", name)
        assert result.notes[0].startswith("native" if native else "composed"), result.notes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["none", "causal and padding", "padding bool and attn float", "attn per head float"])
@pytest.mark.parametrize("name", list(SPECS))
def test_modes(backend_name: str, name: str, mask: str, mode: str) -> None:
    spec = spec_of(name)
    refuse = refused(backend_name, mode, "specs", name)
    result = check(backend_name, spec, refuse, mode=mode, **masks_of(mask, spec.num_heads))
    if result is not None and backend_name != "numpy" and mode != "auto":
        assert result.notes[0].startswith(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["none", "causal and padding", "attn per head float"])
@pytest.mark.parametrize("name", list(SPECS))
def test_weights_of_each_head(backend_name: str, name: str, mask: str, mode: str) -> None:
    spec = spec_of(name)
    refuse = refused(backend_name, mode, "specs", name) or refused(backend_name, mode, "features", "per_head_weights")
    result = check(backend_name, spec, refuse, mode=mode, average_attn_weights=False, **masks_of(mask, spec.num_heads))
    if result is not None:
        assert result.attn_weights is not None
        assert result.attn_weights.shape == (N, spec.num_heads, L, S + spec.extra_columns)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["none", "padding bool", "attn per head float"])
@pytest.mark.parametrize("name", ["plain", "batch first", "kdim and vdim", "no bias"])
def test_without_weights(backend_name: str, name: str, mask: str, mode: str) -> None:
    result = check(backend_name, spec_of(name), need_weights=False, mode=mode, **masks_of(mask))
    assert result is not None
    assert result.attn_weights is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("mask", ["none", "causal and padding", "attn float", "attn double"])
@pytest.mark.parametrize("name", ["plain", "kdim and vdim", "no key bias"])
def test_dtypes(backend_name: str, name: str, mask: str, dtype: str, mode: str) -> None:
    spec = spec_of(name, dtype=dtype)
    result = check(backend_name, spec, refused(backend_name, mode, "dtypes", dtype), mode=mode, **masks_of(mask))
    if result is not None and backend_name != "numpy":
        assert result.output.dtype.name == dtype


@pytest.mark.parametrize("mask", [None, "key_padding_mask", "attn_mask"])
def test_unbatched(backend_name: str, mask: str | None) -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    rng = np.random.default_rng(0)
    masks = {"key_padding_mask": np.arange(S) > 4, "attn_mask": rng.standard_normal((4, L, S)).astype(np.float32)}
    call = {} if mask is None else {mask: masks[mask]}
    one = tuple(np.ascontiguousarray(array[:, 0]) for array in arrays)
    result = check_on(backend_name, spec, weights, one, **call)
    assert result is not None
    assert result.attn_weights is not None
    assert (result.output.shape, result.attn_weights.shape) == ((L, 16), (L, S))


def test_non_contiguous_and_read_only_inputs(backend_name: str) -> None:
    spec = spec_of("plain", batch_first=True)
    weights, arrays = material(spec)
    odd = tuple(np.asfortranarray(array)[::-1] for array in arrays)
    for array in odd:
        array.flags.writeable = False
    before = [array.copy() for array in odd]
    check_on(backend_name, spec, weights, odd, attn_mask=np.asfortranarray(masks_of("attn bool")["attn_mask"]))
    for array, copy in zip(odd, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("empty", ["N", "L", "S"])
def test_empty(backend_name: str, empty: str, mode: str) -> None:
    spec = spec_of("plain", batch_first=True)
    n, target, source = (0 if empty == letter else size for letter, size in (("N", 2), ("L", 5), ("S", 7)))
    arrays = tuple(np.zeros((n, length, 16), np.float32) for length in (target, source, source))
    refuse = refused(backend_name, mode, "features", "empty")
    refuse |= empty == "S" and refused(backend_name, mode, "features", "empty_source")
    refuse |= empty == "L" and refused(backend_name, mode, "features", "empty_target")
    masks = {"key_padding_mask": np.zeros((n, source), bool), "is_causal": True}
    for call in ({}, masks, {"grad_output": np.ones((n, target, 16), np.float32), **masks}):
        check_on(backend_name, spec, MHAWeights.random(spec), arrays, refuse, mode=mode, **call)


def test_arrays_in_the_other_byte_order(backend_name: str) -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    call = {**masks_of("attn float"), "grad_output": np.ones((L, N, 16), np.float32)}
    expected = answer(backend_name, spec, weights, arrays, **call)
    swapped = [array.astype(array.dtype.newbyteorder("S")) for array in arrays]
    call = {name: item.astype(item.dtype.newbyteorder("S")) for name, item in call.items()}
    found = answer(backend_name, spec, weights, swapped, **call)
    for name, array in named(expected).items():
        np.testing.assert_array_equal(named(found)[name], array)


def test_the_same_call_twice_gives_the_same_bits(backend_name: str) -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    call = masks_of("all three")
    first, second = (answer(backend_name, spec, weights, arrays, **call) for _ in range(2))
    np.testing.assert_array_equal(first.output, second.output)


def test_alternating_self_and_cross_attention(backend_name: str) -> None:
    """MindSpore's cell remembers whether query, key and value were one tensor."""
    spec = spec_of("plain")
    weights, (query, key, value) = material(spec)
    for arrays in [(query, query, query), (query, key, value), (query, key, key), (query, query, query)]:
        check_on(backend_name, spec, weights, arrays)


# -- fully masked rows, large scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["nan", "zero"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("which", ["a row", "one head of a row", "a whole batch by padding"])
def test_fully_masked_rows(backend_name: str, which: str, need_weights: bool, policy: str, mode: str) -> None:
    call: dict[str, Any] = {"attn_mask": np.zeros((N * 4, L, S), bool)}
    call["attn_mask"][1, 2] = True
    if which == "a row":
        call["attn_mask"][:, 2] = True
    if which == "a whole batch by padding":
        call = {"key_padding_mask": np.array([[True] * S, [False] * S])}
    refuse = refused(backend_name, mode, "features", f"fully_masked_{policy}")
    options = {"fully_masked": policy, "need_weights": need_weights, "mode": mode}
    result = check(backend_name, spec_of("plain"), refuse, **options, **call)
    if result is not None:
        assert np.isnan(result.output).any() == (policy == "nan")


def test_fully_masked_rows_are_open_with_extra_columns(backend_name: str) -> None:
    for name in ("bias_kv", "zero_attn"):
        mask = np.ones((L, S), bool)
        for mode in MODES:
            refuse = refused(backend_name, mode, "specs", name)
            check(backend_name, spec_of(name), refuse, mode=mode, attn_mask=mask)


def test_the_whole_row_is_nan_without_an_output_projection(backend_name: str) -> None:
    mask = np.zeros((N * 4, L, S), bool)
    mask[1, 2] = True  # one head
    result = check(backend_name, spec_of("no output projection"), attn_mask=mask)
    assert result is not None
    assert int(np.isnan(result.output).sum()) == 16


def test_fully_masked_rows_by_policy_error_never_reach_a_backend(backend_name: str) -> None:
    mask = np.zeros((L, S), bool)
    mask[1] = True
    with pytest.raises(ArgumentError, match="batch 0, head 0, row 1"):
        check(backend_name, spec_of("plain"), attn_mask=mask, fully_masked="error")


@pytest.mark.parametrize("mode", ["auto", "composed"])
@pytest.mark.parametrize("factor", [30.0, 300.0])
def test_large_scores_are_right(backend_name: str, factor: float, mode: str) -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    large = tuple(array * np.float32(factor) for array in arrays)
    check_on(backend_name, spec, weights, large, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_soft_mask_over_a_whole_row_is_right_or_refused(backend_name: str, mode: str) -> None:
    mask = np.zeros((L, S), np.float32)
    mask[2] = -1e9
    refuse = framework_of(backend_name) == "megengine" and mode == "native"
    check(backend_name, spec_of("plain"), refuse, mode=mode, attn_mask=mask)


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["none", "causal and padding", "attn float", "padding float and attn bool"])
@pytest.mark.parametrize("name", list(SPECS))
def test_gradients(backend_name: str, name: str, mask: str, mode: str) -> None:
    spec = spec_of(name)
    grad = np.random.default_rng(4).standard_normal(output_shape(spec)).astype(np.float32)
    refuse = refused(backend_name, mode, "specs", name)
    refuse |= "float" in mask and refused(backend_name, mode, "features", "mask_gradient")
    check(backend_name, spec, refuse, mode=mode, grad_output=grad, **masks_of(mask, spec.num_heads))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["plain", "batch first", "kdim and vdim"])
def test_gradients_through_the_weights(backend_name: str, name: str, average: bool, mode: str) -> None:
    spec = spec_of(name)
    rng = np.random.default_rng(4)
    grad = rng.standard_normal((N, L, S) if average else (N, 4, L, S)).astype(np.float32)
    refuse = refused(backend_name, mode, "features", "attn_weights_gradient")
    refuse |= not average and refused(backend_name, mode, "features", "per_head_weights")
    options = {"grad_attn_weights": grad, "average_attn_weights": average, "mode": mode}
    both = {"grad_output": rng.standard_normal(output_shape(spec)).astype(np.float32)}
    for more in ({}, both):
        check(backend_name, spec, refuse, **options, **more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["nan", "zero"])
def test_gradients_of_fully_masked_rows(backend_name: str, policy: str, mode: str) -> None:
    mask = np.zeros((L, S), bool)
    mask[1] = True
    grad = np.ones((L, N, 16), np.float32)
    refuse = any(refused(backend_name, mode, "features", f"fully_masked_{which}") for which in ("gradient", policy))
    check(backend_name, spec_of("plain"), refuse, mode=mode, fully_masked=policy, attn_mask=mask, grad_output=grad)


def test_gradients_in_any_order_of_shapes(backend_name: str) -> None:
    """MindSpore 2.10's gradients go wrong for good when the first one has a single source position."""
    for embed, batch, target, source in [(8, 2, 2, 1), (16, 2, 5, 7), (8, 1, 1, 2), (8, 1, 1, 1), (16, 3, 4, 6)]:
        spec = MHASpec(embed, 2)
        weights = MHAWeights.random(spec)
        arrays = tuple(random_inputs(spec, batch=batch, target=target, source=source).values())
        grad = np.random.default_rng(0).standard_normal((target, batch, embed)).astype(np.float32)
        for mode in MODES:
            refuse = (batch, target) == (1, 1) and refused(backend_name, mode, "features", "gradient_of_one_row")
            check_on(backend_name, spec, weights, arrays, refuse, mode=mode, grad_output=grad)


# -- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_dropout_only_in_training(backend_name: str, mode: str) -> None:
    spec = spec_of("plain", dropout=0.5)
    result = check(backend_name, spec, mode=mode)
    assert result is not None
    weights, arrays = material(spec)
    trained = answer(backend_name, spec, weights, arrays, training=True, mode=mode)
    assert trained.attn_weights is not None
    assert result.attn_weights is not None
    assert not np.allclose(trained.attn_weights, result.attn_weights)
    gone = trained.attn_weights == 0.0  # the average over four heads: each gone with probability 1/16
    assert gone.mean() < 0.5


@pytest.mark.parametrize("mode", ["auto", "composed"])
def test_dropout_of_one_leaves_the_bias(backend_name: str, mode: str) -> None:
    spec = spec_of("plain", dropout=1.0)
    weights, arrays = material(spec)
    trained = answer(backend_name, spec, weights, arrays, training=True, mode=mode)
    np.testing.assert_array_equal(trained.output, np.broadcast_to(weights.out_bias, trained.output.shape))


# The native classes that know one axis order only.
ONE_ORDER = {"megengine": True, "torch@1.8.1": False}


def test_building_never_turns_the_axes(framework: str) -> None:
    """A layer with the other axis order would take the user's inputs and answer wrongly; only ``run`` can transpose."""
    if framework not in ONE_ORDER:
        return
    spec = spec_of("plain", batch_first=not ONE_ORDER[framework])
    payload = {"spec": spec.to_dict(), "weights": material(spec)[0].to_tree()}
    with pytest.raises(UnsupportedError, match="batch_first"):
        backend(framework).call("rebuild", payload)
    check(framework, spec)


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", list(SPECS))
def test_build_then_extract_is_bit_exact(framework: str, name: str, dtype: str) -> None:
    spec = spec_of(name, dtype=dtype)
    if framework in ONE_ORDER:
        spec = spec.replace(batch_first=ONE_ORDER[framework])
    weights, _ = material(spec)
    payload = {"spec": spec.to_dict(), "weights": weights.to_tree()}
    functional_only = framework == "megengine" and "projection" in name
    holds = {"bfloat16": framework_of(framework) != "megengine", "float64": framework_of(framework) != "megengine"}
    no_such_dtype = not holds.get(dtype, True) or (framework == "mindspore@2.0.0" and dtype != "float32")
    if refused(framework, "native", "specs", name) or functional_only or no_such_dtype:
        with pytest.raises(UnsupportedError):
            backend(framework).call("rebuild", payload)
        return
    found = backend(framework).call("rebuild", payload)
    again, back = MHASpec.from_dict(found["spec"]), MHAWeights.from_tree(found["weights"])
    assert again.replace(bias=spec.bias or True) == spec.replace(bias=spec.bias or True)
    for parameter, array in weights.arrays().items():
        assert getattr(back, parameter).tobytes() == array.tobytes(), parameter
    for parameter in set(back.arrays()) - set(weights.arrays()):
        assert not np.any(back.arrays()[parameter]), f"{parameter}: a stand-in must be zero"


# -- refusals before any framework is called ---------------------------------------------------------------------------


class NoArray:
    """Another framework's tensor, as NumPy sees it: it can be made an array."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros((L, S), bool)


def bad_calls() -> dict[str, tuple[type[Exception], str, Any]]:
    def changed(**change: Any) -> Any:
        return lambda arrays, call: ({**arrays, **{k: v(arrays) for k, v in change.items()}}, call)

    def called(**change: Any) -> Any:
        return lambda arrays, call: (arrays, {**call, **change})

    return {
        "wrong embed_dim": (ArgumentError, "query", changed(query=lambda a: a["query"][..., :8])),
        "integer query": (ArgumentTypeError, "query", changed(query=lambda a: a["query"].astype(int))),
        "a list": (ArgumentTypeError, "query", changed(query=lambda a: a["query"].tolist())),
        "a masked array": (ArgumentTypeError, "query", changed(query=lambda a: np.ma.masked_array(a["query"], False))),
        "another dtype": (ArgumentError, "key", changed(key=lambda a: a["key"].astype("float16"))),
        "key and value lengths differ": (ArgumentError, "value", changed(value=lambda a: a["value"][:-1])),
        "batch mismatch": (
            ArgumentError,
            "key",
            changed(key=lambda a: a["key"][:, :1], value=lambda a: a["value"][:, :1]),
        ),
        "four axes": (ArgumentError, "query", changed(query=lambda a: a["query"][None])),
        "unbatched key": (ArgumentError, "key", changed(key=lambda a: a["key"][:, 0])),
        "mask that broadcasts": (ArgumentError, "attn_mask", called(attn_mask=np.zeros((1, S), bool))),
        "mask of wide integers": (ArgumentError, "attn_mask", called(attn_mask=np.full((L, S), 2))),
        "mask with NaN": (ArgumentError, "attn_mask", called(attn_mask=np.full((L, S), np.nan))),
        "mask of another kind": (ArgumentTypeError, "attn_mask", called(attn_mask=NoArray())),
        "mask that is masked": (ArgumentTypeError, "attn_mask", called(attn_mask=np.ma.zeros((L, S)))),
        "mask of strings": (ArgumentTypeError, "attn_mask", called(attn_mask=np.full((L, S), "a"))),
        "need_weights of 1": (ArgumentTypeError, "need_weights", called(need_weights=1)),
        "an unknown mode": (ArgumentError, "mode", called(mode="fast")),
        "an unknown policy": (ArgumentError, "fully_masked", called(fully_masked="drop")),
        "a gradient of the wrong shape": (ArgumentError, "grad_output", called(grad_output=np.zeros((N, L, 16)))),
        "a gradient of weights not asked for": (
            ArgumentError,
            "grad_attn_weights",
            called(grad_attn_weights=np.zeros((N, L, S)), need_weights=False),
        ),
    }


@pytest.mark.parametrize("what", list(bad_calls()))
def test_the_same_error_on_every_backend(backend_name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, subject, change = bad_calls()[what]
    if what == "another dtype" and backend_name == "numpy":
        return  # the float64 reference takes any of the four dtypes on purpose
    spec = spec_of("plain")
    weights, arrays = material(spec)
    inputs, call = change(dict(zip(("query", "key", "value"), arrays, strict=True)), {})
    monkeypatch.setattr(Backend, "call", lambda *args, **kwargs: pytest.fail("the backend was called"))
    with pytest.raises(error) as found:
        answer(backend_name, spec, weights, tuple(inputs.values()), **call)
    assert found.value.subject == subject  # type: ignore[attr-defined]
    assert found.value.given  # type: ignore[attr-defined]
    assert found.value.expected  # type: ignore[attr-defined]


def test_weights_of_another_layer_are_refused(backend_name: str) -> None:
    spec = spec_of("plain")
    _, arrays = material(spec)
    with pytest.raises(WeightsError, match="k_weight"):
        answer(backend_name, spec, MHAWeights.random(spec.replace(kdim=6)), arrays)


def test_every_refusal_listed_is_a_feature_or_spec_that_exists() -> None:
    from mhabridge.envelope import FEATURES

    for name, lists in refusals().items():
        assert framework_of(name) in (*mapping.FRAMEWORKS, mapping.REFERENCE)
        assert set(lists["specs"]) <= set(SPECS)
        assert set(lists["features"]) <= set(FEATURES)
        assert set(lists["missing_dtypes"]) <= set(lists["dtypes"])
