"""Layouts: exact both ways, nothing lost, nothing made to fit, and what is no plain attention refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhabridge as mb
from mhabridge import dtypes, layouts, mapping, packing, rearrange

LAYOUTS = (*layouts.names(), "torch@1.8.1", "mindspore@2.0")
PROJECTIONS = ("q_proj_size", "k_proj_size", "v_proj_size", "out_proj_size")


def counted(spec):
    """Weights of a spec whose numbers are all different and non-zero, so that no misplaced one goes unseen."""
    arrays, start = {}, 1
    for name, shape in spec.parameter_shapes().items():
        size = int(np.prod(shape))
        arrays[name] = np.arange(start, start + size, dtype="float64").reshape(shape)
        start += size
    return mb.MHAWeights(**arrays).astype(spec.dtype)


def random_bits(spec, seed):
    """Weights of any bits at all: NaN payloads, infinities, minus zero and subnormal numbers among them."""
    stream = np.random.RandomState(seed)
    dtype = dtypes.numpy_dtype(spec.dtype)
    arrays = {}
    for name, shape in spec.parameter_shapes().items():
        raw = stream.bytes(int(np.prod(shape)) * dtype.itemsize)
        arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
    return mb.MHAWeights(**arrays)


@st.composite
def specs(draw, exotic=True):
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 3))
    size = st.none() if draw(st.booleans()) else st.integers(1, 7)
    fields = {name: draw(st.booleans()) for name in ("q_bias", "k_bias", "v_bias", "out_bias")}
    fields.update(kdim=draw(size), vdim=draw(size), dtype=draw(st.sampled_from(dtypes.FLOATS)))
    if exotic and draw(st.booleans()):
        fields["add_bias_kv"] = draw(st.booleans())
        missing = draw(st.sets(st.sampled_from(("v_proj_size", "out_proj_size"))))
        fields.update(dict.fromkeys(missing, 0))
        fields.update({name.replace("proj_size", "bias"): False for name in missing})
    return mb.MHASpec(width, heads, **fields)


def holds(layout, spec):
    """What each layout can hold, said without its table."""
    everything = all(getattr(spec, name) is None for name in PROJECTIONS)
    same_features = spec.kdim is None and spec.vdim is None
    if layout == "canonical":
        return True
    if layout == "megengine.functional":
        return not spec.add_bias_kv
    if layout.startswith(("torch", "mindspore")) or layout == "megengine-dropin":
        return everything
    if layout in ("fused-qkv", "gpt2"):
        return everything and same_features and not spec.add_bias_kv
    return everything and not spec.add_bias_kv and not (layout == "whisper" and spec.k_bias)


# -- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**31))
def test_there_and_back_is_exact(layout, spec, seed):
    weights = random_bits(spec, seed)
    if not holds(layout, spec):
        with pytest.raises(mb.UnsupportedError):
            weights.to_layout(layout, spec)
        return
    named = weights.to_layout(layout, spec, prefix="block.0")
    assert mb.MHAWeights.from_layout(layout, named, spec, prefix="block.0") == weights
    assert {name: array.shape for name, array in packing.below("block.0", named).items()} == layouts.find(
        layout
    ).shapes(spec)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(spec=specs())
def test_every_number_is_used_once_and_the_rest_is_said_to_be_zero(layout, spec):
    if not holds(layout, spec):
        return
    spec = spec.replace(dtype="float64")
    weights, notes = counted(spec), []
    named = weights.to_layout(layout, spec, notes=notes)
    there = np.sort(np.concatenate([array.ravel() for array in named.values()]))
    mine = np.concatenate([array.ravel() for array in weights.arrays().values()])
    zeros = sum(int(np.prod(shape)) for shape in layouts.find(layout).filled(spec).values())
    assert np.array_equal(there, np.concatenate([np.zeros(zeros), np.sort(mine)]))
    assert len(notes) == len(layouts.find(layout).filled(spec))


@settings(max_examples=40, deadline=None)
@given(spec=specs(exotic=False))
def test_what_was_written_is_recognised(spec):
    for layout in LAYOUTS:
        if not holds(layout, spec):
            continue
        shapes = layouts.find(layout).shapes(spec)
        found = layouts.recognise({f"a.{name}": shape for name, shape in shapes.items()}, "a")
        if "io_weight_bias" in shapes:
            assert found.layout == "megengine"
            continue
        again = layouts.spec_from_shapes(found.layout, shapes, spec.num_heads, dtype=spec.dtype)
        biases = {
            f"{name}_bias": True
            for name in ("q", "k", "v", "out")
            if f"{name}_bias" in layouts.find(layout).filled(spec)
        }
        assert again == spec.replace(**biases)


# -- what the numbers must be ----------------------------------------------------------------------------------------


def assert_same(given, expected):
    """The comparator of the golden tests: names, shapes, dtypes and bits."""
    assert given.keys() == expected.keys()
    for name, array in expected.items():
        assert given[name].shape == array.shape, name
        assert given[name].dtype == array.dtype, name
        assert given[name].tobytes() == array.tobytes(), name


def golden(layout, weights):
    """The layouts' tensors, written out by hand."""
    w = weights
    q, k, v, o = w.q_weight, w.k_weight, w.v_weight, w.out_weight
    fused_bias = np.concatenate([w.q_bias, w.k_bias, w.v_bias])
    vector = [array.T.ravel() for array in (q, k, v, o)] + [w.q_bias, w.k_bias, w.v_bias, w.out_bias]
    return {
        "torch": {
            "in_proj_weight": np.concatenate([q, k, v]),
            "in_proj_bias": fused_bias,
            "out_proj.weight": o,
            "out_proj.bias": w.out_bias,
        },
        "megengine": {"io_weight_bias": np.concatenate(vector)[None]},
        "fused-qkv": {
            "qkv.weight": np.concatenate([q, k, v]),
            "qkv.bias": fused_bias,
            "proj.weight": o,
            "proj.bias": w.out_bias,
        },
        "gpt2": {
            "c_attn.weight": np.concatenate([q.T, k.T, v.T], axis=1),
            "c_attn.bias": fused_bias,
            "c_proj.weight": o.T,
            "c_proj.bias": w.out_bias,
        },
    }[layout]


