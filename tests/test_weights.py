"""MHAWeights: what it holds, refuses, compares and draws."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import mhabridge as mb
from mhabridge import dtypes

SPEC = mb.MHASpec(8, 2)


def identity(**changes):
    """Weights of SPEC with recognisable numbers, some of them changed."""
    arrays = {name: np.full(shape, 0.5, "float32") for name, shape in SPEC.parameter_shapes().items()}
    return mb.MHAWeights(**{**arrays, **changes})


def test_the_callers_array_is_not_shared():
    mine = np.eye(8, dtype="float32")
    weights = identity(q_weight=mine)
    mine[0, 0] = 7.0
    assert weights.q_weight[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        weights.q_weight[0, 0] = 7.0


def test_arrays_given_out_by_to_layout_are_new_and_writeable():
    weights = identity()
    named = weights.to_layout("hf-bert", SPEC)
    for array in named.values():
        assert array.flags.writeable
        assert array.flags.c_contiguous
        array[...] = 9.0
    assert weights == identity()


@pytest.mark.parametrize("value", [[[1.0]], 1.0, "x"])
def test_only_arrays_are_accepted(value):
    with pytest.raises(mb.ArgumentTypeError, match=r"q_weight: given \w+; expected a NumPy array"):
        mb.MHAWeights(q_weight=value)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool", "uint16"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(mb.WeightsError, match=r"q_weight: given dtype .*; expected one of float16"):
        mb.MHAWeights(q_weight=np.zeros((2, 2), dtype))


def test_two_dtypes_are_refused_by_name():
    with pytest.raises(mb.WeightsError, match="k_weight float64"):
        mb.MHAWeights(q_weight=np.zeros((2, 2), "float32"), k_weight=np.zeros((2, 2), "float64"))


@pytest.mark.parametrize("dtype", dtypes.FLOATS)
def test_the_dtype_is_kept(dtype):
    spec = SPEC.replace(dtype=dtype)
    weights = mb.MHAWeights.random(spec)
    weights.check(spec)
    assert weights.dtype == dtype
    assert {dtypes.name_of(array) for array in weights.to_layout("megengine", spec).values()} == {dtype}


@pytest.mark.parametrize("other", [None, {}, 1.0])
def test_equals_wants_weights(other):
    with pytest.raises(mb.ArgumentTypeError, match=r"other: given \w+; expected MHAWeights"):
        identity().equals(other)
    assert identity() != other


def test_foreign_byte_order_is_the_same_numbers():
    big = np.arange(64, dtype=">f4").reshape(8, 8)
    assert identity(q_weight=big).equals(identity(q_weight=big.astype("float32")))


def test_words_and_public_bfloat16_are_equal_bit_for_bit():
    values = np.array([[1.5, -0.0], [np.nan, 3.0]], ml_dtypes.bfloat16)
    public, words = mb.MHAWeights(q_weight=values), mb.MHAWeights(q_weight=dtypes.to_words(values))
    assert words.q_weight.dtype == dtypes.BFLOAT16_WORDS
    assert public == words


@pytest.mark.parametrize(
    "other",
    [
        identity(q_weight=np.full((8, 8), np.float32(0.5)) + np.float32(2**-20)),
        identity(out_bias=None),
        identity().astype("float64"),
        mb.MHAWeights(q_weight=np.zeros((4, 4), "float32")),
    ],
    ids=["one number", "one missing", "dtype", "others"],
)
def test_the_comparison_sees_a_difference(other):
    assert identity() == identity()
    assert identity() != other
    assert not identity().equals(other)


def test_the_comparison_tells_minus_zero_and_shapes_apart():
    zero = mb.MHAWeights(q_weight=np.zeros((2, 3)))
    assert zero != mb.MHAWeights(q_weight=-np.zeros((2, 3)))
    assert zero != mb.MHAWeights(q_weight=np.zeros((3, 2)))
    assert zero != "weights"
    with pytest.raises(TypeError, match="unhashable"):
        hash(zero)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_weight": np.zeros((8, 6), "float32")}, r"k_weight: given shape \(8, 6\); expected shape \(8, 8\)"),
        ({"v_bias": None}, r"v_bias: given nothing; expected an array of shape \(8,\)"),
        ({"bias_k": np.zeros(8, "float32")}, r"bias_k: given an array of shape \(8,\); expected None"),
        ({"q_bias": np.zeros((1, 8), "float32")}, r"q_bias: given shape \(1, 8\); expected shape \(8,\)"),
    ],
)
def test_check_names_the_parameter_and_both_shapes(changes, message):
    with pytest.raises(mb.WeightsError, match=message):
        identity(**changes).check(SPEC)


def test_check_holds_the_dtype_against_the_spec():
    with pytest.raises(mb.WeightsError, match=r"given dtype float32; expected float64"):
        identity().check(SPEC.replace(dtype="float64"))


def test_tree_round_trip_and_unknown_names():
    weights = mb.MHAWeights.random(SPEC.replace(add_bias_kv=True, out_bias=False))
    tree = weights.to_tree()
    assert len(tree) == 10
    assert tree["out_bias"] is None
    assert mb.MHAWeights.from_tree(tree) == weights
    with pytest.raises(mb.WeightsError, match="in_proj_weight: given a parameter of no layer"):
        mb.MHAWeights.from_tree({"in_proj_weight": np.zeros((24, 8))})


def test_random_is_the_same_for_every_dtype_up_to_rounding():
    exact = mb.MHAWeights.random(SPEC.replace(dtype="float64"), seed=3)
    for dtype in ("float16", "bfloat16", "float32"):
        assert mb.MHAWeights.random(SPEC.replace(dtype=dtype), seed=3) == exact.astype(dtype)


def test_random_is_fixed_for_ever():
    weights = mb.MHAWeights.random(mb.MHASpec(4, 2, dtype="float64"), seed=7)
    drawn = [weights.q_weight[0, 0], weights.v_weight[3, 1], weights.out_bias[2]]
    assert drawn == pytest.approx([0.5592655414405086, -0.1812469998526226, -0.17358085199326134], rel=1e-14)


@pytest.mark.parametrize(
    ("fields", "name", "bound"),
    [
        ({}, "k_weight", math.sqrt(6 / (4 * 64))),
        ({"kdim": 32}, "k_weight", math.sqrt(6 / (64 + 32))),
        ({"kdim": 32}, "q_weight", math.sqrt(6 / (64 + 64))),
        ({}, "out_weight", 1 / 8),
        ({}, "v_bias", 1 / 8),
    ],
)
def test_random_has_pytorchs_bounds(fields, name, bound):
    values = getattr(mb.MHAWeights.random(mb.MHASpec(64, 2, dtype="float64", **fields)), name)
    assert 0.9 * bound < np.abs(values).max() < bound
    assert np.all(values != 0)


def test_random_bias_k_is_xavier_normal():
    weights = mb.MHAWeights.random(
        mb.MHASpec(4096, 2, kdim=1, vdim=1, add_bias_kv=True, out_proj_size=1, dtype="float64")
    )
    assert weights.bias_k.std() == pytest.approx(1 / 64, rel=0.05)
    assert not np.array_equal(weights.bias_k, weights.bias_v)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, mb.ArgumentError), (2**32, mb.ArgumentError), (1.5, mb.ArgumentTypeError)]
)
def test_a_bad_seed_is_refused(seed, error):
    with pytest.raises(error, match="seed"):
        mb.MHAWeights.random(SPEC, seed=seed)


def test_astype_refuses_to_overflow_and_keeps_infinities():
    with pytest.raises(mb.WeightsError, match=r"q_weight: given 1 finite values beyond what float16 holds"):
        mb.MHAWeights(q_weight=np.array([[1.0, 1e6]])).astype("float16")
    kept = mb.MHAWeights(q_weight=np.array([[np.inf, np.nan]])).astype("float16").q_weight
    assert np.isinf(kept[0, 0])
    assert np.isnan(kept[0, 1])


def test_repr_is_short():
    assert repr(mb.MHAWeights()) == "MHAWeights()"
    assert repr(mb.MHAWeights(q_bias=np.zeros(3))) == "MHAWeights(float64, q_bias (3,))"
