"""The judge is judged: by PyTorch in float64 (forward and autograd), by finite differences, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, reference
from mhabridge.calls import Call
from tests.cases import MASKS, SPECS, L, N, S, masks_of, material, output_shape, reference_answer, spec_of

TORCH_SPECS = [
    name
    for name in SPECS
    if not {"q_proj_size", "v_proj_size", "out_proj_size", "scale", "residual"} & set(SPECS[name])
]


def test_one_head_of_two_features_by_hand() -> None:
    spec = MHASpec(2, 1, batch_first=True, bias=False, dtype="float64")
    eye = np.eye(2)
    weights = MHAWeights(q_weight=eye, k_weight=eye, v_weight=2 * eye, out_weight=np.array([[0.0, 1.0], [1.0, 0.0]]))
    query, key = np.array([[[np.sqrt(2.0), 0.0]]]), np.array([[[np.log(3.0), 5.0], [0.0, 7.0]]])
    result = reference.attend(spec, weights, Call(query, key, np.array([[[1.0, 2.0], [3.0, 4.0]]])))
    assert result.attn_weights is not None
    np.testing.assert_allclose(result.attn_weights, [[[0.75, 0.25]]], rtol=1e-15)
    # context = 2 * (0.75 * [1, 2] + 0.25 * [3, 4]) = [3, 5]; the output projection swaps the two
    np.testing.assert_allclose(result.output, [[[5.0, 3.0]]], rtol=1e-15)


def torch_answer(spec: MHASpec, weights: MHAWeights, arrays: Any, call: dict[str, Any], grads: Any) -> dict[str, Any]:
    import torch

    layer = torch.nn.MultiheadAttention(
        spec.embed_dim,
        spec.num_heads,
        bias=spec.bias is not False,
        add_bias_kv=spec.add_bias_kv,
        add_zero_attn=spec.add_zero_attn,
        kdim=spec.kdim,
        vdim=spec.vdim,
        batch_first=spec.batch_first,
        dtype=torch.float64,
    )
    layer.load_state_dict({name: torch.tensor(array) for name, array in weights.to_layout("torch", spec).items()})
    leaves = {
        name: torch.tensor(a, requires_grad=True) for name, a in zip(("query", "key", "value"), arrays, strict=True)
    }
    options = {name: item for name, item in call.items() if name == "average_attn_weights"}
    for name in ("key_padding_mask", "attn_mask"):
        mask = call.get(name)
        if mask is None:
            continue
        if mask.dtype.kind == "f":
            leaves[name] = torch.tensor(mask.astype(np.float64), requires_grad=True)
            options[name] = leaves[name]
        else:
            options[name] = torch.tensor(mask != 0)
    if call.get("is_causal"):
        options = causal(options, torch)
    output, attention = layer(leaves["query"], leaves["key"], leaves["value"], **options)
    ((output * torch.tensor(grads[0])).sum() + (attention * torch.tensor(grads[1])).sum()).backward()
    full = spec.replace(bias=spec.bias is not False)
    named = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    parameters = MHAWeights.from_layout("torch", named, full).arrays()
    found = {name: parameters[name] for name in spec.parameter_shapes()}
    found.update({name: leaf.grad.numpy() for name, leaf in leaves.items()})
    return {"output": output.detach().numpy(), "attn_weights": attention.detach().numpy(), **found}


def causal(options: dict[str, Any], torch: Any) -> dict[str, Any]:
    """PyTorch wants the causal mask beside the flag; joined to the others as "blocked by either"."""
    block = torch.zeros(L, S, dtype=torch.float64).masked_fill(torch.ones(L, S).triu(1).bool(), -np.inf)
    mask = options.get("attn_mask")
    if mask is None:
        return {**options, "attn_mask": block.bool()}
    if mask.dtype == torch.bool:
        return {**options, "attn_mask": mask | block.bool()}
    return {**options, "attn_mask": mask + block}


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", TORCH_SPECS)
def test_agrees_with_pytorch_in_float64(name: str, mask: str, average: bool) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    spec = spec_of(name, dtype="float64")
    weights, arrays = material(spec)
    rng = np.random.default_rng(1)
    columns = S + spec.extra_columns
    shape = (N, L, columns) if average else (N, spec.num_heads, L, columns)
    grads = (rng.standard_normal(output_shape(spec)), rng.standard_normal(shape))
    call = {**masks_of(mask, spec.num_heads), "average_attn_weights": average}
    _, ours = reference_answer(spec, weights, arrays, grad_output=grads[0], grad_attn_weights=grads[1], **call)
    theirs = torch_answer(spec, weights, arrays, call, grads)
    for tensor, expected in theirs.items():
        found = getattr(ours, tensor) if tensor in ("output", "attn_weights") else ours.grads[tensor]
        # a float16 or float32 mask is held as such by the user; its gradient is compared in float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=tensor)


@pytest.mark.frameworks
@pytest.mark.parametrize("fully", ["rows", "one head of a row"])
def test_fully_masked_rows_are_what_float64_autograd_says(fully: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    spec = spec_of("plain", dtype="float64")
    weights, arrays = material(spec)
    mask = np.zeros((N * 4, L, S))
    mask[:4, 2] = -np.inf if fully == "rows" else 0.0
    mask[1, 2] = -np.inf
    rng = np.random.default_rng(1)
    grads = (rng.standard_normal((L, N, 16)), rng.standard_normal((N, L, S)))
    _, ours = reference_answer(spec, weights, arrays, attn_mask=mask, grad_output=grads[0], grad_attn_weights=grads[1])
    theirs = torch_answer(spec, weights, arrays, {"attn_mask": mask}, grads)
    for tensor, expected in theirs.items():
        found = getattr(ours, tensor) if tensor in ("output", "attn_weights") else ours.grads[tensor]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=tensor)  # NaN only where NaN is
    assert np.isnan(ours.output[2, 0]).all()
    assert np.isfinite(np.delete(ours.output, 2, axis=0)).all()


def test_the_zero_policy_gives_the_out_bias_and_finite_gradients() -> None:
    spec = spec_of("plain", dtype="float64")
    weights, arrays = material(spec)
    mask = np.zeros((L, S), bool)
    mask[3] = True
    grad = np.ones((L, N, 16))
    _, result = reference_answer(
        spec, weights, arrays, attn_mask=mask, fully_masked="zero", grad_output=grad, average_attn_weights=False
    )
    np.testing.assert_array_equal(result.output[3], np.broadcast_to(weights.out_bias, (N, 16)))
    assert result.attn_weights is not None
    assert not result.attn_weights[:, :, 3].any()
    assert all(np.isfinite(array).all() for array in result.grads.values())
    _, without = reference_answer(spec, weights, arrays)
    np.testing.assert_array_equal(np.delete(result.output, 3, 0), np.delete(without.output, 3, 0))


def test_nan_is_the_whole_output_row_even_without_an_output_projection() -> None:
    spec = spec_of("no output projection", dtype="float64")
    weights, arrays = material(spec)
    mask = np.zeros((N * 4, L, S), bool)
    mask[1, 2] = True  # batch 0, head 1
    _, result = reference_answer(spec, weights, arrays, attn_mask=mask, need_weights=False)
    assert np.isnan(result.output[2, 0]).all()
    assert int(np.isnan(result.output).sum()) == 16


def test_without_any_source_position_the_output_is_the_bias() -> None:
    spec = MHASpec(4, 2, batch_first=True, dtype="float64")
    weights = MHAWeights.random(spec)
    empty = np.zeros((1, 0, 4))
    _, result = reference_answer(spec, weights, (np.ones((1, 3, 4)), empty, empty))
    np.testing.assert_array_equal(result.output, np.broadcast_to(weights.out_bias, (1, 3, 4)))


def loss(spec: MHASpec, weights: MHAWeights, arrays: Any, call: dict[str, Any], grads: Any) -> float:
    _, result = reference_answer(spec, weights, arrays, **call)
    assert result.attn_weights is not None
    return float((result.output * grads[0]).sum() + (result.attn_weights * grads[1]).sum())


@pytest.mark.parametrize("name", list(SPECS))
def test_gradients_are_finite_differences(name: str) -> None:
    """Every feature of the spec, one random direction for each input, parameter and float mask."""
    spec = spec_of(name, dtype="float64")
    weights, arrays = material(spec)
    rng = np.random.default_rng(2)
    call: dict[str, Any] = {"attn_mask": rng.standard_normal((N * spec.num_heads, L, S))}
    call["key_padding_mask"] = rng.standard_normal((N, S))
    grads = (rng.standard_normal(output_shape(spec)), rng.standard_normal((N, L, S + spec.extra_columns)))
    _, result = reference_answer(spec, weights, arrays, grad_output=grads[0], grad_attn_weights=grads[1], **call)
    step = 1e-6
    for tensor, grad in result.grads.items():
        direction = rng.standard_normal(grad.shape)
        ends = []
        for sign in (1, -1):
            moved = move(tensor, sign * step * direction, weights, arrays, call)
            ends.append(loss(spec, *moved, grads))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=2e-6, abs=2e-6), tensor


def move(tensor: str, by: np.ndarray, weights: MHAWeights, arrays: Any, call: dict[str, Any]) -> tuple[Any, Any, Any]:
    places = ("query", "key", "value")
    if tensor in places:
        moved = tuple(a + by if name == tensor else a for name, a in zip(places, arrays, strict=True))
        return weights, moved, call
    if tensor in call:
        return weights, arrays, {**call, tensor: call[tensor] + by}
    tree = weights.arrays()
    return MHAWeights(**{**tree, tensor: tree[tensor] + by}), arrays, call


def test_dropout_zeroes_and_rescales_in_training_only() -> None:
    spec = MHASpec(16, 4, dropout=0.5, out_dropout=0.25, dtype="float64")
    weights, arrays = material(spec)
    _, still = reference_answer(spec, weights, arrays, average_attn_weights=False)
    _, plain = reference_answer(spec.replace(dropout=0.0, out_dropout=0.0), weights, arrays, average_attn_weights=False)
    np.testing.assert_array_equal(still.output, plain.output)
    _, trained = reference_answer(spec, weights, arrays, average_attn_weights=False, training=True)
    assert trained.attn_weights is not None
    assert still.attn_weights is not None
    kept = trained.attn_weights != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(trained.attn_weights[kept], 2 * still.attn_weights[kept], rtol=1e-12)
    assert 0.1 < (trained.output == 0).mean() < 0.4


def test_dropout_of_one_leaves_only_the_bias() -> None:
    spec = MHASpec(16, 4, dropout=1.0, dtype="float64")
    weights, arrays = material(spec)
    _, result = reference_answer(spec, weights, arrays, training=True)
    np.testing.assert_array_equal(result.output, np.broadcast_to(weights.out_bias, (L, N, 16)))


def test_large_scores_do_not_overflow() -> None:
    spec = spec_of("plain", dtype="float64")
    weights, arrays = material(spec)
    _, result = reference_answer(spec, weights, tuple(array * 2500 for array in arrays))
    assert np.isfinite(result.output).all()
    assert result.attn_weights is not None
    np.testing.assert_allclose(result.attn_weights.sum(-1), 1.0, rtol=1e-12)