@pytest.mark.parametrize("layout", ["torch", "megengine", "fused-qkv", "gpt2"])
@pytest.mark.parametrize("dtype", dtypes.FLOATS)
def test_golden(layout, dtype):
    spec = mb.MHASpec(6, 2, dtype=dtype)
    weights = mb.MHAWeights.random(spec)
    assert_same(weights.to_layout(layout, spec), golden(layout, weights))


@pytest.mark.parametrize("layout", ["megengine", "gpt2"])
def test_golden_sees_a_transpose_that_only_reshapes(layout, monkeypatch):
    """The mutation keeps every size and every round trip, and still must not pass."""
    only_reshape = dataclasses.replace(
        rearrange.STEPS["transpose"],
        forward=lambda arrays: [array.reshape(array.shape[::-1]) for array in arrays],
        inverse=lambda arrays, shapes: [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)],
    )
    monkeypatch.setitem(rearrange.STEPS, "transpose", only_reshape)
    spec = mb.MHASpec(6, 2)
    weights = mb.MHAWeights.random(spec)
    named = weights.to_layout(layout, spec)
    assert mb.MHAWeights.from_layout(layout, named, spec) == weights
    with pytest.raises(AssertionError):
        assert_same(named, golden(layout, weights))


def test_megengine_with_other_features_and_subsets():
    spec = mb.MHASpec(4, 2, kdim=3, vdim=5, q_bias=False, out_proj_size=0)
    w = mb.MHAWeights.random(spec)
    expected = np.concatenate([w.q_weight.T.ravel(), w.k_weight.T.ravel(), w.v_weight.T.ravel(), w.k_bias, w.v_bias])
    assert_same(w.to_layout("megengine.functional", spec), {"io_weight_bias": expected[None]})


