"""Layers and calls that several test files run: one list, so that every backend answers the same questions."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhabridge import MHASpec, MHAWeights, reference
from mhabridge.backends.running import Prepared, prepare, restore
from mhabridge.calls import Result
from mhabridge.diff.inputs import random_inputs

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "no key bias": {"k_bias": False},
    "only an out bias": {"bias": False, "out_bias": True},
    "kdim and vdim": {"kdim": 6, "vdim": 10},
    "only vdim": {"vdim": 5, "batch_first": True},
    "one head": {"num_heads": 1},
    "as many heads as features": {"num_heads": 16},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
    "projection sizes": {"q_proj_size": 8, "k_proj_size": 8, "v_proj_size": 12, "out_proj_size": 5, "scale": 0.5},
    "no value projection": {"v_proj_size": 0, "out_proj_size": 5},
    "no query and key projection": {"q_proj_size": 0, "k_proj_size": 0},
    "no output projection": {"out_proj_size": 0},
    "scale": {"scale": 0.3},
    "residual": {"residual": True},
}

N, L, S = 2, 5, 7


def spec_of(name: str, **more: Any) -> MHASpec:
    """A spec of ``SPECS`` with E = 16 and H = 4 unless it says otherwise."""
    return MHASpec(**{"embed_dim": 16, "num_heads": 4, **SPECS[name], **more})


def _padding() -> np.ndarray:
    return np.arange(S) >= np.array([S, S - 3])[:, None]


def masks_of(name: str, heads: int = 4) -> dict[str, Any]:
    """The mask arguments of one kind; no row is fully masked."""
    rng = np.random.default_rng(5)
    blocked = rng.random((N * heads, L, S)) < 0.4
    blocked[..., 0] = False
    added = rng.standard_normal((N * heads, L, S))
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "padding bool": {"key_padding_mask": _padding()},
        "padding byte": {"key_padding_mask": _padding().astype(np.uint8) * 7},
        "padding float": {"key_padding_mask": np.where(_padding(), -np.inf, 0.25).astype(np.float32)},
        "attn bool": {"attn_mask": blocked[0]},
        "attn byte": {"attn_mask": blocked[0].astype(np.uint8)},
        "attn int": {"attn_mask": blocked[0].astype(np.int64)},
        "attn float": {"attn_mask": added[0].astype(np.float32)},
        "attn half": {"attn_mask": added[0].astype(np.float16)},
        "attn double": {"attn_mask": added[0]},
        "attn per head bool": {"attn_mask": blocked},
        "attn per head float": {"attn_mask": np.where(blocked, -np.inf, added).astype(np.float32)},
        "causal": {"is_causal": True},
        "causal and padding": {"is_causal": True, "key_padding_mask": _padding()},
        "padding bool and attn float": {"key_padding_mask": _padding(), "attn_mask": added[0].astype(np.float32)},
        "padding float and attn bool": {
            "key_padding_mask": np.linspace(-2, 2, N * S, dtype=np.float32).reshape(N, S),
            "attn_mask": blocked,
        },
        "soft -1e9": {"attn_mask": np.where(blocked[0], np.float32(-1e9), np.float32(0))},
        "all three": {"is_causal": True, "key_padding_mask": _padding(), "attn_mask": added.astype(np.float16)},
    }
    return kinds[name]


MASKS = (
    "none",
    "padding bool",
    "padding byte",
    "padding float",
    "attn bool",
    "attn byte",
    "attn int",
    "attn float",
    "attn half",
    "attn double",
    "attn per head bool",
    "attn per head float",
    "causal",
    "causal and padding",
    "padding bool and attn float",
    "padding float and attn bool",
    "soft -1e9",
    "all three",
)


def material(spec: MHASpec, seed: int = 0) -> tuple[MHAWeights, tuple[np.ndarray, ...]]:
    """Weights and inputs (N, L, S as above) of a spec."""
    inputs = random_inputs(spec, seed, batch=N, target=L, source=S)
    return MHAWeights.random(spec, seed), tuple(inputs.values())


def reference_answer(
    spec: MHASpec, weights: MHAWeights, arrays: tuple[np.ndarray, ...], **call: Any
) -> tuple[Prepared, Result]:
    """The float64 reference's answer in the user's shapes."""
    prepared = prepare(spec, weights, *arrays, **call)
    return prepared, restore(prepared, reference.attend(spec, weights, prepared.call))


def output_shape(spec: MHASpec) -> tuple[int, ...]:
    return (N, L, spec.out_features) if spec.batch_first else (L, N, spec.out_features)
