from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhabridge import ArgumentError, ArgumentTypeError, MHASpec


def test_defaults_are_pytorchs() -> None:
    spec = MHASpec(8, 2)
    assert (spec.dropout, spec.bias, spec.add_bias_kv, spec.add_zero_attn) == (0.0, True, False, False)
    assert (spec.kdim, spec.vdim, spec.batch_first, spec.dtype) == (None, None, False, "float32")


def test_a_usual_size_is_none_and_equal() -> None:
    assert MHASpec(8, 2, kdim=8, vdim=8, q_proj_size=8, scale=0.5) == MHASpec(8, 2)
    assert hash(MHASpec(8, 2, kdim=8)) == hash(MHASpec(8, 2))


def test_bias_is_a_shorthand() -> None:
    assert MHASpec(8, 2, bias=False).q_bias is False
    whisper = MHASpec(8, 2, k_bias=False)
    assert (whisper.q_bias, whisper.k_bias, whisper.v_bias, whisper.out_bias, whisper.bias) == (
        True,
        False,
        True,
        True,
        None,
    )
    assert MHASpec(8, 2, bias=False, out_bias=True).out_bias is True


def test_replace_changes_the_shorthand_and_never_silently_ignores_it() -> None:
    assert MHASpec(8, 2).replace(bias=False) == MHASpec(8, 2, bias=False)
    assert MHASpec(8, 2, k_bias=False).replace(dropout=0.5).k_bias is False
    with pytest.raises(ArgumentError, match=r"spec\.replace"):
        dataclasses.replace(MHASpec(8, 2), bias=False)
    with pytest.raises(ArgumentTypeError, match="no field of MHASpec"):
        MHASpec(8, 2).replace(biass=False)


def test_no_projection_has_no_bias() -> None:
    spec = MHASpec(8, 2, v_proj_size=0, out_proj_size=0)
    assert (spec.v_bias, spec.out_bias, spec.bias) == (False, False, True)
    assert (spec.v_head_dim, spec.out_features) == (8, 16)
    with pytest.raises(ArgumentError, match="no such projection"):
        MHASpec(8, 2, v_proj_size=0, v_bias=True)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"embed_dim": 10, "num_heads": 4}, ArgumentError, "multiple of num_heads"),
        ({"embed_dim": 8, "num_heads": 0}, ArgumentError, "at least 1"),
        ({"embed_dim": 8, "num_heads": -2}, ArgumentError, "at least 1"),
        ({"embed_dim": 8.0, "num_heads": 2}, ArgumentTypeError, "an integer"),
        ({"embed_dim": True, "num_heads": 1}, ArgumentTypeError, "an integer"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": 1.5}, ArgumentError, r"\[0, 1\]"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": -0.5}, ArgumentError, r"\[0, 1\]"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": float("nan")}, ArgumentError, "finite"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": "0.1"}, ArgumentTypeError, "a number"),
        ({"embed_dim": 8, "num_heads": 2, "bias": 1}, ArgumentTypeError, "True or False"),
        ({"embed_dim": 8, "num_heads": 2, "kdim": 0}, ArgumentError, "at least 1"),
        ({"embed_dim": 8, "num_heads": 2, "dtype": "int8"}, ArgumentError, "float32"),
        ({"embed_dim": 8, "num_heads": 2, "q_proj_size": 4}, ArgumentError, "equal head sizes"),
        ({"embed_dim": 8, "num_heads": 2, "q_proj_size": 0}, ArgumentError, "equal head sizes"),
        ({"embed_dim": 8, "num_heads": 2, "out_proj_size": 4, "residual": True}, ArgumentError, "as many as the query"),
        ({"embed_dim": 8, "num_heads": 2, "scale": float("inf")}, ArgumentError, "finite"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": 10**400}, ArgumentError, "finite"),
        ({"embed_dim": 10**400, "num_heads": 2}, ArgumentError, r"2\*\*31"),
        ({"embed_dim": 8, "num_heads": 2, "kdim": 2**31}, ArgumentError, r"2\*\*31"),
        ({"embed_dim": 8, "num_heads": 2, "kdim": -(10**9000)}, ArgumentError, "huge"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MHASpec(**fields)


def test_errors_are_value_and_type_errors_too() -> None:
    with pytest.raises(ValueError, match="embed_dim"):
        MHASpec(10, 4)
    with pytest.raises(TypeError, match="embed_dim"):
        MHASpec("8", 2)  # type: ignore[arg-type]


def test_numpy_integers_and_dtypes_are_welcome() -> None:
    spec = MHASpec(np.int64(8), np.int32(2), dtype=np.float16)  # type: ignore[arg-type]
    assert (type(spec.embed_dim), spec.dtype) == (int, "float16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON list"),
        ('{"embed_dim": 8, "num_heads": 2, "has_bias": true}', "has_bias"),
        ('{"embed_dim": 8}', "num_heads"),
        ("[" * 100_000, "not JSON"),
        (None, "not JSON"),
    ],
)
def test_json_that_is_no_spec_is_refused(text: Any, words: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=words):
        MHASpec.from_json(text)


@pytest.mark.parametrize("fields", [None, [], {1: 2}, "x"])
def test_fields_must_be_a_dictionary(fields: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="dictionary"):
        MHASpec.from_dict(fields)


@st.composite
def specs(draw: st.DrawFn) -> MHASpec:
    """Any spec that can be."""
    heads = draw(st.integers(1, 4))
    embed = heads * draw(st.integers(1, 4))
    size = st.none() | st.integers(1, 6).map(lambda n: n * heads)
    qk = draw(size)
    return MHASpec(
        embed,
        heads,
        kdim=draw(st.none() | st.integers(1, 9)),
        vdim=draw(st.none() | st.integers(1, 9)),
        dropout=draw(st.floats(0, 1)),
        bias=draw(st.none() | st.booleans()),
        k_bias=draw(st.none() | st.booleans()),
        out_bias=draw(st.none() | st.booleans()),
        q_proj_size=qk,
        k_proj_size=qk,
        v_proj_size=draw(size),
        out_proj_size=draw(st.none() | st.integers(1, 9)),
        out_dropout=draw(st.floats(0, 1)),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        scale=draw(st.none() | st.floats(0.01, 2)),
        batch_first=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
    )


@given(specs())
def test_json_both_ways(spec: MHASpec) -> None:
    assert MHASpec.from_json(spec.to_json()) == spec
    assert MHASpec.from_dict(spec.to_dict()) == spec
    assert spec.replace() == spec
    assert json.loads(spec.to_json()) == spec.to_dict()


@given(specs())
def test_parameter_shapes_follow_the_sizes(spec: MHASpec) -> None:
    shapes = spec.parameter_shapes()
    assert shapes["q_weight"] == (spec.num_heads * spec.q_head_dim, spec.embed_dim)
    assert shapes["out_weight"] == (spec.out_features, spec.num_heads * spec.v_head_dim)
    assert ("k_bias" in shapes) == spec.k_bias
    assert ("bias_k" in shapes) == spec.add_bias_kv