@pytest.mark.parametrize("layout", ["hf-bert", "hf-bart", "hf-distilbert", "hf-vit"])
def test_separate_layouts_keep_each_matrix(layout):
    spec = mb.MHASpec(6, 2)
    weights = counted(spec)
    named = weights.to_layout(layout, spec, prefix="x")
    assert len(named) == 8
    for tensor in layouts.find(layout).tensors:
        assert np.array_equal(named[f"x.{tensor.name}"], getattr(weights, tensor.parts[0]))


# -- biases that a layout cannot leave out ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torch", "mindspore", "megengine", "hf-bert", "fused-qkv", "gpt2", "hf-bart"])
def test_a_missing_key_bias_is_written_as_zeros_and_said(layout):
    spec, notes = mb.MHASpec(4, 2, k_bias=False), []
    weights = counted(spec)
    named = weights.to_layout(layout, spec, notes=notes)
    assert notes == [f"{layout}: wrote k_bias as zeros; it cannot be left out there."]
    again = mb.MHAWeights.from_layout(layout, named, spec.replace(k_bias=True))
    assert np.array_equal(again.k_bias, np.zeros(4))
    assert again.v_bias.tobytes() == weights.v_bias.tobytes()


@pytest.mark.parametrize("layout", ["torch", "megengine", "hf-bert", "gpt2"])
def test_a_bias_that_the_spec_does_not_have_must_be_zero(layout):
    spec, notes = mb.MHASpec(4, 2), []
    weights = counted(spec)
    bare = spec.replace(k_bias=False)
    with pytest.raises(mb.WeightsError, match=r"values other than zero for k_bias.*k_bias=True"):
        mb.MHAWeights.from_layout(layout, weights.to_layout(layout, spec), bare)
    zeroed = dataclasses.replace(weights, k_bias=np.zeros(4, "float32"))
    read = mb.MHAWeights.from_layout(layout, zeroed.to_layout(layout, spec), bare, notes=notes)
    assert read == dataclasses.replace(weights, k_bias=None)
    assert len(notes) == 1
    assert "k_bias is all zeros and was left out" in notes[0]


def test_nan_is_not_zero():
    spec = mb.MHASpec(4, 2)
    weights = dataclasses.replace(counted(spec), k_bias=np.full(4, np.nan, "float32"))
    with pytest.raises(mb.WeightsError, match="values other than zero"):
        mb.MHAWeights.from_layout("torch", weights.to_layout("torch", spec), spec.replace(k_bias=False))


def test_torch_before_1_9_keeps_the_output_bias():
    spec = mb.MHASpec(4, 2, bias=False)
    weights, notes = counted(spec), []
    old = weights.to_layout("torch@1.8.1", spec, notes=notes)
    assert sorted(old) == ["in_proj_weight", "out_proj.bias", "out_proj.weight"]
    assert notes == ["torch@1.8.1: wrote out_bias as zeros; it cannot be left out there."]
    assert mb.MHAWeights.from_layout("torch@1.8.1", old, spec) == weights
    with pytest.raises(mb.WeightsError, match=r"out_proj.bias: given a tensor .*out_bias=True"):
        mb.MHAWeights.from_layout("torch", old, spec)
    old["out_proj.bias"][2] = 1.0
    with pytest.raises(mb.WeightsError, match=r"out_proj.bias: given values other than zero.*out_bias=True"):
        mb.MHAWeights.from_layout("torch@1.8.1", old, spec)
    assert mb.MHAWeights.from_layout("torch@1.8.1", old, spec.replace(out_bias=True)).out_bias[2] == 1.0


@pytest.mark.parametrize("name", ["torch", "torch@1.5", "torch@1.9.0", "torch@2.13.0+cpu"])
def test_other_versions_of_torch_have_one_flag(name):
    assert "out_proj.bias" not in layouts.find(name).shapes(mb.MHASpec(4, 2, bias=False))


# -- nothing is lost, nothing is made to fit -------------------------------------------------------------------------


