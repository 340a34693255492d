"""The comparator on wrong data: what must not pass, and the rounding that must."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, dtypes, reference
from mhabridge.backends.running import prepare, restore
from mhabridge.diff import rounding
from mhabridge.diff.inputs import random_inputs, random_masks
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import Accuracy, Bound, accuracy, bounds, named, noisy
from tests.cases import MASKS, SPECS, masks_of, material, reference_answer, spec_of

EXACT = np.arange(1.0, 13.0).reshape(3, 4)
BOUND = Bound(np.full((3, 1), 1e-5), 1e-5)


def test_equal_and_rounding() -> None:
    assert judge(EXACT.astype(np.float32), EXACT, BOUND).verdict == "equal"
    near = np.nextafter(EXACT.astype(np.float32), np.float32(0))
    assert judge(near, EXACT, BOUND).verdict == "rounding"
    third = np.full((3, 4), 1 / 3)
    assert judge(third.astype(np.float32), third, BOUND).verdict == "equal"  # the nearest that float32 has


def wrong(change: Any) -> np.ndarray:
    array = EXACT.astype(np.float32)
    changed = change(array)
    return array if changed is None else np.asarray(changed)


@pytest.mark.parametrize(
    ("array", "verdict", "words"),
    [
        (None, "broken", "missing"),
        (wrong(lambda a: a.T), "broken", r"shape \(4, 3\)"),
        (wrong(lambda a: a[:1]), "broken", "shape"),
        (wrong(lambda a: a[..., None]), "broken", "shape"),
        (wrong(lambda a: a[:0]), "broken", "shape"),
        (wrong(lambda a: np.full_like(a, np.nan)), "broken", "nan"),
        (wrong(lambda a: a.__setitem__((2, 3), np.nan)), "broken", "nan"),
        (wrong(lambda a: a.__setitem__((0, 0), np.inf)), "broken", "inf"),
        (wrong(lambda a: a.astype(np.uint8)), "broken", "dtype uint8"),
        (wrong(lambda a: a.astype(bool)), "broken", "dtype bool"),
        (wrong(lambda a: -a), "off", "times"),
        (wrong(lambda a: a[::-1].copy()), "off", "times"),
        (wrong(lambda a: a[:, ::-1].copy()), "off", "times"),
        (wrong(lambda a: np.full_like(a, a.mean())), "off", "times"),
        (wrong(lambda a: a.__setitem__((1, 2), a[1, 2] + 1e-4)), "off", "times"),
        (wrong(lambda a: np.zeros_like(a)), "off", "times"),
    ],
)
def test_what_must_not_pass(array: Any, verdict: str, words: str) -> None:
    distance = judge(array, EXACT, BOUND)
    assert (distance.verdict, distance.ok) == (verdict, False)
    assert words.replace("\\", "") in distance.reason


def test_the_worst_element_is_named() -> None:
    array = EXACT.astype(np.float32)
    array[1, 2] += 0.5
    distance = judge(array, EXACT, BOUND)
    assert (distance.index, distance.value, distance.expected) == ((1, 2), 7.5, 7.0)
    assert distance.max_error == 0.5
    assert distance.mean_error == pytest.approx(0.5 / 12)
    assert distance.times_bound == pytest.approx(5e4)


def test_a_zero_bound_lets_nothing_but_equality_pass() -> None:
    assert judge(EXACT.astype(np.float32), EXACT, Bound(np.zeros((3, 1)), 0.0)).ok
    assert not judge(EXACT + 1e-6, EXACT, Bound(np.zeros((3, 1)), 0.0)).ok


def test_a_bound_of_nan_passes_nothing() -> None:
    nan = float("nan")
    assert not judge(EXACT + 1e-9, EXACT, Bound(np.full((3, 1), nan), 1.0)).ok
    assert not judge(EXACT + 1e-9, EXACT, Bound(np.ones((3, 1)), nan)).ok


def test_a_small_error_everywhere_is_seen_in_the_mean() -> None:
    bound = Bound(np.full((3, 1), 1e-2), 1e-3)
    assert judge(EXACT + 9e-4, EXACT, bound).ok
    distance = judge(EXACT + 5e-3, EXACT, bound)
    assert (distance.verdict, distance.ok) == ("off", False)
    assert "mean" in distance.reason


def test_nan_and_inf_belong_only_where_the_reference_has_them() -> None:
    exact = np.array([[1.0, np.nan], [np.inf, 2.0]])
    assert judge(exact.astype(np.float32), exact, Bound(BOUND.each[:2], 1e-5)).ok
    for index, value in [((0, 1), 0.0), ((1, 0), -np.inf), ((1, 0), np.nan), ((0, 0), np.nan), ((0, 1), np.inf)]:
        array = exact.copy()
        array[index] = value
        distance = judge(array, exact, Bound(BOUND.each[:2], 1e-5))
        assert (distance.verdict, distance.index) == ("broken", index)


def test_empty_and_bfloat16() -> None:
    assert judge(np.zeros((0, 4), np.float32), np.zeros((0, 4)), Bound(np.zeros((0, 4)), 0.0)).ok
    assert judge(EXACT.astype(ml_dtypes.bfloat16), EXACT, BOUND).verdict == "equal"


# -- the bound -----------------------------------------------------------------------------------------------------


def judged(spec: MHASpec, result: Any, weights: MHAWeights, arrays: Any, **call: Any) -> dict[str, Any]:
    prepared, exact = reference_answer(spec, weights, arrays, **call)
    limits = bounds(prepared, weights, named(exact), Accuracy(spec.dtype))
    answer = named(result)
    return {name: judge(answer.get(name), array, limits[name]) for name, array in named(exact).items()}


def numpy_answer(spec: MHASpec, weights: MHAWeights, arrays: Any, **call: Any) -> Any:
    """The reference's formulas in the spec's dtype with NumPy's own matmul: an honest implementation."""
    prepared = prepare(spec, weights, *arrays, **call)
    plain = reference.Arithmetic(lambda array: dtypes.round_to(array, spec.dtype), np.matmul)
    return restore(prepared, reference.attend(spec, weights, prepared.call, arithmetic=plain))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", list(SPECS))
