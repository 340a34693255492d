"""Transformer layers and stacks: their spec, and the way between the frameworks, bit for bit and with equal answers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import mapping
from mhabridge.backends import backends, shipping
from mhabridge.backends.worker import Worker
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError, WeightsError
from mhabridge.transformer import KINDS, TransformerSpec, native_transformer
from mhabridge.transformer_weights import TransformerWeights, names_in
from tests import worker_transformer
from tests.conftest import _ready as ready

E, HEADS, N, L, S = 12, 3, 2, 4, 5
OLD = ("torch@1.8.1", "mindspore@2.0.0")

# What float32 answers to these small models, numbers of the size of 1, may differ by from float64's: 1.2e-6 was
# measured for stacks of two layers (MindSpore 2.10), and a forgotten transpose or norm is off by more than 0.1.
CLOSE = 1e-5


def spec_of(kind: str, **changes: Any) -> TransformerSpec:
    parts: dict[str, Any] = {}
    if kind in ("encoder", "transformer"):
        parts.update(num_encoder_layers=2, encoder_norm_eps=1e-6)
    if kind in ("decoder", "transformer"):
        parts.update(num_decoder_layers=2)
    # All weights are square, so no shape shows a missing transpose.
    return TransformerSpec(kind, E, **{"num_heads": HEADS, "dim_feedforward": E, "dropout": 0.0, **parts, **changes})


def inputs_of(spec: TransformerSpec, masks: str) -> list[np.ndarray | None]:
    """The arguments of a call, by position: tensors, then masks in PyTorch's order."""
    rng = np.random.default_rng(5)

    def tensor(length: int) -> np.ndarray:
        array = rng.standard_normal((N, length, E)).astype(np.float32)
        return array if spec.batch_first else np.ascontiguousarray(array.swapaxes(0, 1))

    causal = np.triu(np.ones((L, L), bool), 1)
    added = rng.standard_normal((S, S)).astype(np.float32)
    padding = np.array([[False] * S, [False] * (S - 2) + [True] * 2])
    if masks == "none":
        causal = added = padding = None
    elif masks == "bool":
        added = added > 0.8
    short = None if padding is None else padding[:, :L]
    if spec.kind.startswith("encoder"):
        return [tensor(S), added, padding]
    if spec.kind.startswith("decoder"):
        return [tensor(L), tensor(S), causal, None, short, padding]
    return [tensor(S), tensor(L), added, causal, None, padding, short, padding]


def payload_of(framework: str, spec: TransformerSpec, masks: str = "none", composed: bool = False) -> dict[str, Any]:
    return {
        "framework": framework.partition("@")[0],
        "spec": spec.to_dict(),
        "weights": TransformerWeights.random(spec, seed=2).to_tree(),
        "inputs": inputs_of(spec, masks),
        "composed": composed,
    }


