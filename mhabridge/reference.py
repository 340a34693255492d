"""Multi-head attention in NumPy at float64, forward and backward: the judge.

Written to be read beside Vaswani et al., 2017, "Attention Is All You Need", section 3.2, with the features that
frameworks
add to it. With x the inputs, one head at a time (every array below carries the axes N, H in front):

    Q = x_q Wq^T + bq        K = [x_k Wk^T + bk; bias_k; 0]        V = [x_v Wv^T + bv; bias_v; 0]
    A = softmax(scale Q K^T + added), with blocked positions at -inf
    out = dropout(concat_h(dropout(A) V) Wo^T + bo) (+ x_q with ``residual``)

The same formulas can be computed in another dtype (``Arithmetic``): that shows what rounding alone does to a result.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy as np

from mhabridge import dtypes
from mhabridge.calls import Call, Result
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

Matmul = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The numbers that the formulas are computed in.

    Args:
        cast: turns an array into the working dtype.
        matmul: the product of two arrays of that dtype.
        exp: the exponential of one.
        store: what keeping a result in that dtype does to it.
    """

    cast: Callable[[np.ndarray], np.ndarray]
    matmul: Matmul
    exp: Callable[[np.ndarray], np.ndarray] = np.exp
    store: Callable[[np.ndarray], np.ndarray] = np.asarray


