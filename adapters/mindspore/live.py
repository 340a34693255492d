"""One call of a layer that the user holds: native where that is right, else composed."""

from __future__ import annotations

import functools
from typing import Any

import mindspore
import numpy as np

from mhabridge import dropin, envelope, live, masks
from mhabridge.calls import Call
from mhabridge.checks import sizes_of
from mhabridge.errors import UnsupportedError
from mhabridge.live import Options
from mhabridge.spec import MHASpec

from .native import FRAMEWORK, compiles_cells, version
from .ops import OPS
from .parameters import named_tensors, spec_of

_NATIVE: dict[tuple[Any, ...], MHASpec] = {}  # calls that the native cell answers, known to be right
_MOST_KINDS = 4096


def attend(
    layer: Any,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
    pynative: bool = False,
) -> tuple[Any, Any]:
    """One call of a live cell: native without masks (a fully masked row would have to be looked for), else composed.

    ``pynative`` says that the mode is known to be that.

    Raises:
        UnsupportedError: the mode is "native" and the call is not one for the native cell, or the dtype has no kernels.
    """
    spec = spec_of(layer)
    options.check()
    kind = _kind_of_native(spec, inputs, key_padding_mask, attn_mask, options)
    if kind in _NATIVE and (pynative or not compiles_cells()):
        notes.append("native: mindspore.nn.MultiheadAttention")
        return _attend_native(layer, inputs, options)
    sizes = sizes_of(spec, inputs[0], inputs[1], live.check(OPS, spec, inputs, options))
    if sizes.source == 0 and not spec.extra_columns and sizes.batch * sizes.target:
        raise UnsupportedError(
            "key, value",
            given="no source position",
            expected="at least one",
            advice="A product over none is left unwritten in MindSpore 2.10; the output would be the out bias.",
        )
    masked = key_padding_mask is not None or attn_mask is not None or options.is_causal
    reason = _why_composed(spec, sizes, options, masked, pynative)
    if reason and options.mode == "native":
        raise UnsupportedError("mode", given="'native'", expected="'auto' or 'composed'", advice=reason)
    if reason:
        notes.append(f"composed: {reason}")
        if sizes.batch * sizes.target == 0:
            live.placed(OPS, sizes, key_padding_mask, attn_mask)  # raises for masks of a wrong shape
            return _nothing(spec, sizes, inputs[0], options)
        return live.attend(OPS, spec, named_tensors(layer), inputs, key_padding_mask, attn_mask, options)
    if kind is not None:
        if len(_NATIVE) >= _MOST_KINDS:
            _NATIVE.clear()
        _NATIVE[kind] = spec
    notes.append("native: mindspore.nn.MultiheadAttention")
    return _attend_native(layer, inputs, options)


def _kind_of_native(
    spec: MHASpec, inputs: tuple[Any, Any, Any], key_padding_mask: Any, attn_mask: Any, options: Options
) -> tuple[Any, ...] | None:
    """What a call without masks has in common with others of which all that is checked here is the same; else None.

    It is remembered with its spec, so no other spec has the same id.
    """
    if options.is_causal or key_padding_mask is not None or attn_mask is not None:
        return None
    query, key, value = inputs
    try:
        tensors: tuple[Any, ...] = (query.shape, query.dtype)
        if query is not key or key is not value:
            tensors = (*tensors, key.shape, value.shape, key.dtype, value.dtype)
        kind = (id(spec), type(query), type(key), type(value), options.mode, options.training, *tensors)
        hash(kind)
    except (AttributeError, TypeError):  # no tensors: to be refused
        return None
    return kind


def _why_composed(spec: MHASpec, sizes: masks.Sizes, options: Options, masked: bool, pynative: bool) -> str:
    found = _violations(spec, sizes, options.training)
    impossible = [limit for limit in found if not limit.composable]
    if impossible and mindspore.get_context("device_target") == "CPU":  # what the envelope was measured on
        raise UnsupportedError(
            ", ".join(limit.feature for limit in impossible),
            given=f"a layer that MindSpore {version()} does not compute",
            expected="one inside its envelope",
            advice=" ".join(limit.reason for limit in impossible),
        )
    if options.mode == "composed":
        return "asked for"
    if masked:
        return "MindSpore may leave a fully masked row unwritten, and whether there is one shows only in the values."
    if not pynative and compiles_cells():
        return "A native cell that was compiled for one tensor given three times answers for three tensors as for one."
    if sizes.source == 1:
        return "A native gradient over one source position, if it is the first, spoils all later ones in the process."
    return dropin.why_composed(spec) or "; ".join(limit.reason for limit in found if limit.composable)


@functools.lru_cache(maxsize=1024)
def _violations(spec: MHASpec, sizes: masks.Sizes, training: bool) -> list[envelope.Limit]:
    """The limits that a call without masks goes beyond; it may be part of a gradient, which nobody says beforehand."""
    query, key, value, grad = (
        np.broadcast_to(np.float32(0), (sizes.batch, length, features))
        for length, features in (
            (sizes.target, spec.embed_dim),
            (sizes.source, spec.key_features),
            (sizes.source, spec.value_features),
            (sizes.target, spec.out_features),
        )
    )
    call = Call(query, key, value, training=training, grad_output=grad)
    return envelope.violations(FRAMEWORK, version(), spec, call)


def _nothing(spec: MHASpec, sizes: masks.Sizes, query: Any, options: Options) -> tuple[Any, Any]:
    """The answer without a batch or a target row, not computed: gradients of products over nothing are unwritten."""
    rows = (sizes.target, sizes.source + spec.extra_columns)
    heads = () if options.average_attn_weights else (sizes.heads,)
    shape = ((sizes.batch,) if sizes.batched else ()) + heads + rows
    kind = getattr(mindspore, spec.dtype)
    output = mindspore.ops.zeros((*query.shape[:-1], spec.out_features), kind)
    return output, mindspore.ops.zeros(shape, kind) if options.need_weights else None


def _attend_native(layer: Any, inputs: tuple[Any, Any, Any], options: Options) -> tuple[Any, Any]:
    query, key, value = inputs
    own = vars(layer)  # as attributes of a cell these take as long as all that is checked of a call
    own["q_is_k"], own["k_is_v"] = query is key, key is value  # as its own __call__ sets them
    try:
        answer = mindspore.nn.MultiheadAttention.construct(
            layer,
            query,
            key,
            value,
            need_weights=options.need_weights,
            average_attn_weights=options.average_attn_weights,
        )
    finally:
        own["q_is_k"] = own["k_is_v"] = (
            False  # what a compiler finds; with both False the cell is right for any tensors
        )
    return answer[0], answer[1] if options.need_weights else None
