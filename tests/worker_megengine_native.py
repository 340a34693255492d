"""What tests/test_native_layers.py has MegEngine do, in a worker: one word for each fact. Works on Python 3.8."""

from __future__ import annotations

import megengine
import megengine.module
import numpy as np
from megengine.autodiff import GradManager
from mhabridge.adapters.megengine import MultiheadAttention

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
ALL = {"need_weights": True, "average_attn_weights": True}


def look(framework, payload):
    """The word for one fact about the native module or the drop-in, or the name of the error."""
    make = dropin if payload["dropin"] else megengine.module.MultiHeadAttention
    try:
        return FACTS[payload["fact"]](make)
    except Exception as error:  # MegEngine's errors of all kinds are what is looked at
        return type(error).__name__


def dropin(*args, attn_dropout=0.0, **kwargs):
    """The drop-in, with the native module's name for the dropout and its only axis order."""
    return MultiheadAttention(*args, dropout=attn_dropout, batch_first=True, **kwargs)


def answer(layer, x=X, **call):
    """Output and weights as arrays; MegEngine's late errors are raised here."""
    tensors = {name: megengine.tensor(item) if isinstance(item, np.ndarray) else item for name, item in call.items()}
    output, weights = layer(*[megengine.tensor(x)] * 3, **{**ALL, **tensors})
    return output.numpy(), weights.numpy()


def blocks(weights, mask):
    return bool(np.array_equal(weights == 0.0, np.broadcast_to(mask, weights.shape)))


CAUSAL = np.triu(np.ones((3, 3), bool), 1)
PADDING = np.array([[False, False, True], [False, True, True]])


def bool_mask(make):
    return "masked" if blocks(answer(make(8, 2), attn_mask=CAUSAL)[1], CAUSAL) else "not masked"


def low_scores(make):
    mask = np.zeros((3, 3), np.float32)
    mask[1] = -1e9
    output = answer(make(8, 2), attn_mask=mask)[0]
    return "NaN" if np.isnan(output[:, 1]).all() else "finite"


def gradient(make, through, of, training):
    layer = make(8, 2)
    layer.train(training)
    leaves = {"query": megengine.Parameter(X), "mask": megengine.Parameter(np.full((3, 3), 0.5, np.float32))}
    manager = GradManager().attach(list(leaves.values()))
    with manager:
        answers = layer(leaves["query"], *[megengine.tensor(X)] * 2, attn_mask=leaves["mask"], **ALL)
        manager.backward((answers[through] ** 2).sum())
    grad = leaves[of].grad
    return "given" if grad is not None and grad.numpy().any() else "lost"


def dropout(make):
    layer = make(8, 2, attn_dropout=0.9)
    return "active" if not answer(layer, np.ones((2, 16, 8), np.float32))[1].all() else "lost"


def causal(make):
    return "causal" if blocks(answer(make(8, 2), is_causal=True)[1], CAUSAL) else "not causal"


def causal_and_padding(make):
    mask = np.where(PADDING, -np.inf, 0.0).astype(np.float32)  # a bool mask would race
    weights = answer(make(8, 2), key_padding_mask=mask, is_causal=True)[1]
    for word, blocked in (("both", CAUSAL | PADDING[:, None]), ("the padding", PADDING[:, None])):
        if blocks(weights, blocked):
            return word
    return "neither"


def unbatched(make):
    return "(L, E)" if answer(make(8, 2), X[0])[0].shape == (3, 8) else "another shape"


def added_columns(make):
    return "taken" if answer(make(8, 2, add_bias_kv=True))[1].shape == (2, 3, 4) else "not added"


def fresh_scale(make):
    in_weights = make(128, 8).io_weight_bias.numpy().reshape(-1)[: 3 * 128 * 128]
    ratio = np.abs(in_weights).max() / np.sqrt(6 / (4 * 128))
    return {1: "PyTorch's", 11: "1/11 of PyTorch's"}.get(round(1 / ratio), "another")


def text(make):
    return "a text" if repr(make(8, 2)) else "nothing"


FACTS = {
    "bool-mask": bool_mask,
    "low-scores": low_scores,
    "evaluation-gradient": lambda make: gradient(make, 0, "query", False),
    "weights-gradient": lambda make: gradient(make, 1, "query", True),
    "mask-gradient": lambda make: gradient(make, 0, "mask", True),
    "dropout": dropout,
    "causal": causal,
    "causal-and-padding": causal_and_padding,
    "unbatched": unbatched,
    "added-columns": added_columns,
    "fresh-scale": fresh_scale,
    "repr": text,
}


def names(framework, payload):
    """All facts."""
    return list(FACTS)