def broken(change):
    """Tensors of PyTorch for kdim=6, one of them changed."""
    spec = mb.MHASpec(8, 2, kdim=6)
    named = mb.MHAWeights.random(spec).to_layout("torch", spec, prefix="attn")
    change(named)
    return spec, named


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda named: named.update({"attn.k_proj_weight": named["attn.k_proj_weight"].T}),
            r"attn.k_proj_weight: given shape \(6, 8\); expected shape \(8, 6\).*other way round",
        ),
        (
            lambda named: named.update({"attn.k_proj_weight": named["attn.k_proj_weight"].reshape(-1)}),
            r"attn.k_proj_weight: given shape \(48,\); expected shape \(8, 6\).*reshaped",
        ),
        (
            lambda named: named.update({"attn.in_proj_bias": named["attn.in_proj_bias"][:16]}),
            r"attn.in_proj_bias: given shape \(16,\); expected shape \(24,\)",
        ),
        (
            lambda named: named.pop("attn.out_proj.bias"),
            r"attn.out_proj.bias: given no such tensor; expected one of shape \(8,\)",
        ),
        (
            lambda named: named.update({"attn.in_proj_weight": np.zeros((24, 8), "float32")}),
            r"attn.in_proj_weight: given a tensor of shape \(24, 8\) that a layer of this spec does not have",
        ),
        (
            lambda named: named.update({"attn.lora.weight": np.zeros(3, "float32")}),
            r"attn.lora.weight: given a tensor of shape \(3,\).*would be lost",
        ),
        (
            lambda named: named.update({"attn.out_proj.bias": named["attn.out_proj.bias"].astype("float16")}),
            r"out_bias float16.*expected one dtype",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_path(change, message):
    spec, named = broken(change)
    with pytest.raises(mb.WeightsError, match=message):
        mb.MHAWeights.from_layout("torch", named, spec, prefix="attn")


def test_the_unbroken_ones_pass_and_other_prefixes_are_not_touched():
    spec, named = broken(lambda named: named.update({"attn2.out_proj.bias": np.zeros(1), "norm": np.zeros(2)}))
    assert mb.MHAWeights.from_layout("torch", named, spec, prefix="attn") == mb.MHAWeights.random(spec)
    assert mb.MHAWeights.from_layout("torch", named, spec, prefix="attn.") == mb.MHAWeights.random(spec)


def test_a_flat_vector_is_not_given_an_axis():
    with pytest.raises(mb.WeightsError, match=r"io_weight_bias: given shape \(288,\); expected shape \(1, 288\)"):
        mb.MHAWeights.from_layout("megengine", {"io_weight_bias": np.zeros(288, "float32")}, mb.MHASpec(8, 2))


def test_names_beside_the_layer_are_left_alone():
    spec = mb.MHASpec(4, 2)
    weights = counted(spec)
    named = {**weights.to_layout("gpt2", spec), "bias": np.zeros((1, 1, 5, 5)), "masked_bias": np.zeros(())}
    notes = []
    assert mb.MHAWeights.from_layout("gpt2", named, spec, notes=notes) == weights
    said = "bias, masked_bias: left out, since they lie beside the attention and are no part of it."
    assert notes == [said]
    assert layouts.recognise({name: array.shape for name, array in named.items()}).notes == (said,)


@pytest.mark.parametrize(
    ("layout", "fields", "subject"),
    [
        ("megengine", {"add_bias_kv": True}, "bias_k, bias_v"),
        ("torch", {"out_proj_size": 0}, "out_proj_size"),
        ("torch", {"v_proj_size": 4}, "v_proj_size"),
        ("gpt2", {"kdim": 6}, "kdim"),
        ("fused-qkv", {"v_proj_size": 4}, "v_proj_size"),
        ("whisper", {}, "k_bias"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_with_those_that_can(layout, fields, subject):
    spec = mb.MHASpec(8, 2, **fields)
    with pytest.raises(mb.UnsupportedError) as caught:
        mb.MHAWeights.random(spec).to_layout(layout, spec)
    assert caught.value.subject == subject
    offered = caught.value.advice.split(": ")[1].rstrip(".").split(", ")
    assert "canonical" in offered
    for other in offered:
        assert mb.MHAWeights.random(spec).to_layout(other, spec)


def test_unknown_layouts_and_values_that_are_no_arrays():
    spec = mb.MHASpec(4, 2)
    with pytest.raises(mb.ArgumentError, match=r"Did you mean torch\?"):
        mb.MHAWeights.random(spec).to_layout("tocrh", spec)
    named = {**mb.MHAWeights.random(spec).to_layout("torch", spec), "in_proj_bias": [0.0] * 12}
    with pytest.raises(mb.ArgumentTypeError, match="in_proj_bias: given list"):
        mb.MHAWeights.from_layout("torch", named, spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch@0.4", "given torch@0.4; expected torch@1.5 or newer"),
        ("mindspore@0.1", "given mindspore@0.1; expected mindspore@2.0 or newer"),
        ("megengine.functional@1.12", "expected megengine.functional@1.13 or newer"),
        ("hf-bert@99", "given hf-bert@99; expected hf-bert, which has no versions"),
        ("gpt2@banana", "given 'banana'; expected numbers with dots"),
        ("torch@1.8.1@2", "given '1.8.1@2'; expected numbers with dots"),
        ("torch@", "expected a name, or name@version"),
    ],
)
def test_versions_that_a_layout_does_not_have_are_refused(name, message):
    spec = mb.MHASpec(4, 2)
    with pytest.raises(mb.ArgumentError, match=message):
        mb.MHAWeights.random(spec).to_layout(name, spec)


def test_arguments_of_the_wrong_kind_are_our_errors():
    spec = mb.MHASpec(4, 2)
    weights = mb.MHAWeights.random(spec)
    named = weights.to_layout("torch", spec)
    for call, message in [
        (lambda: mb.MHAWeights.from_layout(named, "torch", spec), "name: given dict; expected a string"),
        (lambda: mb.MHAWeights.from_layout("torch", [1], spec), "named: given list; expected a mapping"),
        (lambda: mb.MHAWeights.from_layout("torch", None, spec), "named: given NoneType"),
        (lambda: mb.MHAWeights.from_layout("torch", {1: named}, spec), "names that are no strings"),
        (lambda: mb.MHAWeights.from_layout("torch", named, None), "spec: given NoneType"),
        (lambda: weights.to_layout(spec, "torch"), "name: given MHASpec; expected a string"),
        (lambda: weights.to_layout("torch", {"embed_dim": 4}), "spec: given dict"),
        (lambda: mb.MHAWeights.random(8), "spec: given int"),
    ]:
        with pytest.raises(mb.ArgumentTypeError, match=message):
            call()


def test_a_masked_array_does_not_lose_its_mask():
    spec = mb.MHASpec(4, 2)
    named = mb.MHAWeights.random(spec).to_layout("torch", spec, prefix="a")
    named["a.out_proj.weight"] = np.ma.masked_array(named["a.out_proj.weight"], mask=True)
    with pytest.raises(mb.ArgumentTypeError, match=r"a\.out_proj\.weight: given a masked array"):
        mb.MHAWeights.from_layout("torch", named, spec, prefix="a")
    with pytest.raises(mb.ArgumentTypeError, match="q_weight: given a masked array"):
        mb.MHAWeights(q_weight=named["a.out_proj.weight"])


# -- recognition -----------------------------------------------------------------------------------------------------

GROUPED = "grouped-query or multi-query attention: 8 rows for queries and 2 for keys"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q_proj.weight": (8, 8), "k_proj.weight": (2, 8), "v_proj.weight": (2, 8), "o_proj.weight": (8, 8)}, GROUPED),
        (
            {"q_proj.weight": (8, 8), "k_proj.weight": (2, 8), "v_proj.weight": (2, 8), "out_proj.weight": (8, 8)},
            GROUPED,
        ),
        ({"qkv.weight": (12, 8), "proj.weight": (8, 8)}, GROUPED),
        ({"c_attn.weight": (8, 12), "c_proj.weight": (8, 8)}, GROUPED),
        ({"c_attn.weight": (12, 8), "c_proj.weight": (8, 8)}, GROUPED),
        ({"in_proj_weight": (12, 8), "out_proj.weight": (8, 8)}, GROUPED),
        ({"query_key_value.weight": (24, 8), "dense.weight": (8, 8)}, "head-interleaved fused qkv"),
        ({"query_key_value.weight": (12, 8), "query_key_value.bias": (12,)}, "head-interleaved fused qkv"),
        ({"Wqkv.weight": (24, 8), "out_proj.weight": (8, 8)}, "fused Wqkv"),
        ({"qkv_proj.weight": (24, 8), "o_proj.weight": (8, 8)}, "fused qkv_proj"),
        (
            {"q_proj.weight": (8, 8), "k_proj.weight": (8, 8), "v_proj.weight": (8, 8), "o_proj.weight": (8, 8)},
            "rotary",
        ),
    ],
)
def test_what_is_no_plain_attention_is_refused_by_name(shapes, message):
    with pytest.raises(mb.UnsupportedError, match=message):
        layouts.recognise({f"h.1.{name}": shape for name, shape in shapes.items()}, "h.1")


def test_refused_layouts_are_not_offered_and_not_written():
    spec = mb.MHASpec(8, 2)
    assert "llama" not in layouts.names()
    with pytest.raises(mb.UnsupportedError, match="rotary"):
        mb.MHAWeights.random(spec).to_layout("llama", spec)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"qkv.weight": (24, 8), "proj.weight": (8, 8), "q_norm.weight": (4,)}, "q_norm.weight: given 1 tensors among"),
        (
            {"qkv.weight": (25, 8), "proj.weight": (8, 8)},
            r"qkv.weight: given shape \(25, 8\); expected shape \(24, 8\)",
        ),
        ({"qkv.weight": (8, 24), "proj.weight": (8, 8)}, "qkv.weight: .*other way round"),
        ({"c_attn.weight": (24, 8), "c_proj.weight": (8, 8)}, "c_attn.weight: .*other way round"),
        ({"qkv.weight": (24,), "proj.weight": (8, 8)}, r"qkv.weight: given shape \(24,\); expected a matrix"),
        ({"in_proj_weight": (24, 10), "out_proj.weight": (8, 8)}, r"in_proj_weight: given shape \(24, 10\)"),
        ({"io_weight_bias": (288,)}, r"io_weight_bias: given shape \(288,\); expected shape \(1, n\)"),
        ({"x.qkv.weight": (24, 8), "x.proj.weight": (8, 8)}, "Give the prefix of one layer: x"),
        ({"unknown.weight": (8, 8)}, "unknown.weight; expected the tensors of a layout"),
        ({}, "no tensor with this prefix"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, message):
    with pytest.raises(mb.WeightsError, match=message):
        layouts.recognise(shapes)


