"""MindSpore's drop-in layer and ``mb.attend`` on live cells: PyNative, ``ms.jit`` and graph mode give one answer."""

from __future__ import annotations

import copy
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests.cases import MASKS, L, N, S, masks_of, material, output_shape, reference_answer, spec_of

ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")

from mhabridge.adapters.mindspore import MultiheadAttention  # noqa: E402  (needs MindSpore)

pytestmark = pytest.mark.frameworks

LAYERS = (
    "plain",
    "batch first",
    "no bias",
    "kdim and vdim",
    "only vdim",
    "one head",
    "bias_kv",
    "zero_attn",
    "bias_kv and zero_attn",
)
FORMS = ("pynative", "jit", "graph mode")


@pytest.fixture(autouse=True)
def eager(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyNative, without waiting threads; and a folder for what a failed compilation leaves behind."""
    monkeypatch.chdir(tmp_path)
    if hasattr(ms, "runtime"):
        ms.runtime.launch_blocking()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


class Caller(ms.nn.Cell):  # type: ignore[misc, name-defined]
    """A larger cell around the layer; flags are its attributes."""

    def __init__(self, layer: Any, **flags: bool) -> None:
        super().__init__()
        self.layer = layer
        self.need_weights = flags.get("need_weights", True)
        self.average = flags.get("average_attn_weights", True)
        self.is_causal = flags.get("is_causal", False)

    def construct(self, query: Any, key: Any, value: Any, padding: Any, mask: Any) -> Any:
        return self.layer(
            query,
            key,
            value,
            key_padding_mask=padding,
            need_weights=self.need_weights,
            attn_mask=mask,
            average_attn_weights=self.average,
            is_causal=self.is_causal,
        )


def callable_of(cell: Any, form: str) -> Any:
    """The cell as each form calls it."""
    if form == "graph mode":
        ms.set_context(mode=ms.GRAPH_MODE)
    if form != "jit":
        return cell

    @ms.jit  # type: ignore[untyped-decorator]
    def compiled(query: Any, key: Any, value: Any, padding: Any, mask: Any) -> Any:
        return cell(query, key, value, padding, mask)

    return compiled


def layer_of(spec: mb.MHASpec, weights: mb.MHAWeights) -> MultiheadAttention:
    """The drop-in, in evaluation, with these weights loaded as a checkpoint would be."""
    layer = MultiheadAttention(
        spec.embed_dim,
        spec.num_heads,
        spec.dropout,
        bool(spec.bias),
        spec.add_bias_kv,
        spec.add_zero_attn,
        spec.kdim,
        spec.vdim,
        spec.batch_first,
        dtype=spec.dtype,
    )
    arrays = weights.to_layout("mindspore", spec)
    lacking = ms.load_param_into_net(layer, {k: ms.Parameter(ms.Tensor(v), name=k) for k, v in arrays.items()})
    assert not any(lacking)
    return layer.set_train(False)


def tensor(array: Any) -> Any:
    return None if array is None else ms.Tensor(np.array(array, order="C"))


def answer(form: str, layer: Any, arrays: Any, call: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of the answer by the judge's names; gradients when the call has seeds for them."""
    call = dict(call)
    seeds = [call.pop(name, None) for name in ("grad_output", "grad_attn_weights")]
    masks = [call.pop(name, None) for name in ("key_padding_mask", "attn_mask")]
    run = callable_of(Caller(layer, **call), form)
    inputs = [tensor(array) for array in (*arrays, *masks)]
    output, attention = run(*inputs)
    found = {"output": output.asnumpy()}
    if attention is not None:
        found["attn_weights"] = attention.asnumpy()
    if any(seed is not None for seed in seeds):
        found.update(gradients(run, layer, inputs, [tensor(seed) for seed in seeds]))
    return found


def gradients(run: Any, layer: Any, inputs: list[Any], seeds: list[Any]) -> dict[str, np.ndarray]:
    def loss(query: Any, key: Any, value: Any, padding: Any, mask: Any) -> Any:
        output, attention = run(query, key, value, padding, mask)
        total = (output * 0.0).sum() if seeds[0] is None else (output * seeds[0]).sum()
        return total if seeds[1] is None else total + (attention * seeds[1]).sum()

    names = ("query", "key", "value", "key_padding_mask", "attn_mask")
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.dtype in (ms.float16, ms.float32, ms.float64)]
    parameters = list(layer.trainable_params())
    of_inputs, of_parameters = ms.grad(loss, tuple(wanted), ms.ParameterTuple(parameters))(*inputs)
    found = {names[i]: grad.asnumpy() for i, grad in zip(wanted, of_inputs, strict=True)}
    spec, _ = mb.extract(layer)
    packed = {p.name.rpartition("layer.")[2]: g.asnumpy() for p, g in zip(parameters, of_parameters, strict=True)}
    found.update(mb.MHAWeights.from_layout("mindspore", packed, spec).arrays())
    return {f"grads.{name}": grad for name, grad in found.items()}