def exact(spec: TransformerSpec, masks: str, grads: bool = False) -> Any:
    """PyTorch's answer in float64 (gradients are recorded, so its fast path is not taken)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    payload = payload_of("torch", spec.replace(dtype="float64"), masks)
    payload["weights"] = TransformerWeights.random(spec, seed=2).astype("float64").to_tree()
    wide = [None if array is None else as_float(array) for array in payload["inputs"]]
    _, layer = worker_transformer.build(payload)
    layer.train(grads)
    tensors = [worker_transformer.tensor("torch", array) for array in wide]
    output = layer(*(tensor.requires_grad_(grads) if n == 0 else tensor for n, tensor in enumerate(tensors)))
    if not grads:
        return output.detach().numpy()
    seed = seed_of(output.shape)
    (output * torch.from_numpy(seed.astype(np.float64))).sum().backward()
    named = {name: parameter.grad.numpy() for name, parameter in layer.named_parameters()}
    return tensors[0].grad.numpy(), TransformerWeights.from_layout("torch", named, spec.replace(dtype="float64"))


def as_float(array: np.ndarray) -> np.ndarray:
    """Bool masks as PyTorch means them: it takes float ones of the same meaning without a word."""
    return np.where(array, -np.inf, 0.0) if array.dtype == bool else array.astype(np.float64)


def seed_of(shape: Any) -> np.ndarray:
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


@functools.cache
def worker(name: str) -> Worker:
    info = next(info for info in backends() if info.name == name)
    own = Path(worker_transformer.__file__).read_text(encoding="utf-8")
    modules = {"mhabridge.bridge": shipping.source("mhabridge.bridge"), "trial": own}
    return Worker(info.python, info.framework, extra_modules=modules)


@pytest.fixture(scope="module", autouse=True)
def _workers_end() -> Iterator[None]:
    yield
    for name in ("megengine", *OLD):
        if worker.cache_info().currsize and ready_or_not(name):
            worker(name).close()
    worker.cache_clear()


def ready_or_not(name: str) -> bool:
    return any(info.name == name and info.ok for info in backends())


def ask(name: str, function: str, payload: dict[str, Any]) -> Any:
    """Have a backend run one of worker_transformer's functions: here, or in its environment."""
    ready(name)
    if next(info for info in backends() if info.name == name).where == "here":
        return getattr(worker_transformer, function)(name, payload)
    return worker(name).call(f"trial:{function}", payload, timeout=100)


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max())


# -- the spec ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_specs_come_back_from_json(kind: str) -> None:
    spec = spec_of(kind, activation="gelu", bias=False)
    assert TransformerSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["kind"] == kind


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"kind": "layer"}, ArgumentError, "kind"),
        ({"activation": "silu"}, ArgumentError, "activation"),
        ({"num_heads": 5}, ArgumentError, "multiple of num_heads"),
        ({"dropout": 1.5}, ArgumentError, "dropout"),
        ({"dim_feedforward": 0}, ArgumentError, "dim_feedforward"),
        ({"dim_feedforward": 1.5}, ArgumentTypeError, "dim_feedforward"),
        ({"layer_norm_eps": -1e-5}, ArgumentError, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, ArgumentError, "layer_norm_eps"),
        ({"norm_first": 1}, ArgumentTypeError, "norm_first"),
        ({"num_encoder_layers": 0}, ArgumentError, "num_encoder_layers"),
        ({"num_decoder_layers": 1}, ArgumentError, "has no decoder"),
        ({"decoder_norm_eps": 1e-5}, ArgumentError, "has no decoder"),
        ({"dtype": "int8"}, ArgumentError, "dtype"),
    ],
)
def test_impossible_specs_are_refused(changes: dict[str, Any], error: type, word: str) -> None:
    with pytest.raises(error, match=word):
        spec_of("encoder").replace(**changes)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"kind": "encoder_layer"}', '{"kind": 1, "embed_dim": 8, "num_heads": 2, "x": 1}']
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="spec"):
        TransformerSpec.from_json(text)


def test_every_parameter_has_one_path() -> None:
    spec = spec_of("transformer")
    arrays = TransformerWeights.random(spec).arrays()
    per_layer = {"encoder": 8 + 4 + 4, "decoder": 2 * 8 + 4 + 6}
    assert len(arrays) == 2 * sum(per_layer.values()) + 2  # and the encoder's norm
    assert arrays["decoder.layers.1.multihead_attn.v_weight"].shape == (E, E)
    assert arrays["encoder.norm.bias"].shape == (E,)


# -- weights and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["torch", "mindspore", "megengine"])
def test_layouts_are_inverse(layout: str, kind: str) -> None:
    spec = spec_of(kind)
    weights = TransformerWeights.random(spec)
    named = weights.to_layout(layout, spec)
    assert TransformerWeights.from_layout(layout, named, spec) == weights
    assert weights != TransformerWeights.random(spec, seed=1)


