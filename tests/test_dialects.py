"""Constructor arguments: spec_from_kwargs and spec_to_kwargs, for every dialect and version."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhabridge import MHASpec, arguments, mapping
from mhabridge.dialects import spec_from_kwargs, spec_to_kwargs
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError

SPOKEN = (
    "torch@1.8.1",
    "torch@1.9",
    "torch@1.11",
    "torch",
    "mindspore@2.0",
    "mindspore@2.3",
    "mindspore",
    "mindspore@2.12",
    "megengine",
    "megengine.functional",
    "numpy",
)
LAYER = {"embed_dim": 16, "num_heads": 4}


@st.composite
def specs(draw: st.DrawFn) -> MHASpec:
    """Any valid spec, most fields at their default, so that narrow dialects are reached too."""

    def rarely(strategy: st.SearchStrategy[Any], default: Any) -> Any:
        return draw(strategy) if draw(st.integers(0, 5)) == 0 else default

    heads = draw(st.integers(1, 4))
    embed = heads * draw(st.integers(1, 6))
    size = rarely(st.integers(1, 6).map(lambda head: head * heads), None)
    out_size = rarely(st.integers(0, 12), None)
    biases = draw(st.booleans())
    v_size = rarely(st.just(0), None)
    each = {name: rarely(st.booleans(), biases) for name in ("q_bias", "k_bias", "v_bias", "out_bias")}
    each["v_bias"] = each["v_bias"] and v_size != 0
    each["out_bias"] = each["out_bias"] and out_size != 0
    probabilities = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    fields = {
        "embed_dim": embed,
        "num_heads": heads,
        "kdim": rarely(st.integers(1, 9), None),
        "vdim": rarely(st.integers(1, 9), None),
        "dropout": draw(probabilities),
        "q_proj_size": size,
        "k_proj_size": size,
        "v_proj_size": v_size,
        "out_proj_size": out_size,
        "out_dropout": rarely(probabilities, 0.0),
        "add_bias_kv": rarely(st.booleans(), False),
        "add_zero_attn": rarely(st.booleans(), False),
        "scale": rarely(st.sampled_from([0.5, 1.0, 1 / 3]), None),
        "batch_first": draw(st.booleans()),
        "dtype": rarely(st.sampled_from(["float16", "bfloat16", "float64"]), "float32"),
        **each,
    }
    spec = MHASpec(**fields)
    return spec.replace(residual=True) if rarely(st.just(spec.out_features == embed), False) else spec


def tensors(spec: MHASpec, spoken: str) -> dict[str, Any]:
    """What a call of a function would be given besides: there kdim, vdim and dtype are said by the tensors."""
    if arguments.dialect(spoken).function is None:
        return {}
    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    weights = {"io_weight_bias": np.zeros((1, 1), dtype)} if spec.dtype != "bfloat16" else {"dtype": "bfloat16"}
    return {"key": np.zeros((1, 2, spec.key_features)), "value": np.zeros((1, 2, spec.value_features)), **weights}


@pytest.mark.parametrize("spoken", SPOKEN)
@given(spec=specs())
def test_what_can_be_said_comes_back_the_same(spoken: str, spec: MHASpec) -> None:
    try:
        kwargs = spec_to_kwargs(spec, spoken)
    except UnsupportedError:
        kwargs = None
    if kwargs is not None:
        assert spec_from_kwargs(spoken, (), {**kwargs, **tensors(spec, spoken)}) == spec


@given(spec=specs())
def test_the_canonical_dialect_says_every_spec(spec: MHASpec) -> None:
    assert MHASpec(**spec_to_kwargs(spec, "numpy")) == spec


@pytest.mark.parametrize("spoken", SPOKEN)
def test_arguments_at_their_default_are_left_out(spoken: str) -> None:
    default = spec_from_kwargs(spoken, (), _required(spoken))
    assert set(spec_to_kwargs(default, spoken)) == set(_required(spoken))


def _required(spoken: str) -> dict[str, Any]:
    values = {**LAYER, "attn_drop": 0.0, "out_drop": 0.0}
    return {
        entry.name: values[entry.name] for entry in arguments.dialect(spoken).of_role("parameter") if entry.required
    }


@pytest.mark.parametrize(
    ("spoken", "kwargs", "field", "value"),
    [
        ("torch", {"bias": False}, "bias", False),
        ("torch", {"dtype": "torch.float16", "device": "cpu"}, "dtype", "float16"),
        ("torch", {"dtype": None}, "dtype", "float32"),
        ("torch@1.8.1", {}, "batch_first", False),
        ("mindspore", {"has_bias": False}, "bias", False),
        ("mindspore", {"dtype": None}, "dtype", "float32"),
        ("mindspore@2.12", {"bias": False}, "bias", False),
        ("megengine", {}, "batch_first", True),
        ("megengine", {"attn_dropout": 0.25, "name": "mha"}, "dropout", 0.25),
        ("megengine", {"out_dropout": 0.25}, "out_dropout", 0.25),
        ("megengine", {"add_bias_kv": True}, "add_bias_kv", True),
        ("numpy", {"k_bias": False}, "k_bias", False),
        ("numpy", {"dtype": np.float16}, "dtype", "float16"),
    ],
)
def test_an_argument_means_its_field(spoken: str, kwargs: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(MHASpec.from_kwargs(spoken, **LAYER, **kwargs), field) == value


def test_positional_arguments_follow_the_dialects_order() -> None:
    assert MHASpec.from_kwargs("torch", 16, 4, 0.1, False).bias is False
    assert MHASpec.from_kwargs("megengine", 16, 4, 0.1, 0.2, False).out_dropout == 0.2


class TestFunctional:
    """MegEngine's functional form, which takes the layer's and the call's arguments together."""

    def read(self, **kwargs: Any) -> MHASpec:
        return MHASpec.from_kwargs("megengine.functional", **{**LAYER, "attn_drop": 0.1, "out_drop": 0.2, **kwargs})

    def test_defaults_are_no_biases_and_batch_first(self) -> None:
        assert self.read() == MHASpec(16, 4, dropout=0.1, out_dropout=0.2, bias=False, batch_first=True)

    @pytest.mark.parametrize(("size", "scale"), [(8, 0.5), (32, 0.5), (16, None), (None, None)])
    def test_scale_is_that_of_embed_dim_whatever_qproj_size_is(self, size: int | None, scale: float | None) -> None:
        assert self.read(qproj_size=size, kproj_size=size).scale == scale

    def test_scale_without_a_query_projection_is_that_of_the_whole_query(self) -> None:
        spec = self.read(qproj_size=0, kproj_size=64)
        assert spec.score_scale == 0.25

    def test_a_scale_that_it_cannot_say_is_refused(self) -> None:
        spec = MHASpec(16, 4, q_proj_size=8, k_proj_size=8, batch_first=True)
        with pytest.raises(UnsupportedError, match=r"scale: given 0.707.*expected 0.5"):
            spec.to_kwargs("megengine.functional")

    def test_zero_means_no_projection(self) -> None:
        assert self.read(vproj_size=0, oproj_size=0).out_features == 64

    def test_a_whole_call_is_read(self) -> None:
        key, value = np.zeros((2, 5, 6)), np.zeros((2, 5, 10))
        weights = np.zeros((1, 9), "float16")
        spec = MHASpec.from_kwargs("megengine.functional", np.zeros((2, 3, 16)), key, value, 16, 4, 0.0, 0.0, weights)
        assert (spec.kdim, spec.vdim, spec.dtype) == (6, 10, "float16")

    def test_sizes_may_be_said_by_keyword_but_not_against_the_tensor(self) -> None:
        assert self.read(kdim=6, dtype="float16").kdim == 6
        with pytest.raises(ArgumentError, match=r"kdim: given 7 with a key that says 6"):
            self.read(kdim=7, key=np.zeros((2, 5, 6)))

    def test_reslink_and_bias_tensors_are_understood_and_never_written(self) -> None:
        assert self.read(reslink=True).residual
        both = self.read(bias_k="tensor", bias_v="tensor")
        assert both.add_bias_kv
        with pytest.raises(UnsupportedError, match=r"bias_k: given add_bias_kv=True"):
            both.to_kwargs("megengine.functional")
        with pytest.raises(ArgumentError, match="bias_v"):
            self.read(bias_k="tensor")

    def test_what_is_no_tensor_is_refused(self) -> None:
        with pytest.raises(ArgumentTypeError, match=r"key: given 'k' \(str\); expected a tensor"):
            self.read(key="k")

    def test_more_heads_than_features_have_no_scale(self) -> None:
        with pytest.raises(ArgumentError, match="embed_dim"):
            self.read(embed_dim=2, num_heads=4, qproj_size=8, kproj_size=8, vproj_size=8)