def hold(found: dict[str, np.ndarray], spec: mb.MHASpec, weights: Any, arrays: Any, **call: Any) -> None:
    """Judge every tensor of an answer against the float64 reference."""
    prepared, exact = reference_answer(spec, weights, arrays, **call)
    limits = bounds(prepared, weights, named(exact), accuracy("mindspore", spec.dtype))
    assert set(found) == set(named(exact))
    for name, array in named(exact).items():
        distance = judge(found[name], array, limits[name])
        assert distance.ok, f"{name}: {distance}"


def check(form: str, spec: mb.MHASpec, **call: Any) -> None:
    weights, arrays = material(spec)
    hold(answer(form, layer_of(spec, weights), arrays, call), spec, weights, arrays, **call)


def float_masks(heads: int) -> dict[str, Any]:
    """Both masks float32, so that both have gradients, and the causal one."""
    padding = masks_of("padding float and attn bool")["key_padding_mask"]
    return {"key_padding_mask": padding, "is_causal": True, **masks_of("attn per head float", heads)}


def seeds_of(spec: mb.MHASpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    columns = S + spec.extra_columns
    return {
        "grad_output": rng.standard_normal(output_shape(spec)).astype(np.float32),
        "grad_attn_weights": rng.standard_normal((N, L, columns)).astype(np.float32),
    }


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_mask_in_pynative(name: str, mask: str) -> None:
    spec = spec_of(name)
    check("pynative", spec, **masks_of(mask, spec.num_heads))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_pynative(name: str, masked: bool) -> None:
    """Through output and weights together: of inputs, parameters and float masks."""
    spec = spec_of(name)
    check("pynative", spec, **(float_masks(spec.num_heads) if masked else {}), **seeds_of(spec))


@pytest.mark.parametrize(
    ("name", "masked", "form"),
    [
        *((name, True, "graph mode") for name in LAYERS),
        *((name, True, "jit") for name in ("batch first", "kdim and vdim", "bias_kv and zero_attn")),
        ("plain", False, "jit"),
        ("plain", False, "graph mode"),
    ],
)
def test_gradients_compiled(name: str, masked: bool, form: str) -> None:
    spec = spec_of(name)
    check(form, spec, **(float_masks(spec.num_heads) if masked else {}), **seeds_of(spec))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("through", ["grad_output", "grad_attn_weights"])
def test_gradients_through_one_alone(through: str, form: str) -> None:
    spec = spec_of("plain")
    check(form, spec, **masks_of("attn float"), **{through: seeds_of(spec)[through]})


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask not in ("none", "attn int")])
def test_every_mask_compiled(mask: str) -> None:
    spec = spec_of("plain")
    check("jit", spec, average_attn_weights=False, **masks_of(mask))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grads", [False, True])
