"""Layouts against the real frameworks: their names, their shapes, and what their layers compute with the weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import mhabridge as mb
from mhabridge import layouts

pytestmark = pytest.mark.frameworks

SPECS = {
    "plain": mb.MHASpec(12, 3),
    "features": mb.MHASpec(12, 3, kdim=7, vdim=5),
    "one feature": mb.MHASpec(12, 3, vdim=5),
    "no bias": mb.MHASpec(12, 3, bias=False),
    "bias_kv": mb.MHASpec(12, 3, add_bias_kv=True),
}
FIELDS = {
    "plain": {},
    "features": {"kdim": 7, "vdim": 5},
    "one feature": {"vdim": 5},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
}


def attention(weights, spec, query, key, value):
    """The formula in float64 for (N, L, E) inputs, straight from the paper, over our canonical weights."""
    w = {name: np.asarray(array, "float64") for name, array in weights.arrays().items()}

    def project(x, name):
        return x @ w[f"{name}_weight"].T + w.get(f"{name}_bias", 0.0)

    def heads(x):
        return x.reshape(*x.shape[:2], spec.num_heads, -1).swapaxes(1, 2)

    q, k, v = project(query, "q"), project(key, "k"), project(value, "v")
    if spec.add_bias_kv:
        k = np.concatenate([k, np.broadcast_to(w["bias_k"], (len(k), 1, k.shape[2]))], axis=1)
        v = np.concatenate([v, np.broadcast_to(w["bias_v"], (len(v), 1, v.shape[2]))], axis=1)
    scores = heads(q) @ heads(k).swapaxes(2, 3) * spec.score_scale
    scores = np.exp(scores - scores.max(axis=3, keepdims=True))
    context = (scores / scores.sum(axis=3, keepdims=True)) @ heads(v)
    return project(context.swapaxes(1, 2).reshape(query.shape), "out")


def inputs(spec):
    stream = np.random.RandomState(5)
    shapes = [(2, 4, spec.embed_dim), (2, 6, spec.key_features), (2, 6, spec.value_features)]
    return [stream.standard_normal(shape) for shape in shapes]


def assert_close(given, expected, tolerance):
    assert given.shape == expected.shape
    assert np.isfinite(given).all()
    worst = np.abs(given - expected).max()
    assert worst <= tolerance, f"worst difference {worst}"


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed here")


@pytest.fixture(scope="session")
def mindspore():
    return pytest.importorskip("mindspore", reason="MindSpore is not installed here")


# -- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SPECS)
def test_torch_computes_the_formula_with_weights_from_us(torch, case):
    spec = SPECS[case].replace(dtype="float64")
    weights = mb.MHAWeights.random(spec)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, **FIELDS[case])
    named = weights.to_layout("torch", spec)
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in named.items()}, strict=True)
    arrays = inputs(spec)
    output = layer(*map(torch.from_numpy, arrays))[0].detach().numpy()
    assert_close(output, attention(weights, spec, *arrays), 1e-13)


@pytest.mark.parametrize("case", SPECS)
def test_the_formula_computes_what_torch_does_with_weights_from_torch(torch, case):
    spec = SPECS[case].replace(dtype="float64")
    torch.manual_seed(3)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, **FIELDS[case])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # its biases start as zeros
    named = {name: value.numpy() for name, value in layer.state_dict().items()}
    assert layouts.spec_from_shapes("torch", {n: a.shape for n, a in named.items()}, 3, dtype="float64") == spec
    weights = mb.MHAWeights.from_layout("torch", named, spec)
    arrays = inputs(spec)
    output = layer(*map(torch.from_numpy, arrays))[0].detach().numpy()
    assert_close(output, attention(weights, spec, *arrays), 1e-13)
    back = weights.to_layout("torch", spec)
    assert {name: array.tobytes() for name, array in back.items()} == {n: a.tobytes() for n, a in named.items()}


def test_the_comparison_sees_swapped_and_turned_weights(torch):
    spec = SPECS["plain"].replace(dtype="float64")
    weights = mb.MHAWeights.random(spec)
    arrays = inputs(spec)
    right = attention(weights, spec, *arrays)
    tree = weights.to_tree()
    swapped = {**tree, "k_weight": tree["v_weight"], "v_weight": tree["k_weight"]}
    for wrong in (swapped, {**tree, "out_weight": tree["out_weight"].T}, {**tree, "k_bias": None, "v_bias": None}):
        with pytest.raises(AssertionError, match="worst difference"):
            assert_close(attention(mb.MHAWeights.from_tree(wrong), spec, *arrays), right, 1e-13)


def test_torch_bfloat16_bits_arrive(torch):
    spec = SPECS["plain"].replace(dtype="bfloat16")
    layer = torch.nn.MultiheadAttention(12, 3, dtype=torch.bfloat16)
    state = layer.state_dict()
    named = {name: value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for name, value in state.items()}
    weights = mb.MHAWeights.from_layout("torch", named, spec)
    back = weights.to_layout("torch", spec)
    for name, value in state.items():
        assert torch.equal(torch.from_numpy(back[name].view("int16")), value.view(torch.int16))
    assert np.array_equal(weights.k_weight.astype("float32"), state["in_proj_weight"][12:24].float().numpy())


def test_a_fused_linear_layer_computes_what_fused_qkv_says(torch):
    spec = SPECS["plain"].replace(dtype="float64")
    weights = mb.MHAWeights.random(spec)
    named = {name: torch.from_numpy(array) for name, array in weights.to_layout("fused-qkv", spec).items()}
    x = torch.from_numpy(inputs(spec)[0])
    qkv = torch.nn.functional.linear(x, named["qkv.weight"], named["qkv.bias"])
    q, k, v = qkv.reshape(2, 4, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 12)
    output = torch.nn.functional.linear(context, named["proj.weight"], named["proj.bias"]).numpy()
    assert_close(output, attention(weights, spec, *[x.numpy()] * 3), 1e-13)


def test_a_one_dimensional_convolution_computes_what_gpt2_says(torch):
    spec = SPECS["plain"].replace(dtype="float64")
    weights = mb.MHAWeights.random(spec)
    named = {name: torch.from_numpy(array) for name, array in weights.to_layout("gpt2", spec).items()}
    x = torch.from_numpy(inputs(spec)[0])
    fused = torch.addmm(named["c_attn.bias"], x.reshape(-1, 12), named["c_attn.weight"]).reshape(2, 4, 36)
    q, k, v = (part.reshape(2, 4, 3, 4).transpose(1, 2) for part in fused.split(12, dim=2))
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 12)
    output = torch.addmm(named["c_proj.bias"], context, named["c_proj.weight"]).reshape(2, 4, 12).numpy()
    assert_close(output, attention(weights, spec, *[x.numpy()] * 3), 1e-13)


# -- MindSpore -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SPECS)
def test_mindspore_computes_the_formula_with_weights_from_us(mindspore, case):
    spec, fields = SPECS[case], dict(FIELDS[case])
    if "bias" in fields:
        fields["has_bias"] = fields.pop("bias")
    weights = mb.MHAWeights.random(spec)
    layer = mindspore.nn.MultiheadAttention(12, 3, batch_first=True, **fields)
    layer.set_train(False)
    named = weights.to_layout("mindspore", spec)
    theirs = {name: tuple(value.shape) for name, value in layer.parameters_dict().items()}
    assert theirs == {name: array.shape for name, array in named.items()}
    parameters = {name: mindspore.Parameter(array, name=name) for name, array in named.items()}
    assert mindspore.load_param_into_net(layer, parameters, strict_load=True) == ([], [])
    arrays = [array.astype("float32") for array in inputs(spec)]
    output = layer(*map(mindspore.Tensor, arrays))[0].asnumpy()
    assert_close(output, attention(weights, spec, *arrays), 1e-5)
    read = {name: value.asnumpy() for name, value in layer.parameters_dict().items()}
    assert mb.MHAWeights.from_layout("mindspore", read, spec) == weights


def test_mindspores_own_bfloat16_becomes_the_public_one(mindspore):
    values = mindspore.Tensor(np.array([[1.5, -2.0]], "float32"), mindspore.bfloat16).asnumpy()
    weights = mb.MHAWeights(q_weight=values)
    assert weights.q_weight.dtype == ml_dtypes.bfloat16
    assert weights == mb.MHAWeights(q_weight=np.array([[1.5, -2.0]], ml_dtypes.bfloat16))