def test_the_key_bias_tells_whisper_from_bart():
    spec = mb.MHASpec(8, 2)
    shapes = layouts.find("hf-bart").shapes(spec)
    assert layouts.recognise(shapes).layout == "hf-bart"
    del shapes["k_proj.bias"]
    found = layouts.recognise(shapes)
    assert (found.layout, found.facts["k_bias"], found.facts["q_bias"]) == ("whisper", False, True)


def test_a_vector_of_usual_sizes_is_read_and_said():
    found = layouts.recognise({"a.io_weight_bias": (1, 288)}, "a", **USUAL)
    assert found.facts == {"embed_dim": 8, "bias": True, **USUAL}
    assert found.notes == (
        "a.io_weight_bias: 288 numbers, read in the layout megengine as embed_dim=8, bias=True "
        "for the given kdim=None, vdim=None. megengine.functional packs other layers under the same name.",
    )
    assert layouts.recognise({"io_weight_bias": (1, 256)}, **USUAL).facts == {"embed_dim": 8, "bias": False, **USUAL}


USUAL = {"kdim": None, "vdim": None}


@pytest.mark.parametrize("known", [{}, {"embed_dim": 4}, {"embed_dim": 4, "bias": True}, {"embed_dim": 4, "kdim": 6}])
def test_a_vector_with_several_readings_is_refused_with_them_listed(known):
    """80 numbers: kdim=4 and vdim=4, kdim=6 and vdim=2, ..., or no biases and kdim + vdim = 12."""
    shapes = layouts.find("megengine").shapes(mb.MHASpec(4, 2, kdim=6, vdim=2))
    assert shapes == {"io_weight_bias": (1, 80)}
    found = layouts.recognise(shapes, **known)
    assert found.facts == {}
    listed = (
        "kdim=6, vdim=2, bias=True; or .*bias=False" if "kdim" in known else "bias=True, kdim . vdim = 8 .usual: 4 each"
    )
    with pytest.raises(mb.ArgumentError, match=f"io_weight_bias with 80 numbers.*embed_dim=4, {listed}"):
        layouts.spec_from_shapes("megengine", shapes, 2, **known)
    assert "80 numbers" in found.notes[0]