def test_names_by_version() -> None:
    spec = spec_of("encoder_layer")
    assert names_in("mindspore", "2.10.0", spec)["linear2.bias"] == "dense2.bias"
    assert names_in("mindspore", "2.0.0", spec)["linear2.bias"] == "linear2.bias"
    assert names_in("mindspore", None, spec)["norm2.bias"] == "norm2.beta"
    assert names_in("torch", "1.8.1", spec)["norm2.bias"] == "norm2.bias"


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "transposed", "dtype", "missing in attention"])
def test_nothing_is_lost_in_silence(spoil: str) -> None:
    spec = spec_of("encoder_layer", dim_feedforward=7)
    named = TransformerWeights.random(spec).to_layout("mindspore", spec)
    name = "self_attn.out_proj.bias" if spoil == "missing in attention" else "dense1.weight"
    if spoil.startswith("missing"):
        del named[name]
    elif spoil == "unexpected":
        named["dense3.weight"] = named[name]
        name = "dense3.weight"
    elif spoil == "transposed":
        named[name] = named[name].T.copy()
        name = "linear1.weight"
    else:
        named[name] = named[name].astype(np.float64)
        name = "linear1.weight"
    with pytest.raises(WeightsError, match=name):
        TransformerWeights.from_layout("mindspore", named, spec)


@pytest.mark.parametrize(("named", "version"), [("torch", "1.8.1"), ("mindspore", "2.0.0"), ("mindspore", "2.10.0")])
def test_a_class_without_the_flag_gets_zero_biases(named: str, version: str) -> None:
    spec = spec_of("encoder_layer", bias=False)
    form = native_transformer(spec, named, version)
    assert form.spec == spec.replace(bias=True)
    assert "zeros stand in" in form.notes[0]
    whole = TransformerWeights.random(spec).with_bias(form.spec)
    whole.check(form.spec)
    assert not whole.others["norm1.bias"].any()
    assert not whole.attention["self_attn"].out_bias.any()


@pytest.mark.parametrize(
    ("named", "version", "changes"),
    [
        ("torch", "1.8.1", {"norm_first": True}),
        ("torch", "1.9.0", {"norm_first": True}),
        ("torch", "1.8.1", {"batch_first": True}),
        ("torch", "1.8.1", {"layer_norm_eps": 1e-6}),
        ("mindspore", "2.0.0", {"dtype": "float16"}),
    ],
)
def test_what_a_version_cannot_say_is_refused(named: str, version: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(changes))):
        native_transformer(spec_of("encoder_layer", **changes), named, version)


def test_the_tables_name_real_fields() -> None:
    fields = {field.name for field in dataclasses.fields(TransformerSpec)}
    for framework in mapping.FRAMEWORKS:
        table = mapping.table(framework)["transformer"]
        named = [argument["field"] for argument in table["arguments"]]
        assert len(set(named)) == len(named)
        assert set(named) <= fields - {"kind"}
        assert {"embed_dim", "num_heads", "dim_feedforward", "dropout", "activation", "bias"} <= set(named)


# -- native layers -----------------------------------------------------------------------------------------------------


VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation": "gelu", "norm_first": True},
    {"batch_first": True, "bias": False, "layer_norm_eps": 1e-3},
]


def possible(name: str, variant: dict[str, Any]) -> dict[str, Any]:
    """Without what PyTorch 1.8.1 has not."""
    none = ("norm_first", "batch_first", "layer_norm_eps") if name == "torch@1.8.1" else ()
    return {key: value for key, value in variant.items() if key not in none}


