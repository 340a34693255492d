"""``mb.attend`` on PyTorch's own layer and the drop-in class: tensors in and out, judged against float64."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import reference
from mhabridge.backends.running import prepare, restore
from mhabridge.calls import Result
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests.cases import MASKS, L, N, S, masks_of, material, reference_answer, spec_of

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

LAYERS = [
    "plain",
    "batch first",
    "no bias",
    "kdim and vdim",
    "bias_kv",
    "zero_attn",
    "bias_kv and zero_attn",
    "one head",
]


def dropin(spec: mb.MHASpec, weights: mb.MHAWeights | None = None) -> Any:
    from mhabridge.adapters.torch import MultiheadAttention

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
        dtype=getattr(torch, spec.dtype),
    )
    if weights is not None:
        named = weights.to_layout("torch", spec)
        layer.load_state_dict({name: torch.tensor(array) for name, array in named.items()})
    return layer.eval()


def tensors(call: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in call.items()}


def hold(spec: mb.MHASpec, weights: mb.MHAWeights, arrays: Any, found: Any, **call: Any) -> None:
    """Judge (output, weights) against the float64 reference."""
    prepared, exact = reference_answer(spec, weights, arrays, **call)
    limits = bounds(prepared, weights, named(exact), accuracy("torch", spec.dtype))
    result = Result(found[0].detach().numpy(), None if found[1] is None else found[1].detach().numpy())
    for name, array in named(exact).items():
        distance = judge(named(result).get(name), array, limits[name])
        assert distance.ok, (name, distance)


@pytest.mark.parametrize("mode", ["auto", "composed"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_attend(name: str, mask: str, mode: str) -> None:
    spec = spec_of(name)
    weights, arrays = material(spec)
    call = masks_of(mask, spec.num_heads)
    notes: list[str] = []
    layer = mb.build(spec, "torch", weights).eval()
    found = mb.attend(layer, *(torch.tensor(a) for a in arrays), mode=mode, notes=notes, **tensors(call))
    hold(spec, weights, arrays, found, **call)
    assert notes[0].startswith("composed" if mode == "composed" else "native")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_dropin(mask: str, average: bool, need_weights: bool) -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    call = {**masks_of(mask), "need_weights": need_weights, "average_attn_weights": average}
    found = dropin(spec, weights)(*(torch.tensor(a) for a in arrays), **tensors(call))
    assert len(found) == 2
    hold(spec, weights, arrays, found, **call)


def test_dropin_takes_pytorchs_positions_and_keywords() -> None:
    layer = dropin(spec_of("plain"))
    x = torch.randn(3, 2, 16)
    mask = torch.triu(torch.ones(3, 3), 1).bool()
    by_position = layer(x, x, x, None, True, mask, False, False)
    by_keyword = layer(query=x, key=x, value=x, attn_mask=mask, average_attn_weights=False)
    assert all(torch.equal(a, b) for a, b in zip(by_position, by_keyword, strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_where_pytorch_disagrees_with_itself_there_is_one_answer(batch_first: bool) -> None:
    """H10, H11: is_causal alone, and a fully masked row, on the fast path and off it, with weights and without."""
    layer = dropin(spec_of("plain", batch_first=batch_first))
    x = torch.randn(3, 3, 16)
    dead = torch.zeros(3, 3, dtype=torch.bool)
    dead[1] = True
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for need_weights in (True, False):
                causal, _ = layer(x, x, x, is_causal=True, need_weights=need_weights)
                block, _ = layer(x, x, x, attn_mask=torch.ones(3, 3).triu(1).bool())
                torch.testing.assert_close(causal, block)
                out, _ = layer(x, x, x, key_padding_mask=dead, need_weights=need_weights)
                row = out[1] if batch_first else out[:, 1]
                assert torch.isnan(row).all()
                assert int(torch.isnan(out).sum()) == row.numel()


@pytest.mark.parametrize("policy", ["nan", "zero", "error"])
def test_the_policy_for_fully_masked_rows(policy: str) -> None:
    spec = spec_of("plain")
    weights, arrays = material(spec)
    mask = np.zeros((N * 4, L, S), bool)
    mask[1, 2] = True
    layer = mb.build(spec, "torch", weights).eval()
    call = {"attn_mask": torch.tensor(mask), "fully_masked": policy}
    if policy == "error":
        with pytest.raises(ArgumentError, match="batch 0, head 1, row 2"):
            mb.attend(layer, *(torch.tensor(a) for a in arrays), **call)
        return
    found = mb.attend(layer, *(torch.tensor(a) for a in arrays), **call)
    hold(spec, weights, arrays, found, attn_mask=mask, fully_masked=policy)


@pytest.mark.parametrize("mode", ["auto", "composed"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_through_output_weights_and_masks(name: str, mode: str) -> None:
    spec = spec_of(name)
    weights, arrays = material(spec)
    rng = np.random.default_rng(1)
    attn, padding = (rng.standard_normal(shape).astype(np.float32) for shape in ((L, S), (N, S)))
    layer = mb.build(spec, "torch", weights).eval()
    leaves = {n: torch.tensor(a, requires_grad=True) for n, a in zip(("query", "key", "value"), arrays, strict=True)}
    leaves.update(
        attn_mask=torch.tensor(attn, requires_grad=True), key_padding_mask=torch.tensor(padding, requires_grad=True)
    )
    masks = {"key_padding_mask": leaves["key_padding_mask"], "attn_mask": leaves["attn_mask"]}
    output, attention = mb.attend(layer, leaves["query"], leaves["key"], leaves["value"], mode=mode, **masks)
    seeds = [rng.standard_normal(tuple(t.shape)).astype(np.float32) for t in (output, attention)]
    ((output * torch.tensor(seeds[0])).sum() + (attention * torch.tensor(seeds[1])).sum()).backward()
    call = {"attn_mask": attn, "key_padding_mask": padding, "grad_output": seeds[0], "grad_attn_weights": seeds[1]}
    prepared = prepare(spec, weights, *arrays, **call)
    exact = restore(prepared, reference.attend(spec, weights, prepared.call))
    limits = bounds(prepared, weights, named(exact), accuracy("torch", "float32"))
    parameters = mb.MHAWeights.from_layout("torch", {n: p.grad.numpy() for n, p in layer.named_parameters()}, spec)
    found = {**{n: t.grad.numpy() for n, t in leaves.items()}, **parameters.arrays()}
    for tensor, grad in exact.grads.items():
        distance = judge(found[tensor], grad, limits[f"grads.{tensor}"])
        assert distance.ok, (tensor, distance)


def test_checkpoints_go_both_ways() -> None:
    for kind in ({}, {"bias": False}, {"kdim": 6, "add_bias_kv": True}):
        spec = mb.MHASpec(16, 4, **kind)
        own = torch.nn.MultiheadAttention(16, 4, **kind)
        layer = dropin(spec)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        own.load_state_dict(torch.load(file))
        layer.load_state_dict(own.state_dict())
        assert mb.extract(layer) == mb.extract(own)


def test_manual_seed_and_pytorchs_distributions() -> None:
    mb.manual_seed(7)
    first = mb.extract(dropin(mb.MHASpec(128, 8)))[1]
    mb.manual_seed(7)
    assert mb.extract(dropin(mb.MHASpec(128, 8)))[1] == first
    assert mb.extract(dropin(mb.MHASpec(128, 8)))[1] != first
    own = mb.extract(torch.nn.MultiheadAttention(128, 8, add_bias_kv=True))[1].arrays()
    ours = mb.extract(dropin(mb.MHASpec(128, 8, add_bias_kv=True)))[1].arrays()
    for name, array in ours.items():
        assert array.std() == pytest.approx(own[name].std(), rel=0.25 if array.ndim == 1 else 0.02), name
        assert not name.endswith("_bias") or not array.any()
    for seed, error in (
        (-1, ArgumentError),
        (2**32, ArgumentError),
        (1.5, ArgumentTypeError),
        (True, ArgumentTypeError),
    ):
        with pytest.raises(error):
            mb.manual_seed(seed)  # type: ignore[arg-type]


def test_it_is_a_module_like_any_other() -> None:
    from mhabridge.adapters.torch import MultiheadAttention

    model = torch.nn.ModuleDict(
        {"attention": MultiheadAttention(16, 4, 0.5, batch_first=True), "norm": torch.nn.LayerNorm(16)}
    )
    assert model.training
    assert "attention.in_proj_weight" in model.state_dict()
    x = torch.randn(2, 3, 16)
    still, again = (model.eval()["attention"](x, x, x)[0] for _ in range(2))
    assert torch.equal(still, again)
    assert not torch.equal(model.train()["attention"](x, x, x)[0], still)
    other = copy.deepcopy(model).eval()
    assert torch.equal(other["attention"](x, x, x)[0], still)
    assert "MultiheadAttention" in repr(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).eval()["attention"](x, x, x)[0], still)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_half_and_double(dtype: str) -> None:
    spec = spec_of("plain", dtype=dtype)
    layer = dropin(spec)
    assert layer.in_proj_weight.dtype == getattr(torch, dtype)
    x = torch.randn(3, 2, 16).to(getattr(torch, dtype))
    mask = torch.randn(3, 3)  # float32: PyTorch's own layer refuses it
    output, attention = layer(x, x, x, attn_mask=mask)
    assert output.dtype == attention.dtype == getattr(torch, dtype)
    with pytest.raises(ArgumentError, match="as the layer's weights have"):
        layer(x.float() if dtype != "float32" else x.double(), x, x)


def test_a_mask_beyond_the_dtypes_range_stays_finite() -> None:
    layer = dropin(spec_of("plain", dtype="float16"))
    x = torch.randn(3, 2, 16).half()
    output, _ = layer(x, x, x, attn_mask=torch.full((3, 3), -1e9))
    assert torch.isfinite(output).all()


def test_autocast() -> None:
    layer = dropin(spec_of("plain"))
    x = torch.randn(3, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(x, x, x, is_causal=True)
    torch.testing.assert_close(output.float(), layer(x, x, x, is_causal=True)[0], rtol=0.05, atol=0.05)


def test_compile_and_export() -> None:
    layer = dropin(spec_of("plain", batch_first=True))
    x = torch.randn(2, 3, 16)
    mask = torch.ones(3, 3).triu(1).bool()
    expected = layer(x, x, x, attn_mask=mask)[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, attn_mask=mask)[0], expected)
    exported = torch.export.export(layer, (x, x, x), {"attn_mask": mask})
    torch.testing.assert_close(exported.module()(x, x, x, attn_mask=mask)[0], expected)


CROSS = {
    "padding": {"key_padding_mask": torch.arange(6) > torch.tensor([[3], [9]])},
    "rows": {"attn_mask": torch.ones(5, 6).triu(1).bool()},
    "a dead row": {"attn_mask": torch.arange(5)[:, None].expand(5, 6) == 2},
    "both": {
        "key_padding_mask": torch.arange(6) > torch.tensor([[3], [9]]),
        "attn_mask": torch.ones(5, 6).tril(-1) > 0,
    },
    "float": {"key_padding_mask": torch.linspace(-1, 1, 12).reshape(2, 6)},
    "byte": {"key_padding_mask": (torch.arange(12) % 3 == 0).byte().reshape(2, 6)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", list(CROSS))
def test_compiled_cross_attention(name: str, gradients: bool) -> None:
    """With a backend that looks at what each operation does to memory, as the default one does."""
    layer = dropin(spec_of("plain", batch_first=True))
    query, key = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    call = {**CROSS[name], "need_weights": False}
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(gradients):
        found, expected = (one(query, key, key, **call)[0] for one in (compiled, layer))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # by PyTorch, about itself
def test_exported_with_an_open_batch(dtype: Any, composed: bool, strict: bool) -> None:
    spec = mb.MHASpec(8, 2, batch_first=True, residual=composed, add_zero_attn=composed)

    class Model(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.attention = mb.build(spec, "torch", mode="composed").eval()

        def forward(self, x: Any, mask: Any) -> Any:
            return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    model, batch = Model(), torch.export.Dim("batch", min=2, max=64)
    sizes = {"x": {0: batch}, "mask": {0: batch}}
    with torch.no_grad():
        example = (torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=dtype))
        exported = torch.export.export(model, example, dynamic_shapes=sizes, strict=strict).run_decompositions()
        other = (torch.randn(3, 5, 8), (torch.arange(15) % 5 == 4).to(dtype).reshape(3, 5))
        torch.testing.assert_close(exported.module()(*other), model(*other))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # the fast path, in PyTorch's own layer too
def test_vectorised_over_masks() -> None:
    layer, x = dropin(spec_of("plain", batch_first=True)), torch.randn(2, 5, 16)
    masks = torch.arange(5) >= torch.tensor([3, 5, 0])[:, None, None].expand(3, 2, 1)
    with torch.no_grad():
        found = torch.func.vmap(lambda mask: layer(x, x, x, key_padding_mask=mask, need_weights=False)[0])(masks)
        expected = [layer(x, x, x, key_padding_mask=mask, need_weights=False)[0] for mask in masks]
    torch.testing.assert_close(found, torch.stack(expected), equal_nan=True)
    assert found[2].isnan().all()


def test_integers_need_a_look_at_their_values() -> None:
    layer, x = dropin(spec_of("plain", batch_first=True)), torch.randn(2, 5, 16)

    def call(mask: Any) -> Any:
        return layer(x, x, x, key_padding_mask=mask)[0]

    mask = torch.zeros(2, 5, dtype=torch.int64)
    assert call(mask).isfinite().all()
    with pytest.raises(UnsupportedError, match="key_padding_mask: given a mask of int64, in a call that is compiled"):
        torch.func.vmap(call)(mask[None])
    with pytest.raises(UnsupportedError, match="key_padding_mask"):
        torch.export.export(layer, (x, x, x), {"key_padding_mask": mask}, strict=False)
    rows = torch.zeros(1, 5, 5)
    with pytest.raises(UnsupportedError, match="fully_masked: given 'error'"):
        torch.func.vmap(lambda mask: mb.attend(layer, x, x, x, attn_mask=mask, fully_masked="error")[0])(rows)


def test_inside_an_encoder_layer_it_is_not_gone_round() -> None:
    """PyTorch's fast path for the whole layer drops is_causal, in evaluation only."""
    layer = torch.nn.TransformerEncoderLayer(16, 4, 8, batch_first=True, dropout=0.0)
    layer.self_attn = dropin(spec_of("plain", batch_first=True))
    x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[3], [5]])
    for call in ({"is_causal": True}, {"is_causal": True, "src_key_padding_mask": padding}):
        trained = layer.train()(x, **call)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x, **call), trained)
            again = copy.deepcopy(layer)(x, **call)
        torch.testing.assert_close(again, trained)
    assert not torch.allclose(layer(x, is_causal=True), layer(x))
    other = torch.nn.Linear(16, 16)
    other.load_state_dict(layer.self_attn.out_proj.state_dict())
    layer.self_attn.out_proj = other  # as tools do that change parts of a model
    with torch.no_grad():
        torch.testing.assert_close(layer(x, **call), trained)