def test_fully_masked_rows_are_nan(form: str, grads: bool) -> None:
    spec = spec_of("plain")
    mask = np.zeros((L, S), bool)
    mask[1] = True
    check(form, spec, attn_mask=mask, **(seeds_of(spec) if grads else {}))
    check(form, spec_of("zero_attn"), attn_mask=mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(form: str, batch_first: bool) -> None:
    spec = spec_of("plain", batch_first=batch_first)
    weights, arrays = material(spec_of("plain"))
    one = tuple(np.ascontiguousarray(array[:, 0]) for array in arrays)
    call = {"key_padding_mask": np.arange(S) > 4, "attn_mask": masks_of("attn per head bool")["attn_mask"][:4]}
    for more in ({}, {"average_attn_weights": False}):
        hold(answer(form, layer_of(spec, weights), one, {**call, **more}), spec, weights, one, **call, **more)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(form: str, dtype: str) -> None:
    for mask in ("none", "attn double", "attn half"):
        check(form, spec_of("plain", dtype=dtype), **masks_of(mask))


@pytest.mark.parametrize("form", FORMS)
def test_self_and_cross_attention_in_any_order(form: str) -> None:
    """The native cell, compiled for one tensor given three times, then takes three tensors for one."""
    spec = spec_of("plain")
    weights, (query, key, value) = material(spec)
    run = callable_of(Caller(layer_of(spec, weights)), form)
    q, k, v = (tensor(np.ascontiguousarray(array[:L])) for array in (query, key, value))
    for inputs in [(q, q, q), (q, k, v), (q, k, k), (q, q, q), (k, k, v), (v, v, v)]:
        output, attention = run(*inputs, None, None)
        found = {"output": output.asnumpy(), "attn_weights": attention.asnumpy()}
        hold(found, spec, weights, tuple(x.asnumpy() for x in inputs))


@pytest.mark.parametrize("form", FORMS)
def test_always_a_pair(form: str) -> None:
    layer = MultiheadAttention(16, 4)
    x = tensor(np.ones((3, 2, 16), np.float32))
    answer = callable_of(Caller(layer, need_weights=False), form)(x, x, x, None, None)
    assert len(answer) == 2
    assert answer[0].shape == (3, 2, 16)
    assert answer[1] is None


class CompiledCaller(Caller):
    """A cell whose construct is compiled: unlike a compiled function over a cell, it follows set_train."""

    @ms.jit  # type: ignore[untyped-decorator]
    def construct(self, query: Any, key: Any, value: Any, padding: Any, mask: Any) -> Any:
        return self.layer(query, key, value, padding, True, mask, False)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_follows_the_training_flag(form: str) -> None:
    layer = MultiheadAttention(16, 4, dropout=0.5)
    x = tensor(np.random.default_rng(0).standard_normal((9, 2, 16)).astype(np.float32))
    cell = (CompiledCaller if form == "jit" else Caller)(layer, average_attn_weights=False)
    run = cell if form == "jit" else callable_of(cell, form)
    for training in (True, False, True):
        cell.set_train(training)
        attention = run(x, x, x, None, None)[1].asnumpy()
        gone = float((attention == 0.0).mean())
        assert (0.3 < gone < 0.7) if training else gone == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_dropout_of_one(form: str) -> None:
    layer = MultiheadAttention(16, 4, dropout=1.0)
    x = tensor(np.ones((3, 2, 16), np.float32))
    attention = callable_of(Caller(layer), form)(x, x, x, None, None)[1]
    assert layer.training
    assert not attention.asnumpy().any()


def test_empty_calls() -> None:
    spec = spec_of("plain", batch_first=True)
    weights, _ = material(spec)
    layer = layer_of(spec, weights)
    for n, target, source in ((0, 5, 7), (2, 0, 7)):
        arrays = tuple(np.zeros((n, length, 16), np.float32) for length in (target, source, source))
        for call in ({}, {"attn_mask": np.ones((target, source), bool), "is_causal": True}):
            hold(answer("pynative", layer, arrays, call), spec, weights, arrays, **call)
        with pytest.raises(ArgumentError, match="attn_mask"):
            layer(*(tensor(array) for array in arrays), attn_mask=tensor(np.ones((3, 3), bool)))


def test_no_source_position_is_refused() -> None:
    """MindSpore leaves the product over none unwritten, so there is no honest answer to give."""
    layer = layer_of(spec_of("plain", batch_first=True), material(spec_of("plain"))[0])
    query, none = tensor(np.zeros((2, 5, 16), np.float32)), tensor(np.zeros((2, 0, 16), np.float32))
    with pytest.raises(UnsupportedError, match="no source position"):
        layer(query, none, none)


# -- refusals ----------------------------------------------------------------------------------------------------------


def mask_of_two() -> Any:
    return np.full((L, S), 2)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_refusals_in_every_form(form: str) -> None:
    spec = spec_of("plain")
    weights, (query, key, value) = material(spec)
    run = callable_of(Caller(layer_of(spec, weights)), form)
    for inputs, mask, error, subject in [
        ((query[..., :8], key, value), None, ArgumentError, "query"),
        ((query.astype(int), key, value), None, (ArgumentError, ArgumentTypeError), "query"),
        ((query, key.astype(np.float64), value), None, ArgumentError, "key"),
        ((query, key, value[:-1]), None, ArgumentError, "value"),
        ((query, key, value), np.zeros((1, S), bool), ArgumentError, "attn_mask"),
        ((query, key, value), mask_of_two(), (ArgumentError, UnsupportedError), "attn_mask"),
    ]:
        with pytest.raises(error) as found:
            run(*(tensor(x) for x in inputs), None, tensor(mask))
        assert found.value.subject == subject


def test_what_is_no_tensor_is_refused() -> None:
    layer = MultiheadAttention(16, 4)
    x = np.ones((3, 2, 16), np.float32)
    with pytest.raises(ArgumentTypeError, match="MindSpore"):
        layer(x, x, x)
    with pytest.raises(ArgumentTypeError, match="attn_mask"):
        layer(tensor(x), tensor(x), tensor(x), attn_mask=np.zeros((3, 3), bool))


def test_the_constructor_refuses() -> None:
    with pytest.raises(ArgumentError, match="set_device"):
        MultiheadAttention(16, 4, device="CPU")
    with pytest.raises(ArgumentError, match="num_heads"):
        MultiheadAttention(16, 5)
    with pytest.raises(ArgumentError, match="dropout"):
        MultiheadAttention(16, 4, dropout=1.5)


def test_bfloat16_has_no_kernels_on_a_cpu() -> None:
    layer = MultiheadAttention(16, 4, dtype=ms.bfloat16)
    x = tensor(np.ones((3, 2, 16), np.float32)).astype(ms.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        layer(x, x, x)


# -- the cell itself ---------------------------------------------------------------------------------------------------


def test_the_same_initial_values_as_in_torch() -> None:
    pytest.importorskip("torch", reason="PyTorch is not importable here")
    from mhabridge.adapters import torch as other

    for kind in ({}, {"kdim": 6}, {"add_bias_kv": True}, {"bias": False}):
        pair = []
        for made in (MultiheadAttention, other.MultiheadAttention):
            mb.manual_seed(7)
            pair.append(mb.extract(made(16, 4, **kind)))
        assert pair[0] == pair[1]
    assert not mb.extract(MultiheadAttention(16, 4))[1].arrays()["out_bias"].any()


@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_go_both_ways(name: str, tmp_path: pathlib.Path) -> None:
    spec = spec_of(name)
    weights, arrays = material(spec)
    ours, native = layer_of(spec, weights), mb.build(spec, "mindspore", mb.MHAWeights.random(spec, 9))
    for source, target in ((ours, native), (mb.build(spec, "mindspore", weights), layer_of(spec, weights))):
        path = str(tmp_path / "layer.ckpt")
        ms.save_checkpoint(source, path)
        assert not any(ms.load_param_into_net(target, ms.load_checkpoint(path)))
        assert mb.extract(target) == (spec, weights)
    inputs = [tensor(array) for array in arrays]
    np.testing.assert_allclose(ours(*inputs)[0].asnumpy(), native(*inputs)[0].asnumpy(), rtol=0, atol=1e-6)


def test_it_is_a_cell_in_training_that_prints_and_copies() -> None:
    layer = MultiheadAttention(16, 4, dropout=0.25)
    assert layer.training
    assert "MultiheadAttention" in repr(layer)
    twin = copy.deepcopy(layer)
    assert mb.extract(twin) == mb.extract(layer)
    x = tensor(np.ones((3, 2, 16), np.float32))
    layer.set_train(False)
    assert not twin.set_train(False).training
    np.testing.assert_array_equal(layer(x, x, x)[0].asnumpy(), twin(query=x, key=x, value=x)[0].asnumpy())


@pytest.mark.parametrize("form", ["pynative", "graph mode"])
def test_a_larger_cell_learns(form: str) -> None:
    mb.manual_seed(1)
    cell = Caller(MultiheadAttention(16, 4))
    before = mb.extract(cell.layer)[1]
    x = tensor(np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32))
    if form == "graph mode":
        ms.set_context(mode=ms.GRAPH_MODE)

    def loss(inputs: Any) -> Any:
        output, _ = cell(inputs, inputs, inputs, None, None)
        return (output * output).sum()

    optimizer = ms.nn.SGD(cell.trainable_params(), learning_rate=0.01)
    step = ms.value_and_grad(loss, None, optimizer.parameters)
    losses = []
    for _ in range(5):
        value, grads = step(x)
        optimizer(grads)
        losses.append(float(value.asnumpy()))
    assert losses == sorted(losses, reverse=True)
    assert mb.extract(cell.layer)[1] != before


@pytest.mark.parametrize("name", LAYERS)
def test_convert_keeps_mode_and_frozen_parameters(name: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not importable here")
    layer = layer_of(spec_of(name), material(spec_of(name))[0])
    layer.out_proj.weight.requires_grad = False
    there = mb.convert(layer, to="torch")
    assert not there.training
    assert [key for key, parameter in there.named_parameters() if not parameter.requires_grad] == ["out_proj.weight"]
    back = mb.convert(there.train(), to="mindspore")
    assert mb.extract(back) == mb.extract(layer)
    assert back.training
    assert [p.requires_grad for p in back.get_parameters()] == [p.requires_grad for p in layer.get_parameters()]


# -- attend on native cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_in", [False, True])
@pytest.mark.parametrize("policy", ["nan", "zero"])
def test_attend_answers_and_says_how(policy: str, drop_in: bool) -> None:
    spec = spec_of("bias_kv")
    weights, arrays = material(spec)
    layer = layer_of(spec, weights) if drop_in else mb.build(spec, "mindspore", weights)
    inputs = [tensor(array) for array in arrays]
    for name, form in (("none", "native"), ("padding bool and attn float", "composed"), ("causal", "composed")):
        notes: list[str] = []
        call = {**masks_of(name), "fully_masked": policy}
        given = {key: tensor(x) if isinstance(x, np.ndarray) else x for key, x in call.items()}
        output, attention = mb.attend(layer, *inputs, **given, notes=notes)
        found = {"output": output.asnumpy(), "attn_weights": attention.asnumpy()}
        hold(found, spec, weights, arrays, **call)
        assert [note.partition(":")[0] for note in notes] == [form]


def test_attend_by_policy() -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    layer = mb.build(spec, "mindspore", weights)
    inputs = [tensor(array) for array in arrays]
    mask = np.zeros((L, S), bool)
    mask[2] = True
    output, attention = mb.attend(layer, *inputs, attn_mask=tensor(mask), fully_masked="zero")
    found = {"output": output.asnumpy(), "attn_weights": attention.asnumpy()}
    hold(found, spec, weights, arrays, attn_mask=mask, fully_masked="zero")
    with pytest.raises(ArgumentError, match="row 2"):
        mb.attend(layer, *inputs, attn_mask=tensor(mask), fully_masked="error")
    with pytest.raises(UnsupportedError, match="composed"):
        mb.attend(layer, *inputs, attn_mask=tensor(mask), mode="native")


def test_attend_composes_native_cells_in_graph_mode() -> None:
    spec = spec_of("plain")
    weights, (query, key, value) = material(spec)
    layer = mb.build(spec, "mindspore", weights)
    ms.set_context(mode=ms.GRAPH_MODE)
    q, k, v = (tensor(np.ascontiguousarray(array[:L])) for array in (query, key, value))
    layer(q, q, q)
    notes: list[str] = []
    output, attention = mb.attend(layer, q, k, v, notes=notes)
    arrays = tuple(x.asnumpy() for x in (q, k, v))
    hold({"output": output.asnumpy(), "attn_weights": attention.asnumpy()}, spec, weights, arrays)
    assert notes[0].startswith("composed")
    with pytest.raises(UnsupportedError, match="three tensors"):
        mb.attend(layer, q, k, v, mode="native")


def test_a_first_gradient_over_one_source_position_spoils_nothing() -> None:
    """In a fresh process; by the native cell itself MindSpore 2.10's later gradients would all be wrong."""
    code = """
import numpy as np, mindspore as ms, mhabridge as mb
layer = ms.nn.MultiheadAttention(8, 2)
q, k = (ms.Tensor(np.random.randn(n, 2, 8).astype("f4")) for n in (2, 1))
ms.grad(lambda q: mb.attend(layer, q, k, k)[0].sum())(q)
print(mb.diff(mb.MHASpec(16, 4), ["mindspore"], grads=True).ok)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip().splitlines()[-1:] == ["True"], done.stderr


@pytest.mark.parametrize("mode", ["auto", "composed"])
def test_gradients_in_any_order_of_shapes(mode: str) -> None:
    spec = mb.MHASpec(16, 4)
    weights = mb.MHAWeights.random(spec)
    layer = mb.build(spec, "mindspore", weights)
    rng = np.random.default_rng(0)
    for batch, target, source in [(2, 2, 1), (1, 1, 2), (1, 1, 1), (2, 5, 7)]:
        arrays = tuple(rng.standard_normal((n, batch, 16)).astype(np.float32) for n in (target, source, source))

        def loss(*inputs: Any) -> Any:
            return mb.attend(layer, *inputs, mode=mode)[0].sum()

        found = ms.grad(loss, (0, 1, 2))(*(tensor(array) for array in arrays))
        call = {"grad_output": np.ones((target, batch, 16), np.float32)}
        prepared, exact = reference_answer(spec, weights, arrays, **call)
        limits = bounds(prepared, weights, named(exact), accuracy("mindspore", "float32"))
        for name, grad in zip(("query", "key", "value"), found, strict=True):
            distance = judge(grad.asnumpy(), exact.grads[name], limits[f"grads.{name}"])
            assert distance.ok, f"{name} {(batch, target, source)}: {distance}"


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(0, L, S), (N, 0, S), (0, 0, 0)])
def test_gradients_of_nothing_are_zero(sizes: tuple[int, int, int], masked: bool, own: bool) -> None:
    """MindSpore leaves them unwritten: memory that earlier calls used."""
    n, target, source = sizes
    spec = spec_of("batch first")
    layer = mb.build(spec, "mindspore", material(spec)[0], mode="native" if own else "composed")
    query, key = (tensor(np.ones((n, length, 16), np.float32)) for length in (target, source))
    masks = {"key_padding_mask": tensor(np.zeros((n, source), bool)), "is_causal": True} if masked else {}

    def loss(query: Any, key: Any) -> Any:
        output, attention = mb.attend(layer, query, key, key, **masks)
        return output.sum() + attention.sum()

    used = [tensor(array) for array in material(spec)[1]]
    for _ in range(3):
        mb.attend(layer, *used)[0].asnumpy()
        output, attention = mb.attend(layer, query, key, key, **masks)
        assert (output.shape, attention.shape) == ((n, target, 16), (n, target, source))
        gradient = ms.grad(loss, (0, 1), ms.ParameterTuple(layer.trainable_params()))
        of_inputs, of_parameters = gradient(query, key)
        assert [grad.shape for grad in of_inputs] == [query.shape, key.shape]
        assert [float(np.abs(grad.asnumpy()).max()) for grad in of_parameters] == [0.0] * 4
    with pytest.raises(ArgumentError, match="key_padding_mask"):
        mb.attend(layer, query, key, key, key_padding_mask=tensor(np.zeros((n + 1, source), bool)))


def test_a_hook_may_call_the_layer_again() -> None:
    layer = MultiheadAttention(8, 2)
    x, mask = tensor(np.ones((3, 2, 8), np.float32)), tensor(np.zeros((2, 3), np.int64))
    seen: list[Any] = []

    def again(cell: Any, inputs: Any) -> None:
        if not seen:
            seen.append(None)
            seen.append(layer(x, x, x)[0])

    layer.register_forward_pre_hook(again)
    layer(x, x, x, key_padding_mask=mask)  # what a compiler's way would refuse
    assert len(seen) == 2
    assert "construct" not in vars(layer)


def test_batch_first_may_be_set_later() -> None:
    layer = MultiheadAttention(8, 2)
    layer.batch_first = True
    x = tensor(np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32))

    @ms.jit  # type: ignore[untyped-decorator]
    def compiled(x: Any) -> Any:
        return layer(x, x, x)

    for one, other in zip(layer(x, x, x), compiled(x), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-5, atol=1e-6)


def test_shared_projections_are_refused() -> None:
    layer = ms.nn.MultiheadAttention(8, 2, kdim=8, vdim=9)
    layer.q_proj_weight = layer.k_proj_weight
    with pytest.raises(UnsupportedError, match="shared with"):
        mb.extract(layer)


def test_an_activation_of_its_own_is_refused() -> None:
    class Squared(ms.nn.ReLU):  # type: ignore[misc, name-defined]
        def construct(self, x: Any) -> Any:
            return super().construct(x) ** 2

    layer = ms.nn.TransformerEncoderLayer(8, 2, 16)
    layer.activation = Squared()
    with pytest.raises(UnsupportedError, match="activation: given Squared"):
        mb.extract(layer)


def test_what_is_known_of_a_call_is_not_taken_for_another() -> None:
    """The same sizes asked for with a setting, a dtype or a layer that is wrong: still refused, or composed."""
    layer = ms.nn.MultiheadAttention(16, 4)
    array = np.random.default_rng(0).standard_normal((L, N, 16)).astype(np.float32)
    x = tensor(array)
    for _ in range(2):
        notes: list[str] = []
        mb.attend(layer, x, x, x, notes=notes)
        assert notes == ["native: mindspore.nn.MultiheadAttention"]
    for wrong in (tensor(array.astype(np.float16)), array, array.tolist()):
        with pytest.raises(mb.MHABridgeError, match=r"query|key"):
            mb.attend(layer, wrong, x, x)
    with pytest.raises(mb.MHABridgeError, match="need_weights"):
        mb.attend(layer, x, x, x, need_weights=1)
    for options in ({"mode": "composed"}, {"is_causal": True}):
        notes = []
        mb.attend(layer, x, x, x, notes=notes, **options)
        assert notes[0].startswith("composed")
    ms.set_context(mode=ms.GRAPH_MODE)
    notes = []
    mb.attend(layer, x, x, x, notes=notes)
    assert notes[0].startswith("composed: A native cell that was compiled")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    other = tensor(array[:, ::-1].copy())
    for inputs in ((x, other, other), (x, x, other), (x, x, x)):
        native, composed = (mb.attend(layer, *inputs, mode=mode)[0].asnumpy() for mode in ("auto", "composed"))
        np.testing.assert_allclose(native, composed, rtol=1e-4, atol=1e-5)
    layer.batch_first = True
    assert mb.attend(layer, x, x, x)[1].shape == (L, N, N)