@settings(max_examples=200, deadline=None)
@given(spec=specs(exotic=False), given_fields=st.sets(st.sampled_from(("embed_dim", "kdim", "vdim", "bias"))))
def test_a_vector_is_read_rightly_or_not_at_all(spec, given_fields):
    spec = spec.replace(bias=spec.q_bias, dtype="float32")
    shapes, notes = layouts.find("megengine").shapes(spec), []
    known = {name: getattr(spec, name) for name in given_fields}
    if not layouts.recognise(shapes, num_heads=spec.num_heads, **known).facts:
        with pytest.raises(mb.ArgumentError, match=f"could be .*embed_dim={spec.embed_dim}|more"):
            layouts.spec_from_shapes("megengine", shapes, spec.num_heads, **known)
        return
    read = layouts.spec_from_shapes("megengine", shapes, spec.num_heads, notes=notes, **known)
    assert read == spec
    assert len(notes) == 1
    for name in {"embed_dim", "bias"} - given_fields:
        assert f"{name}={getattr(spec, name)}" in notes[0].split(" for the given ")[0]


def test_facts_that_leave_one_reading_are_enough():
    spec = mb.MHASpec(4, 2, kdim=6, vdim=2)
    shapes, notes = layouts.find("megengine").shapes(spec), []
    known = {"embed_dim": 4, "kdim": 6, "bias": True}
    assert layouts.spec_from_shapes("megengine", shapes, 2, notes=notes, **known) == spec
    assert "as vdim=2 for the given embed_dim=4, kdim=6, bias=True" in notes[0]
    notes.clear()
    assert layouts.spec_from_shapes("megengine", shapes, 2, notes=notes, vdim=2, **known) == spec
    assert "all of it given" in notes[0]
    with pytest.raises(mb.ArgumentError, match="no layer of that"):
        layouts.spec_from_shapes("megengine", shapes, 2, embed_dim=4, kdim=6, vdim=5)
    assert layouts.recognise(shapes, embed_dim=4, kdim=6, vdim=5).facts == {}