def pruned(layer: Any) -> None:
    torch.nn.utils.prune.l1_unstructured(layer, "in_proj_weight", 0.3)


def normed(layer: Any) -> None:
    torch.nn.utils.spectral_norm(layer, "in_proj_weight")


@pytest.mark.parametrize("change", [pruned, normed])
def test_weights_that_a_hook_makes_are_refused(change: Any) -> None:
    """They are of the layer's last call; the drop-in's own call makes them first."""
    import torch.nn.utils.prune
    from mhabridge.adapters.torch import MultiheadAttention

    x = torch.randn(3, 2, 16)
    for layer in (torch.nn.MultiheadAttention(16, 4), MultiheadAttention(16, 4)):
        change(layer)
        for use in (lambda: mb.attend(layer, x, x, x), lambda: mb.extract(layer)):  # noqa: B023
            with pytest.raises(UnsupportedError, match="in_proj_weight: given a tensor that a hook makes"):
                use()
        assert layer(x, x, x)[0].isfinite().all()


def test_parts_whose_weights_a_hook_makes_are_refused() -> None:
    """``out_proj`` is never called, so its hook never runs; a part of a transformer is moved, and not called."""
    import torch.nn.utils.prune

    x = torch.randn(3, 2, 16)
    layer = torch.nn.MultiheadAttention(16, 4)
    torch.nn.utils.prune.l1_unstructured(layer.out_proj, "weight", 0.3)
    stack = torch.nn.TransformerEncoderLayer(16, 4, 8)
    torch.nn.utils.prune.l1_unstructured(stack.linear1, "weight", 0.3)
    for use in (lambda: mb.attend(layer, x, x, x), lambda: mb.extract(layer)):
        with pytest.raises(UnsupportedError, match=r"out_proj\.weight: given a tensor that a hook makes"):
            use()
    with pytest.raises(UnsupportedError, match=r"linear1\.weight: given a tensor that a hook makes"):
        mb.extract(stack)