def test_an_honest_implementation_passes(name: str, dtype: str) -> None:
    spec = spec_of(name, dtype=dtype)
    for seed, mask in enumerate(MASKS):
        weights, arrays = material(spec, seed)
        call = masks_of(mask, spec.num_heads)
        for tensor, distance in judged(
            spec, numpy_answer(spec, weights, arrays, **call), weights, arrays, **call
        ).items():
            assert distance.ok, (mask, tensor, distance)


def one_by_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, adding one product after another in the arrays' own dtype."""
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), a.dtype)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
    return total


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("embed_dim", [16, 256])
def test_adding_up_in_the_dtype_passes_where_it_is_known(embed_dim: int, dtype: str) -> None:
    spec = MHASpec(embed_dim, 4, dtype=dtype)
    weights, arrays = material(spec)
    prepared, exact = reference_answer(spec, weights, arrays)
    plain = reference.Arithmetic(lambda array: dtypes.round_to(array, dtype), one_by_one)
    result = restore(prepared, reference.attend(spec, weights, prepared.call, arithmetic=plain))
    known = bounds(prepared, weights, named(exact), Accuracy(dtype, accumulate=dtype))
    assert all(judge(named(result)[name], array, known[name]).ok for name, array in named(exact).items())
    if (dtype, embed_dim) == ("float16", 256):
        strict = bounds(prepared, weights, named(exact), Accuracy("float16"))["output"]
        assert not judge(result.output, exact.output, strict).ok