@pytest.mark.frameworks
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant) or "plain")
@pytest.mark.parametrize("composed", [False, True], ids=["native", "composed"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_with_the_same_answer(
    framework: str, kind: str, composed: bool, variant: dict[str, Any]
) -> None:
    spec = spec_of(kind, **possible(framework, variant))
    payload = payload_of(framework, spec, "bool", composed)
    answer = ask(framework, "forward", payload)
    there = TransformerSpec(**answer["spec"])
    weights = TransformerWeights.random(spec, seed=2)
    assert there.replace(bias=spec.bias) == spec
    assert TransformerWeights.from_tree(answer["weights"]) == (weights if there == spec else weights.with_bias(there))
    assert distance(answer["output"], exact(spec, "bool")) < CLOSE


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
def test_composed_ones_take_masks_of_different_kinds(framework: str, kind: str) -> None:
    spec = spec_of(kind)
    answer = ask(framework, "forward", payload_of(framework, spec, "mixed", composed=True))
    assert distance(answer["output"], exact(spec, "mixed")) < CLOSE


@pytest.mark.frameworks
def test_the_comparison_sees_a_lost_parameter() -> None:
    spec = spec_of("encoder")
    payload = payload_of("torch", spec)
    right = distance(ask("torch", "forward", payload)["output"], exact(spec, "none"))
    for name in ("layers.0.linear1.weight", "layers.1.norm2.bias", "norm.weight", "layers.0.linear2.weight"):
        spoiled = payload_of("torch", spec)
        array = spoiled["weights"]["others"][name]
        spoiled["weights"]["others"][name] = array.T.copy() if array.ndim == 2 else np.zeros_like(array)
        assert distance(ask("torch", "forward", spoiled)["output"], exact(spec, "none")) > 1000 * right


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
def test_megengine_gradients(kind: str) -> None:
    spec = spec_of(kind, activation="gelu")
    payload = payload_of("megengine", spec, "mixed", composed=True)
    wanted_input, wanted = exact(spec, "mixed", grads=True)
    payload["seed"] = seed_of(payload["inputs"][1 if kind == "transformer" else 0].shape)
    found = ask("megengine", "train", payload)
    assert distance(found["input"], wanted_input) < 20 * CLOSE
    grads = TransformerWeights.from_tree(found["grads"]).arrays()
    assert grads.keys() == wanted.arrays().keys()
    assert max(distance(grads[name], array) for name, array in wanted.arrays().items()) < 20 * CLOSE


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
def test_megengine_copies_saves_and_traces(kind: str) -> None:
    found = ask("megengine", "call_twice", payload_of("megengine", spec_of(kind, batch_first=True), "mixed"))
    for output in found["outputs"][1:]:
        assert distance(output, found["outputs"][0]) < CLOSE
    assert "MultiheadAttention" in found["text"]


@pytest.mark.frameworks
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize(("kind", "composed"), [*itertools.product(KINDS, [False, True])])
def test_older_versions(name: str, kind: str, composed: bool) -> None:
    if not ready_or_not(name):
        pytest.skip(f"{name} is not installed: make test-versions")
    test_there_and_back_with_the_same_answer(name, kind, composed, {"activation": "gelu", "bias": False})


# -- live layers -------------------------------------------------------------------------------------------------------


def own_forward(torch: Any) -> Any:
    class Odd(torch.nn.TransformerEncoderLayer):  # type: ignore[misc,name-defined]
        def forward(self, src: Any, **masks: Any) -> Any:
            return src

    return Odd(8, 2)


def own_part(torch: Any) -> Any:
    class Half(torch.nn.TransformerDecoderLayer):  # type: ignore[misc,name-defined]
        def _ff_block(self, x: Any) -> Any:
            return x / 2

    return Half(8, 2, 16)


def odd_linear(torch: Any) -> Any:
    class Doubled(torch.nn.Linear):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    layer.linear1 = Doubled(8, 16)
    return layer


def own_activation(torch: Any, kind: str) -> Any:
    class Odd(getattr(torch.nn, kind)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) ** 2

    return torch.nn.TransformerEncoderLayer(8, 2, activation=Odd())


def patched_activation(torch: Any) -> Any:
    layer = torch.nn.TransformerEncoderLayer(8, 2, activation=torch.nn.GELU())
    layer.activation.forward = lambda x: x * torch.sigmoid(1.702 * x)
    return layer


def spoiled(torch: Any, what: str) -> tuple[Any, str]:
    """A model that is no plain transformer, and what the message must name."""
    nn = torch.nn
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    if what == "activation":
        return nn.TransformerEncoderLayer(8, 2, activation=nn.functional.silu), "activation: given <function silu"
    if what == "gelu by tanh":
        return nn.TransformerEncoderLayer(8, 2, activation=nn.GELU(approximate="tanh")), "tanh"
    if what.startswith("a subclass of "):
        return own_activation(torch, what.split()[-1]), r"activation: given Odd\("
    if what == "a patched activation":
        return patched_activation(torch), "activation: given GELU"
    if what == "forward":
        return own_forward(torch), "Odd"
    if what == "own part":
        return own_part(torch), "Half"
    if what == "activation in a linear map":
        return odd_linear(torch), r"linear1: given .*Doubled"
    if what == "another dropout":
        layer.dropout1 = nn.AlphaDropout(0.1)
        return layer, "dropout1: given .*AlphaDropout"
    if what == "patched":
        layer.forward = lambda src, **masks: src
        return layer, "TransformerEncoderLayer"
    if what == "shared layers":
        stack.layers[1] = stack.layers[0]
        return stack, r"layers\.1\..*shared with layers\.0\."
    if what == "shared matrices":
        layer = nn.TransformerEncoderLayer(8, 2, 8)
        layer.linear2.weight = layer.linear1.weight
        return layer, "shared with linear1"
    if what == "one dropout":
        stack.layers[1].dropout2.p = 0.5
        return stack, r"layers\.1: given a dropout of .*0\.5 in dropout2"
    if what == "one layer":
        stack.layers[1].norm_first = True
        return stack, r"layers\.1: given norm_first=True"
    if what == "one attention":
        stack.layers[0].self_attn.add_zero_attn = True
        return stack, r"layers\.0\.self_attn: given add_zero_attn=True"
    if what == "norm":
        stack.norm = nn.RMSNorm(8)
        return stack, "norm: given RMSNorm"
    if what == "norm's bias":
        stack.norm = nn.LayerNorm(8, bias=False)
        return stack, "encoder's norm: given bias=False"
    if what == "no layers":
        stack.layers = nn.ModuleList()
        return stack, "without any layer"
    stack.layers[1] = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    return stack, r"layers\.1: given a transformer's decoder_layer"


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "what",
    [
        *("activation", "gelu by tanh", "forward", "one dropout", "one layer", "one attention", "norm"),
        *("norm's bias", "no layers", "decoder inside", "own part", "activation in a linear map", "another dropout"),
        *("patched", "shared layers", "shared matrices"),
        *("a subclass of ReLU", "a subclass of GELU", "a patched activation"),
    ],
)
def test_what_is_no_plain_transformer_is_refused(what: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    model, message = spoiled(torch, what)
    with pytest.raises(UnsupportedError, match=message):
        mb.extract(model)


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_convert_to_mindspore_and_back(kind: str, training: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    spec = spec_of(kind, dropout=0.1)
    model = mb.build(spec, "torch", TransformerWeights.random(spec, seed=4)).train(training)
    frozen = [name for name, _ in model.named_parameters() if "linear1" in name or "norm2" in name or "in_proj" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    moved = mb.convert(model, to="mindspore")
    assert type(moved).__module__.startswith("mindspore.nn")
    assert isinstance(moved, mindspore.nn.Cell)
    assert moved.training == training
    assert sum(not parameter.requires_grad for parameter in moved.get_parameters()) == len(frozen)
    back = mb.convert(moved, to="torch")
    assert type(back) is type(model)
    assert mb.extract(back) == mb.extract(model)
    assert back.training == training
    assert [name for name, parameter in back.named_parameters() if not parameter.requires_grad] == frozen
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])


@pytest.mark.frameworks
def test_mindspore_stacks_keep_the_weights_they_are_given() -> None:
    """MindSpore 2.10's own TransformerEncoder loses those of the layer it is given."""
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    given = mindspore.nn.TransformerEncoderLayer(8, 2, 16)
    native = mindspore.nn.TransformerEncoder(given, 1)
    spec, weights = mb.extract(native)
    _, of_layer = mb.extract(given)
    assert not np.array_equal(weights.others["layers.0.linear1.weight"], of_layer.others["linear1.weight"])
    _, again = mb.extract(mb.build(spec, "mindspore", weights))
    assert again == weights


@pytest.mark.frameworks
def test_a_model_in_two_modes_is_not_converted() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    stack = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    stack.layers[1].eval()
    with pytest.raises(UnsupportedError, match=r"layers\.1"):
        mb.convert(stack, to="torch")


@pytest.mark.frameworks
def test_modes_of_build() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    from mhabridge.adapters.torch import MultiheadAttention

    spec = spec_of("encoder_layer")
    assert type(mb.build(spec, "torch").self_attn) is torch.nn.MultiheadAttention
    assert type(mb.build(spec, "torch", mode="composed").self_attn) is MultiheadAttention
    with pytest.raises(ArgumentTypeError, match="TransformerWeights"):
        mb.build(spec, "torch", mb.MHAWeights.random(spec.attention))
    with pytest.raises(WeightsError, match="linear1"):
        mb.build(spec.replace(dim_feedforward=5), "torch", TransformerWeights.random(spec))
    with pytest.raises(ArgumentTypeError, match="its attention layer"):
        mb.attend(mb.build(spec, "torch"), *[torch.zeros(2, 1, E)] * 3)


@pytest.mark.frameworks
def test_a_composed_layer_does_not_take_the_fast_path() -> None:
    """There PyTorch drops is_causal; a drop-in inside obeys it in evaluation and without gradients too."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    spec = spec_of("encoder_layer", batch_first=True, num_heads=2)
    layer = mb.build(spec, "torch", TransformerWeights.random(spec), mode="composed").eval()
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((N, L, E)).astype(np.float32))
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    with torch.no_grad():
        causal = layer(x, is_causal=True)
        assert torch.allclose(causal, layer(x, src_mask=mask), atol=CLOSE)
        assert not torch.allclose(causal, layer(x), atol=0.01)


@pytest.mark.frameworks
def test_a_drop_in_with_a_residual_is_not_gone_round() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.self_attn = mb.build(mb.MHASpec(8, 2, residual=True, batch_first=True), "torch").eval()
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((N, L, 8)).astype(np.float32))
    with torch.no_grad():
        fast = layer(x)
    assert torch.allclose(fast, layer(x), atol=CLOSE)


@pytest.mark.frameworks
def test_a_subclass_without_a_forward_of_its_own_is_plain() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    class Small(torch.nn.TransformerEncoderLayer):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__(8, 2, 16)

    assert mb.extract(Small())[0].dim_feedforward == 16


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
def test_mindspore_parameters_have_names_of_their_own(kind: str, tmp_path: Path) -> None:
    """A stack's checkpoint holds them by name: two of one name would be one."""
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    spec = spec_of(kind)
    weights = TransformerWeights.random(spec, seed=6)
    composed = mb.build(spec, "mindspore", weights, mode="composed")
    names = [parameter.name for parameter in composed.get_parameters()]
    native = mb.build(spec, "mindspore")
    assert names == [parameter.name for parameter in native.get_parameters()]
    assert len(set(names)) == len(names)
    mindspore.save_checkpoint(composed, str(tmp_path / "a.ckpt"))
    left = mindspore.load_param_into_net(native, mindspore.load_checkpoint(str(tmp_path / "a.ckpt")))
    assert left == ([], [])
    assert mb.extract(native)[1] == weights


@pytest.mark.frameworks
def test_zeros_that_stand_in_are_not_trained() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    moved = mb.convert(torch.nn.TransformerEncoderLayer(8, 2, 16, bias=False), to="mindspore")
    trained = {parameter.name for parameter in moved.get_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.endswith(("bias", "beta"))} == set()
    assert len(trained) == 6


@pytest.mark.frameworks
def test_megengine_refuses_wrong_inputs_at_once() -> None:
    assert ask("megengine", "wrong_inputs", {}) == {
        "features": "src: given shape (2, 3, 4); expected two or three axes, the last of 8",
        "memory": "memory: given shape (2, 3, 4); expected two or three axes, the last of 8",
        "array": "src: given numpy.ndarray; expected a tensor of MegEngine",
        "after": [3, 2, 8],
    }