FLOAT64 = Arithmetic(dtypes.to_float64, np.matmul)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What the backward pass needs from the forward pass."""

    query: np.ndarray  # (N, H, L, d)
    key: np.ndarray  # (N, H, S', d), S' with the extra columns
    value: np.ndarray  # (N, H, S', dv)
    probabilities: np.ndarray  # softmax, (N, H, L, S')
    attention: np.ndarray  # after dropout
    context: np.ndarray  # (N, L, H * dv)
    output: np.ndarray  # (N, L, out)
    keep: np.ndarray | None  # dropout on the weights: 0 or 1 / (1 - p)
    out_keep: np.ndarray | None


def attend(
    spec: MHASpec, weights: MHAWeights, call: Call, *, arithmetic: Arithmetic = FLOAT64, seed: int = 0
) -> Result:
    """The attention's output, weights and gradients.

    Args:
        spec: the layer.
        weights: its parameters, of any dtype.
        call: the call; arrays of any of the four dtypes.
        arithmetic: what to compute in; float64 unless another is wanted.
        seed: of the dropout masks, which are drawn only when ``call.training`` and a dropout is not 0.

    Returns:
        output (N, L, out_features); attn_weights (N, H, L, S') or averaged (N, L, S'), after dropout as PyTorch returns
        them; grads by name, with "mask" (N, H, L, S) for the added mask.

    Example:
        >>> spec = MHASpec(4, 2, batch_first=True)
        >>> x = np.ones((1, 3, 4))
        >>> result = attend(spec, MHAWeights.random(spec), Call(x, x, x))
        >>> result.attn_weights[0].tolist() == [[1 / 3] * 3] * 3
        True
    """
    parameters = {name: arithmetic.cast(array) for name, array in weights.arrays().items()}
    arrays = tuple(arithmetic.cast(array) for array in (call.query, call.key, call.value))
    with np.errstate(all="ignore"):  # NaN and inf are results here, and are judged as such
        forward = _forward(spec, parameters, arrays, call, arithmetic, np.random.default_rng(seed))
        grads = _backward(spec, parameters, arrays, call, forward, arithmetic) if call.wants_grads else {}
    attention = forward.attention if call.need_weights else None
    if attention is not None and call.average_attn_weights:
        attention = attention.mean(axis=1)
    return Result(forward.output, attention, grads, ("computed by the NumPy reference",))


def score_rows(spec: MHASpec, weights: MHAWeights, call: Call) -> np.ndarray:
    """The largest score of each row after masking, (N, H, L), in float64; -inf for a fully masked row."""
    parameters = {name: dtypes.to_float64(array) for name, array in weights.arrays().items()}
    query, key = dtypes.to_float64(call.query), dtypes.to_float64(call.key)
    q = _project(query, "q", parameters, spec, np.matmul)
    k = _append(_project(key, "k", parameters, spec, np.matmul), "bias_k", parameters, spec)
    largest: np.ndarray = _scores(q, k, spec, call, FLOAT64).max(axis=-1, initial=-np.inf)
    return largest


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward(
    spec: MHASpec,
    parameters: dict[str, np.ndarray],
    arrays: tuple[np.ndarray, ...],
    call: Call,
    arithmetic: Arithmetic,
    rng: np.random.Generator,
) -> _Forward:
    matmul = arithmetic.matmul
    query = _project(arrays[0], "q", parameters, spec, matmul)
    key = _append(_project(arrays[1], "k", parameters, spec, matmul), "bias_k", parameters, spec)
    value = _append(_project(arrays[2], "v", parameters, spec, matmul), "bias_v", parameters, spec)
    scores = _scores(query, key, spec, call, arithmetic)
    probabilities = _softmax(scores, call.fully_masked, arithmetic)
    keep = _dropout(spec.dropout, probabilities.shape, call, arithmetic, rng)
    attention = probabilities if keep is None else probabilities * keep
    context = _join_heads(matmul(attention, value))
    output = context if spec.out_proj_size == 0 else _linear(context, "out", parameters, matmul)
    out_keep = _dropout(spec.out_dropout, output.shape, call, arithmetic, rng)
    output = output if out_keep is None else output * out_keep
    output = output + arrays[0] if spec.residual else output
    if call.fully_masked == "nan":  # with no output projection only that head's features would be NaN by themselves
        output = np.where(_fully_masked(scores).any(axis=1)[..., None], np.asarray(np.nan, output.dtype), output)
    return _Forward(query, key, value, probabilities, attention, context, output, keep, out_keep)


def _linear(x: np.ndarray, name: str, parameters: dict[str, np.ndarray], matmul: Matmul) -> np.ndarray:
    """Y = X @ W^T + b."""
    y = matmul(x, parameters[f"{name}_weight"].T)
    bias = parameters.get(f"{name}_bias")
    return y if bias is None else y + bias


def _project(x: np.ndarray, name: str, parameters: dict[str, np.ndarray], spec: MHASpec, matmul: Matmul) -> np.ndarray:
    """(N, T, features) to (N, H, T, head size); without a projection every head gets the whole tensor."""
    if getattr(spec, f"{name}_proj_size") == 0:
        return np.repeat(x[:, None], spec.num_heads, axis=1)
    y = _linear(x, name, parameters, matmul)
    n, t, features = y.shape
    return y.reshape(n, t, spec.num_heads, features // spec.num_heads).transpose(0, 2, 1, 3)


def _append(x: np.ndarray, bias: str, parameters: dict[str, np.ndarray], spec: MHASpec) -> np.ndarray:
    """Append the learned vector (add_bias_kv) and the zero vector (add_zero_attn) as source positions, in that
    order.
    """
    n, heads, _, size = x.shape
    columns = [x]
    if spec.add_bias_kv:
        columns.append(np.broadcast_to(parameters[bias].reshape(1, heads, 1, size), (n, heads, 1, size)))
    if spec.add_zero_attn:
        columns.append(np.zeros((n, heads, 1, size), x.dtype))
    return np.concatenate(columns, axis=2)


def _scores(query: np.ndarray, key: np.ndarray, spec: MHASpec, call: Call, arithmetic: Arithmetic) -> np.ndarray:
    """scale Q K^T + added, -inf where blocked, (N, H, L, S'); the extra columns are always open."""
    scale = np.asarray(spec.score_scale).astype(query.dtype)
    scores = arithmetic.matmul(query * scale, key.swapaxes(-1, -2))
    source = scores.shape[-1] - spec.extra_columns
    if call.added is not None:
        scores[..., :source] += arithmetic.cast(call.added)
    if call.blocked is not None:
        np.copyto(scores[..., :source], np.asarray(-np.inf, scores.dtype), where=call.blocked)
    return scores


def _softmax(scores: np.ndarray, fully_masked: str, arithmetic: Arithmetic) -> np.ndarray:
    """Softmax over the last axis; a row of nothing but -inf becomes NaN, or 0 with the policy "zero"."""
    if not scores.shape[-1]:
        return scores
    largest = scores.max(axis=-1, keepdims=True)
    exponentials = arithmetic.exp(scores - largest)
    probabilities = arithmetic.store(exponentials / exponentials.sum(axis=-1, keepdims=True))
    if fully_masked == "zero":
        dead = _fully_masked(scores)[..., None]
        probabilities = np.where(dead, np.zeros((), scores.dtype), probabilities)
    return probabilities


def _fully_masked(scores: np.ndarray) -> np.ndarray:
    dead: np.ndarray = np.isneginf(scores).all(axis=-1) & bool(scores.shape[-1])
    return dead


def _dropout(
    probability: float, shape: tuple[int, ...], call: Call, arithmetic: Arithmetic, rng: np.random.Generator
) -> np.ndarray | None:
    """0 with the given probability, else 1 / (1 - probability); None when no dropout is active."""
    if not call.training or probability == 0.0:
        return None
    if probability == 1.0:
        return arithmetic.cast(np.zeros(shape))
    return arithmetic.cast((rng.random(shape) >= probability) / (1.0 - probability))


def _join_heads(x: np.ndarray) -> np.ndarray:
    """(N, H, L, d) to (N, L, H * d)."""
    n, heads, length, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(n, length, heads * size)


def _split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """(N, L, H * d) to (N, H, L, d)."""
    n, length, features = x.shape
    return x.reshape(n, length, heads, features // heads).transpose(0, 2, 1, 3)


# -- backward ----------------------------------------------------------------------------------------------------------


def _backward(
    spec: MHASpec,
    parameters: dict[str, np.ndarray],
    arrays: tuple[np.ndarray, ...],
    call: Call,
    forward: _Forward,
    arithmetic: Arithmetic,
) -> dict[str, np.ndarray]:
    """The gradient of ``sum(grad_output * output) + sum(grad_attn_weights * attn_weights)``."""
    matmul = arithmetic.matmul
    grads: dict[str, np.ndarray] = {}
    if call.grad_output is None:
        return _backward_of_weights(spec, parameters, arrays, call, forward, arithmetic)
    grad_output = arithmetic.cast(call.grad_output)
    grad_projected = grad_output if forward.out_keep is None else grad_output * forward.out_keep
    grad_context = _linear_backward(grad_projected, forward.context, "out", spec, parameters, grads, matmul)
    grad_context = _split_heads(grad_context, spec.num_heads)
    grad_value = matmul(forward.attention.swapaxes(-1, -2), grad_context)
    grad_value = _cut(grad_value, "bias_v", spec, grads)
    grads["value"] = _project_backward(grad_value, arrays[2], "v", spec, parameters, grads, matmul)
    grad_attention = matmul(grad_context, forward.value.swapaxes(-1, -2)) + _returned(call, forward, arithmetic)
    _backward_of_scores(grad_attention, spec, parameters, arrays, call, forward, grads, arithmetic)
    if spec.residual:
        grads["query"] = grads["query"] + grad_output
    return grads


def _backward_of_weights(
    spec: MHASpec,
    parameters: dict[str, np.ndarray],
    arrays: tuple[np.ndarray, ...],
    call: Call,
    forward: _Forward,
    arithmetic: Arithmetic,
) -> dict[str, np.ndarray]:
    """The loss does not see the output: nothing flows through it, not even the NaN of a fully masked row."""
    names = {name for name in parameters if name.startswith(("v_", "out_")) or name == "bias_v"}
    grads = {name: np.zeros_like(parameters[name]) for name in names}
    grads["value"] = np.zeros_like(arrays[2])
    grad_attention = np.broadcast_to(_returned(call, forward, arithmetic), forward.attention.shape)
    _backward_of_scores(grad_attention, spec, parameters, arrays, call, forward, grads, arithmetic)
    return grads


def _backward_of_scores(
    grad_attention: np.ndarray,
    spec: MHASpec,
    parameters: dict[str, np.ndarray],
    arrays: tuple[np.ndarray, ...],
    call: Call,
    forward: _Forward,
    grads: dict[str, np.ndarray],
    arithmetic: Arithmetic,
) -> None:
    """From the attention weights back to the query, the key and the mask."""
    matmul = arithmetic.matmul
    grad_p = grad_attention if forward.keep is None else grad_attention * forward.keep
    p = forward.probabilities
    grad_scores = p * (grad_p - (p * grad_p).sum(axis=-1, keepdims=True))
    scale = np.asarray(spec.score_scale).astype(p.dtype)
    grad_query = matmul(grad_scores, forward.key) * scale
    grad_key = matmul(grad_scores.swapaxes(-1, -2), forward.query) * scale
    grad_key = _cut(grad_key, "bias_k", spec, grads)
    grads["query"] = _project_backward(grad_query, arrays[0], "q", spec, parameters, grads, matmul)
    grads["key"] = _project_backward(grad_key, arrays[1], "k", spec, parameters, grads, matmul)
    if call.mask_grad:
        grads["mask"] = grad_scores[..., : grad_scores.shape[-1] - spec.extra_columns]


def _returned(call: Call, forward: _Forward, arithmetic: Arithmetic) -> Any:
    """What the returned attention weights contribute; an average spreads its gradient evenly over the heads."""
    if call.grad_attn_weights is None:
        return np.zeros((), forward.attention.dtype)
    grad = arithmetic.cast(call.grad_attn_weights)
    if not call.average_attn_weights:
        return grad
    heads = forward.attention.shape[1]
    return grad[:, None] / np.asarray(heads).astype(grad.dtype)


def _linear_backward(
    grad: np.ndarray,
    x: np.ndarray,
    name: str,
    spec: MHASpec,
    parameters: dict[str, np.ndarray],
    grads: dict[str, np.ndarray],
    matmul: Matmul,
) -> np.ndarray:
    """dW = dY^T X, db = sum dY, dX = dY W."""
    if getattr(spec, f"{name}_proj_size") == 0:
        return grad
    rows = grad.reshape(-1, grad.shape[-1])
    grads[f"{name}_weight"] = matmul(rows.T, x.reshape(-1, x.shape[-1]))
    if f"{name}_bias" in parameters:
        grads[f"{name}_bias"] = matmul(np.ones((1, len(rows)), rows.dtype), rows)[0]  # the sum over rows
    return matmul(grad, parameters[f"{name}_weight"])


def _project_backward(
    grad: np.ndarray,
    x: np.ndarray,
    name: str,
    spec: MHASpec,
    parameters: dict[str, np.ndarray],
    grads: dict[str, np.ndarray],
    matmul: Matmul,
) -> np.ndarray:
    if getattr(spec, f"{name}_proj_size") == 0:  # every head got the whole tensor
        return np.asarray(grad.sum(axis=1))
    return _linear_backward(_join_heads(grad), x, name, spec, parameters, grads, matmul)


def _cut(grad: np.ndarray, bias: str, spec: MHASpec, grads: dict[str, np.ndarray]) -> np.ndarray:
    """Take the appended positions off again, keeping the gradient of the learned one."""
    source = grad.shape[2] - spec.extra_columns
    if spec.add_bias_kv:
        grads[bias] = grad[:, :, source].sum(axis=0).reshape(-1)
    return grad[:, :, :source]