def test_parametrized_weights_are_their_own() -> None:
    layer, x = torch.nn.MultiheadAttention(16, 4), torch.randn(3, 2, 16)
    torch.nn.utils.parametrizations.weight_norm(layer, "in_proj_weight")
    with torch.no_grad():
        layer.parametrizations.in_proj_weight.original0.mul_(2.0)
    torch.testing.assert_close(mb.attend(layer, x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.ones(3, 2, 8)}, ArgumentError, "query"),
        ({"query": torch.ones(3, 2, 16, dtype=torch.int64)}, ArgumentTypeError, "int64"),
        ({"query": np.ones((3, 2, 16), "f4")}, ArgumentTypeError, "a tensor of PyTorch"),
        ({"value": torch.ones(4, 2, 16)}, ArgumentError, "value"),
        ({"key": torch.ones(3, 1, 16), "value": torch.ones(3, 1, 16)}, ArgumentError, "the same batch"),
        ({"attn_mask": torch.zeros(1, 3)}, ArgumentError, "attn_mask"),
        ({"attn_mask": torch.full((3, 3), 2)}, ArgumentError, "2 in a mask"),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.complex64)}, ArgumentTypeError, "complex64"),
        ({"key_padding_mask": np.zeros((2, 3), bool)}, ArgumentTypeError, "key_padding_mask"),
        ({"need_weights": 1}, ArgumentTypeError, "need_weights"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    call: dict[str, Any] = {name: torch.ones(3, 2, 16) for name in ("query", "key", "value")}
    with pytest.raises(error, match=words):
        dropin(spec_of("plain"))(**{**call, **change})


def test_refusals_of_the_constructor_are_the_specs() -> None:
    from mhabridge.adapters.torch import MultiheadAttention

    with pytest.raises(ArgumentError, match="multiple of num_heads"):
        MultiheadAttention(10, 4)
    with pytest.raises(ArgumentError, match=r"\[0, 1\]"):
        MultiheadAttention(8, 2, dropout=1.5)


def test_native_mode_refuses_what_the_native_layer_cannot_do() -> None:
    layer = mb.build(mb.MHASpec(16, 4), "torch")
    x = torch.ones(3, 2, 16)
    with pytest.raises(UnsupportedError, match="native"):
        mb.attend(layer, x, x, x, is_causal=True, fully_masked="zero", mode="native")
    with pytest.raises(ArgumentError, match="mode"):
        mb.attend(layer, x, x, x, mode="fast")


def test_compiled_with_a_symbolic_float() -> None:
    x = torch.ones(2, 3, 8)
    layer = dropin(mb.MHASpec(8, 2, batch_first=True)).eval()
    found = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")(x, x, x)[0]
    assert torch.allclose(found, layer(x, x, x)[0])