@pytest.mark.parametrize("scale", [1.0, 5.0, 10.0])
@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1, 4), (64, 8, 2, 5, 7), (64, 1, 1, 1, 8), (8, 1, 1, 1, 2), (16, 4, 3, 1, 1)]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_false_alarm_on_small_tensors_and_large_scores(dtype: str, sizes: tuple[int, ...], scale: float) -> None:
    embed, heads, batch, target, source = sizes
    spec = MHASpec(embed, heads, dtype=dtype)
    for seed in range(20):
        drawn = random_inputs(spec, seed, batch=batch, target=target, source=source).values()
        arrays = tuple(dtypes.round_to(dtypes.to_float64(array) * scale, dtype) for array in drawn)
        weights = MHAWeights.random(spec, seed)
        result = numpy_answer(spec, weights, arrays)
        for tensor, distance in judged(spec, result, weights, arrays).items():
            assert distance.ok, (seed, tensor, distance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("embed_dim", [16, 128, 768, 2048])
def test_at_every_width_rounding_passes_and_faults_do_not(embed_dim: int, dtype: str) -> None:
    """Also one element that is negated, two heads that are permuted, and noise of one unit in the last place."""
    spec = MHASpec(embed_dim, 4, dtype=dtype)
    weights, arrays = material(spec)
    prepared, exact = reference_answer(spec, weights, arrays)
    limits = bounds(prepared, weights, named(exact), Accuracy(dtype))
    answer = numpy_answer(spec, weights, arrays)
    for name, array in named(exact).items():
        found = dtypes.round_to(dtypes.to_float64(named(answer)[name]), dtype)
        assert judge(found, array, limits[name], dtype).ok
        unit = 2 * dtypes.UNIT_ROUNDOFF[dtype]
        noisy = dtypes.round_to(dtypes.to_float64(found) * (1 + unit), dtype)
        assert judge(noisy, array, limits[name], dtype).ok
        assert judge(-found, array, limits[name], dtype).verdict == "off"
        negated = np.array(found)
        worst = np.unravel_index(np.argmax(np.abs(dtypes.to_float64(found))), found.shape)
        negated[worst] = -negated[worst]
        assert judge(negated, array, limits[name], dtype).verdict == "off"
        assert judge(np.ascontiguousarray(found[..., ::-1]), array, limits[name], dtype).verdict == "off"
    tree = {name: np.array(array) for name, array in weights.arrays().items()}
    size = embed_dim // 4
    tree["q_weight"] = np.roll(tree["q_weight"], size, axis=0)
    wrong = numpy_answer(spec, MHAWeights(**tree), arrays)
    assert judge(wrong.output, exact.output, limits["output"]).verdict == "off"


@pytest.mark.parametrize("seed", range(4))
def test_an_input_feature_that_is_much_larger_than_the_others_is_no_false_alarm(seed: int) -> None:
    """Trained encoders have a few; the gradients of the weights then have a few large columns."""
    spec = MHASpec(256, 4)
    weights, arrays = material(spec, seed)
    scale = np.ones(256, np.float32)
    scale[40] = 100.0
    arrays = tuple(array * scale for array in arrays)
    grad = np.random.default_rng(seed).standard_normal(arrays[0].shape).astype(np.float32)
    result = numpy_answer(spec, weights, arrays, grad_output=grad)
    for tensor, distance in judged(spec, result, weights, arrays, grad_output=grad).items():
        assert distance.ok, (tensor, distance)
    grads = dict(result.grads)
    grads["v_weight"] = grads["v_weight"].copy()
    grads["v_weight"][:, 7] *= np.float32(1.01)  # an ordinary column
    wrong = judged(spec, dataclasses.replace(result, grads=grads), weights, arrays, grad_output=grad)
    assert wrong["grads.v_weight"].verdict == "off"


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def scaled_early(spec: MHASpec, weights: MHAWeights, x: np.ndarray, y: np.ndarray, grad: np.ndarray) -> Any:
    """Gradients (of weights) of an honest float16 layer, batch first: each step stored, the scale on the query first.

    The reference scales the gradients of query and key last, so below the smallest normal number other elements are
    lost than here.
    """
    w = {name: array.astype(np.float32) for name, array in weights.arrays().items()}
    n, heads = len(x), spec.num_heads

    def split(z: np.ndarray, letter: str) -> np.ndarray:
        z = half(z @ w[f"{letter}_weight"].T + w[f"{letter}_bias"])
        return z.reshape(n, z.shape[1], heads, -1).transpose(0, 2, 1, 3)

    def flat(z: np.ndarray) -> np.ndarray:
        return z.transpose(0, 2, 1, 3).reshape(-1, spec.embed_dim)

    x, y, grad = (array.astype(np.float32) for array in (x, y, grad))
    scale = np.float32(spec.score_scale)
    q, k, v = half(split(x, "q") * scale), split(y, "k"), split(y, "v")
    scores = half(q @ k.swapaxes(-1, -2))
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = half(p / p.sum(-1, keepdims=True))
    back = half(grad @ w["out_weight"]).reshape(n, -1, heads, spec.v_head_dim).transpose(0, 2, 1, 3)
    dp = half(back @ v.swapaxes(-1, -2))
    ds = half(p * (dp - (p * dp).sum(-1, keepdims=True)))
    dq, dk = half(half(ds @ k) * scale), half(ds.swapaxes(-1, -2) @ q)
    dv = half(p.swapaxes(-1, -2) @ back)
    pairs = {"q": (dq, x), "k": (dk, y), "v": (dv, y)}
    return {f"{letter}_weight": half(flat(d).T @ z.reshape(-1, z.shape[-1])) for letter, (d, z) in pairs.items()}


@pytest.mark.parametrize(
    ("heads", "embed", "weight", "scale", "lengths"),
    [(8, 512, 1e-2, 1.0, (10, 10)), (5, 160, 1e-3, 20.0, (5, 33)), (1, 256, 1e-3, 20.0, (5, 33))],
)
def test_gradients_among_the_subnormals_of_float16(
    heads: int, embed: int, weight: float, scale: float, lengths: tuple[int, int]
) -> None:
    """What is lost there depends on where the scale is applied, and large inputs magnify it: no false alarm."""
    spec = MHASpec(embed, heads, dtype="float16", batch_first=True)
    for seed in range(2):
        small = {
            name: half(array * weight).astype("f2") for name, array in MHAWeights.random(spec, seed).arrays().items()
        }
        weights, rng = MHAWeights(**small), np.random.default_rng(seed)
        x, y = ((rng.standard_normal((2, length, embed)) * scale).astype("f2") for length in lengths)
        grad = rng.standard_normal(x.shape).astype("f2")
        prepared, exact = reference_answer(spec, weights, (x, y, y), grad_output=grad)
        limits = bounds(prepared, weights, named(exact), Accuracy("float16"))
        for name, found in scaled_early(spec, weights, x, y, grad).items():
            distance = judge(found.astype("f2"), exact.grads[name], limits[f"grads.{name}"], "float16")
            assert distance.ok, (seed, name, distance)
            assert max(distance.times_bound, distance.times_mean_bound) < 0.6
            wrong = judge(1.1 * exact.grads[name], exact.grads[name], limits[f"grads.{name}"])
            assert wrong.ok == (name != "v_weight")  # of the others there is nothing left to judge by
            turned = judge(found.T.astype("f2"), exact.grads[name], limits[f"grads.{name}"], "float16")
            assert not turned.ok or name != "v_weight"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("masks", ["none", "padding+causal"])
def test_subnormals_widen_no_bound_of_an_ordinary_layer(
    monkeypatch: pytest.MonkeyPatch, masks: str, dtype: str
) -> None:
    spec = MHASpec(64, 4, dtype=dtype)
    weights, arrays = MHAWeights.random(spec, 1), tuple(random_inputs(spec, 1).values())
    grad = dtypes.round_to(np.random.default_rng(0).standard_normal(arrays[0].shape), dtype)
    call = {**random_masks(masks, spec, 1), "grad_output": grad}
    prepared, exact = reference_answer(spec, weights, arrays, **call)
    found = bounds(prepared, weights, named(exact), Accuracy(dtype))
    monkeypatch.setattr(rounding, "SUBNORMAL_STEP", {})
    without = bounds(prepared, weights, named(exact), Accuracy(dtype))
    for name, bound in found.items():
        assert (bound.each <= (1.03 if dtype == "float16" else 1.0) * without[name].each).all(), name
        assert bound.mean <= (1.03 if dtype == "float16" else 1.0) * without[name].mean, name


def test_a_large_batch_element_excuses_nothing_in_a_small_one() -> None:
    spec = MHASpec(16, 4)
    weights, (query, key, value) = material(spec)
    query, key, value = (array * np.array([3e6, 1], np.float32)[None, :, None] for array in (query, key, value))
    prepared, exact = reference_answer(spec, weights, (query, key, value))
    bound = bounds(prepared, weights, named(exact), Accuracy("float32"))["output"]
    for wrong_one in (-exact.output[:, 1], np.zeros_like(exact.output[:, 1])):
        answer = exact.output.astype(np.float32)
        answer[:, 1] = wrong_one
        assert judge(answer, exact.output, bound).verdict == "off"


def swap_heads(tree: dict[str, np.ndarray]) -> None:
    tree["q_weight"] = np.concatenate([tree["q_weight"][16:32], tree["q_weight"][:16], tree["q_weight"][32:]])


def transpose(name: str) -> Any:
    return lambda tree: tree.__setitem__(name, np.ascontiguousarray(tree[name].T))


def lose(name: str) -> Any:
    return lambda tree: tree.__setitem__(name, np.zeros_like(tree[name]))


FAULTS = {
    "two heads swapped": swap_heads,
    "query transposed": transpose("q_weight"),
    "out transposed": transpose("out_weight"),
    "query bias lost": lose("q_bias"),
    "value bias lost": lose("v_bias"),
    "out bias lost": lose("out_bias"),
    "key and value exchanged": lambda t: t.update(k_weight=t["v_weight"], v_weight=t["k_weight"]),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_real_fault_does_not_pass(fault: str, dtype: str) -> None:
    spec = MHASpec(64, 4, dtype=dtype)
    weights = MHAWeights.random(spec)
    arrays = tuple(random_inputs(spec).values())
    tree = {name: np.array(array) for name, array in weights.arrays().items()}
    FAULTS[fault](tree)
    result = numpy_answer(spec, MHAWeights(**tree), arrays)
    distances = judged(spec, result, weights, arrays)
    assert not distances["output"].ok
    assert max(distances["output"].times_bound, distances["output"].times_mean_bound) > 1.2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"key_padding_mask": True}, {"key_padding_mask": "ignored"}),
        ({"key_padding_mask": True}, {"key_padding_mask": "inverted"}),
        ({"key_padding_mask": True}, {"key_padding_mask": "added as 1.0"}),
    ],
)
def test_a_mask_that_means_something_else_does_not_pass(given: Any, meant: Any) -> None:
    spec = MHASpec(64, 4)
    weights = MHAWeights.random(spec)
    arrays = tuple(random_inputs(spec).values())
    mask = np.zeros((2, 7), bool)
    mask[0, 5:] = True
    other = {"ignored": None, "inverted": ~mask, "added as 1.0": mask.astype(np.float32)}[meant["key_padding_mask"]]
    result = numpy_answer(spec, weights, arrays, key_padding_mask=other)
    distances = judged(spec, result, weights, arrays, key_padding_mask=mask)
    assert not distances["output"].ok
    assert not distances["attn_weights"].ok