def test_the_functions_vector_is_recognised_by_what_only_it_can_hold():
    sizes = {"q_proj_size": 2, "k_proj_size": 2, "v_proj_size": 6, "out_proj_size": None}
    spec = mb.MHASpec(4, 2, bias=False, **sizes)
    shapes, notes = layouts.find("megengine.functional").shapes(spec), []
    assert shapes == {"io_weight_bias": (1, 64)}  # as long as the module's with embed_dim=4 and no biases
    known = {"embed_dim": 4, "bias": False, **USUAL, **sizes}
    assert layouts.recognise(shapes).facts == {}
    assert "megengine.functional" in layouts.recognise(shapes, **USUAL).notes[0]
    assert layouts.recognise(shapes, **known).layout == "megengine.functional"
    assert layouts.spec_from_shapes("megengine.functional", shapes, 2, notes=notes, **known) == spec
    with pytest.raises(mb.ArgumentError, match="any out_proj_size"):
        layouts.spec_from_shapes("megengine.functional", shapes, 2, **{k: v for k, v in known.items() if k[0] != "o"})
    assert layouts.recognise({"io_weight_bias": (1, 3)}).layout == "megengine.functional"


def test_what_is_known_has_to_be_a_field():
    for call in (layouts.recognise, lambda shapes, **known: layouts.spec_from_shapes("torch", shapes, 2, **known)):
        with pytest.raises(mb.ArgumentTypeError, match="foo: given no field of MHASpec"):
            call(layouts.find("torch").shapes(mb.MHASpec(8, 2)), foo=1)