@pytest.mark.parametrize(
    ("spoken", "changes", "message"),
    [
        ("torch", {"k_bias": False}, r"q_bias, k_bias, v_bias, out_bias: given True, False, True, True for PyTorch"),
        ("torch", {"scale": 1.0}, r"scale: given 1.0 for PyTorch 2.13; expected None: scores are always scaled"),
        ("torch", {"residual": True}, r"residual: given True"),
        ("torch@1.8.1", {"batch_first": True}, r"batch_first: given True for PyTorch 1.8.1.*replace"),
        ("torch@1.8.1", {"dtype": "float64"}, r"dtype: given 'float64' for PyTorch 1.8.1"),
        ("mindspore@2.0", {"dtype": "float16"}, r"dtype: given 'float16' for MindSpore 2.0"),
        ("mindspore", {"out_dropout": 0.1}, r"out_dropout: given 0.1 for MindSpore"),
        ("megengine", {"batch_first": False}, r"batch_first: given False.*replace\(batch_first=True\)"),
        ("megengine", {"batch_first": True, "add_zero_attn": True}, r"add_zero_attn: given add_zero_attn=True"),
        ("megengine", {"batch_first": True, "q_proj_size": 8, "k_proj_size": 8}, r"q_proj_size.*megengine.functional"),
    ],
)
def test_what_a_dialect_cannot_say_is_refused(spoken: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        MHASpec(**LAYER, **changes).to_kwargs(spoken)


@pytest.mark.parametrize(
    ("spoken", "args", "kwargs", "error", "message"),
    [
        ("torch", (), {**LAYER, "has_bias": True}, UnsupportedError, "That is MindSpore's name; PyTorch says bias."),
        ("mindspore", (), {**LAYER, "bias": True}, UnsupportedError, "name the version you mean"),
        ("torch@1.8.1", (), {**LAYER, "batch_first": True}, UnsupportedError, "PyTorch has it from 1.9 on"),
        ("mindspore@2.12", (), {**LAYER, "has_bias": True}, UnsupportedError, "MindSpore has it before 2.12"),
        ("torch", (), {**LAYER, "qproj_size": 8}, UnsupportedError, "MegEngine functional's name; in PyTorch every"),
        ("torch", (), {**LAYER, "qbias": True}, UnsupportedError, "one bias for all projections"),
        ("torch", (), {**LAYER, "attn_mask": None}, UnsupportedError, "belongs to the call"),
        ("torch", (), {**LAYER, "dropuot": 0.1}, UnsupportedError, "Did you mean dropout?"),
        ("torch", (16,), {}, ArgumentTypeError, "num_heads: given nothing"),
        ("torch", (), {}, ArgumentTypeError, "embed_dim, num_heads: given nothing"),
        ("torch", (16, 4), {"embed_dim": 16}, ArgumentTypeError, "embed_dim: given twice"),
        ("torch", tuple(range(12)), {}, ArgumentTypeError, "given 12 positional arguments; expected at most 11"),
        ("megengine", (*range(9), "name"), {}, ArgumentTypeError, "expected at most 9"),
        ("torch", (), {**LAYER, "bias": None}, ArgumentTypeError, "bias: given None"),
        ("mindspore", (), {**LAYER, "has_bias": "yes"}, ArgumentTypeError, "has_bias: given 'yes'"),
        ("megengine", (), {**LAYER, "attn_dropout": 2.0}, ArgumentError, "attn_dropout: given 2.0"),
        ("torch", (), {**LAYER, "dtype": "int8"}, ArgumentError, "dtype: given 'int8'"),
        (
            "torch@1.7",
            (),
            LAYER,
            ArgumentError,
            r"version: given torch@1.7; expected 1.8 or newer \(known: 1.8 to 2.13\)",
        ),
        ("jax", (), LAYER, ArgumentError, "dialect: given 'jax'"),
    ],
)
def test_a_wrong_call_is_refused(
    spoken: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MHASpec.from_kwargs(spoken, *args, **kwargs)


def test_a_version_may_be_given_either_way_and_may_be_newer_than_known() -> None:
    assert MHASpec.from_kwargs("mindspore", 16, 4, has_bias=False, version="2.3") == MHASpec(16, 4, bias=False)
    assert MHASpec(16, 4, bias=False).to_kwargs("mindspore", version="2.12")["bias"] is False
    assert MHASpec(16, 4, batch_first=True).to_kwargs("torch@99.1") == {**LAYER, "batch_first": True}


def test_a_version_that_was_not_looked_at_is_no_fact() -> None:
    """MindSpore 2.1 has no dtype and 2.3 has one; nobody looked at 2.2."""
    with pytest.raises(UnsupportedError, match=r"from 2\.3 on.*In MindSpore 2\.2 .*\(2\.2 has not been looked at\)"):
        MHASpec.from_kwargs("mindspore@2.2", **LAYER, dtype="float16")
    with pytest.raises(UnsupportedError, match=r"2\.2 has not been looked at"):
        MHASpec(**LAYER, dtype="float16").to_kwargs("mindspore@2.2")
    with pytest.raises(UnsupportedError) as caught:
        MHASpec.from_kwargs("mindspore@2.1", **LAYER, dtype="float16")
    assert "looked at" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoken", "version", "error", "message"),
    [
        ("torch", 1.8, ArgumentTypeError, "version: given float; expected a string"),
        ("torch", 2, ArgumentTypeError, "version: given int"),
        ("torch", "", ArgumentError, "version: given ''"),
        ("torch", "banana", ArgumentError, "version: given 'banana'"),
        ("torch@1.8.1@2", None, ArgumentError, r"version: given '1\.8\.1@2'"),
        ("torch@1.8.1", "2.0", ArgumentError, "expected one version"),
        (16, None, ArgumentTypeError, "name: given int; expected a string"),
        (None, None, ArgumentTypeError, "name: given NoneType"),
    ],
)
def test_names_and_versions_that_are_none_are_refused(
    spoken: Any, version: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MHASpec.from_kwargs(spoken, 16, 4, version=version)
    with pytest.raises(error, match=message):
        MHASpec(16, 4).to_kwargs(spoken, version=version)


@pytest.mark.parametrize("version", ["1.8.1", "1.13.0+cpu", "2.0.0rc1", "2.0.0.dev20230101+cu118", "1.8.0a0+37c1f4a"])
def test_real_versions_are_understood(version: str) -> None:
    assert mapping.parse_name(f"torch@{version}") == ("torch", version)
    assert MHASpec(16, 4).to_kwargs(f"torch@{version}") == LAYER


@pytest.mark.parametrize("spoken", ["torch@1.8.1", "megengine", "megengine.functional"])
def test_the_advice_on_the_axis_order_is_what_works(spoken: str) -> None:
    first = "megengine" not in spoken
    with pytest.raises(UnsupportedError, match=rf"replace\(batch_first={not first}\).*backend.*run, which transposes"):
        MHASpec(**LAYER, batch_first=first).to_kwargs(spoken)


def test_every_framework_has_a_dialect_of_its_own_name() -> None:
    assert set(mapping.FRAMEWORKS) | {mapping.REFERENCE} <= set(arguments.names())