def test_overflow_is_not_an_excuse() -> None:
    """Where the dtype overflows there is no rounding to justify: inf where the reference is finite is broken."""
    spec = MHASpec(16, 4, dtype="float16")
    weights, arrays = material(spec)
    finite = tuple(np.clip(dtypes.to_float64(array) * 1e5, -6e4, 6e4).astype(np.float16) for array in arrays)
    result = numpy_answer(spec, weights, finite)
    assert not np.isfinite(result.output).all()
    assert judged(spec, result, weights, finite)["output"].verdict == "broken"


def test_the_bound_scales_with_the_dtype() -> None:
    found = {}
    for dtype in ("float16", "float32", "float64"):
        spec = MHASpec(16, 4, dtype=dtype)
        weights, arrays = material(spec)
        prepared, exact = reference_answer(spec, weights, arrays)
        found[dtype] = float(bounds(prepared, weights, named(exact), Accuracy(dtype))["output"].each.max())
    assert 1e-3 < found["float16"] < 2e-2
    assert 1e-7 < found["float32"] < 2e-6
    assert 1e-16 < found["float64"] < 1e-14


def test_the_random_errors_are_as_large_as_those_of_plain_sums() -> None:
    """The model of a sum's rounding error, against sums that are really added up in float16."""
    rng = np.random.default_rng(0)
    half = noisy(Accuracy("float16", accumulate="float16"), rng)
    for terms in (16, 256, 1024):
        for positive in (False, True):
            a, b = (dtypes.round_to(rng.standard_normal(shape), "float16") for shape in ((32, terms), (terms, 32)))
            a, b = (np.abs(a), np.abs(b)) if positive else (a, b)
            exact = dtypes.to_float64(a) @ dtypes.to_float64(b)
            real, model = (
                np.abs(dtypes.to_float64(product(a, b)) - exact).mean() for product in (one_by_one, half.matmul)
            )
            assert 0.5 < model / real < 3.5, (terms, positive)


def test_what_a_framework_is_allowed_beyond_rounding_is_data() -> None:
    assert accuracy("mindspore", "float32").exp > 100
    assert accuracy("torch", "float32") == Accuracy("float32")
    assert accuracy("mindspore", "float64").exp == 1.0
    assert (accuracy("megengine", "float16").sums, accuracy("torch", "float16").sums) == ("float16", "float32")