def test_a_vector_with_everything_given():
    spec = mb.MHASpec(4, 2, kdim=6, vdim=6)
    shapes = layouts.find("megengine").shapes(spec)
    assert layouts.spec_from_shapes("megengine", shapes, 2, embed_dim=4, kdim=6, vdim=6) == spec
    with pytest.raises(mb.ArgumentError, match="bias=False"):
        layouts.spec_from_shapes("megengine", shapes, 2, embed_dim=4, kdim=6, vdim=6, bias=False)


def test_the_number_of_heads_has_to_fit():
    with pytest.raises(mb.ArgumentError, match="a multiple of num_heads"):
        layouts.spec_from_shapes("torch", layouts.find("torch").shapes(mb.MHASpec(8, 2)), 3)


def test_prefixes_finds_every_block():
    spec = mb.MHASpec(4, 2)
    shapes = {
        **{f"enc.0.self_attn.{name}": shape for name, shape in layouts.find("torch").shapes(spec).items()},
        **{f"enc.1.attn.{name}": shape for name, shape in layouts.find("gpt2").shapes(spec).items()},
        "enc.1.mlp.c_proj.weight": (4, 4),
        "norm.weight": (4,),
    }
    assert layouts.prefixes(shapes) == ["enc.0.self_attn", "enc.1.attn"]
    assert layouts.prefixes(layouts.find("torch").shapes(spec.replace(kdim=3))) == [""]


# -- the tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", packing.every(), ids=lambda layout: layout.name)
def test_tables_use_known_words_only(layout):
    parameters = {field.name for field in dataclasses.fields(mb.MHAWeights)}
    for tensor in layout.tensors:
        assert set(tensor.parts) <= parameters
        assert set(tensor.steps) <= set(rearrange.STEPS)
        assert tensor.when in packing.CONDITIONS
    for when in {tensor.when for tensor in layout.tensors} | {""}:
        parts = [part for tensor in layout.tensors if tensor.when in ("", when) for part in tensor.parts]
        assert len(parts) == len(set(parts)), "a parameter is written twice"
    assert set(layout.needs) <= set(packing.NEEDS)
    assert set(layout.always).union(*layout.tied) <= parameters
    assert layout.title


def test_tables_have_no_unknown_keys_and_no_name_twice():
    known = {field.name for field in dataclasses.fields(packing.Layout)} - {"name"} | {"versions"}
    seen = [
        (name, entry) for owner in mapping.names() for name, entry in mapping.table(owner).get("layouts", {}).items()
    ]
    assert len(seen) == len({name for name, _ in seen})
    for _, entry in seen:
        assert set(entry) <= known
        assert all(set(tensor) <= {"name", "parts", "steps", "when"} for tensor in entry["tensors"])
        assert all(set(change) <= known | {"since", "until"} for change in entry.get("versions", []))


@pytest.mark.parametrize("name", rearrange.STEPS)
def test_each_step_has_its_inverse(name):
    shapes = [(4,)] if name.startswith("as ") else [(4, 3), (4, 3)]
    parts = [np.arange(np.prod(shape)).reshape(shape) + 100 * i for i, shape in enumerate(shapes)]
    step = rearrange.STEPS[name]
    forward = step.forward(parts)
    assert [array.shape for array in forward] == step.shapes(shapes)
    back = step.inverse(forward, shapes)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(back, parts, strict=True))
