"""One call on live tensors: what ``mb.attend`` and the drop-in layers do, with the framework's own operations.

The masks are merged and the policy for fully masked rows is applied on the tensors' own device, without looking at
their values; only the policy "error" and masks of wide integers (which must hold 0 and 1 only) look.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import numpy as np

from mhabridge import composed, dtypes, masks
from mhabridge.calls import Call
from mhabridge.checks import check_flag, check_mode, check_shapes, sizes_of
from mhabridge.composed import Ops, Tensor
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True)
class Options:
    """What a call asks for, beside its tensors.

    Args:
        is_causal: block j > i too.
        need_weights: return the attention weights.
        average_attn_weights: averaged over heads.
        fully_masked: "nan", "zero" or "error".
        mode: "auto", "native" or "composed".
        training: dropout is active.
    """

    is_causal: bool = False
    need_weights: bool = True
    average_attn_weights: bool = True
    fully_masked: str = "nan"
    mode: str = "auto"
    training: bool = False

    def check(self) -> None:
        """Raise for a flag that is none, an unknown mode or an unknown policy."""
        for name in ("is_causal", "need_weights", "average_attn_weights", "training"):
            check_flag(getattr(self, name), name)
        check_mode(self.mode)
        masks.check_policy(self.fully_masked)


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a live layer has beyond its spec and weights.

    Args:
        training: dropout is active.
        trainable: whether each parameter, by canonical name, takes part in training.
        device: the kind of device that it is on: "cpu" or "gpu".
    """

    training: bool
    trainable: dict[str, bool]
    device: str = "cpu"

    def all_alike(self, names: list[str], target: str) -> bool:
        """Whether parameters that a framework packs into one take part in training.

        Raises:
            UnsupportedError: some do and some do not.
        """
        found = {self.trainable[name] for name in names}
        if len(found) > 1:
            frozen = [name for name in names if not self.trainable[name]]
            raise UnsupportedError(
                ", ".join(frozen),
                given="frozen, while others that are packed with them are not",
                expected=f"all of {', '.join(names)} alike: {target} is one parameter",
                advice="Freeze or unfreeze them together first.",
            )
        return found.pop() if found else False  # it stands in for what the layer does not have, and stays zero


def spec_of_values(
    embed_dim: int,
    num_heads: int,
    kdim: int | None,
    vdim: int | None,
    dropout: float,
    bias: bool,
    out_bias: bool,
    add_bias_kv: bool,
    add_zero_attn: bool,
    batch_first: bool,
    dtype: Any,
    beyond: tuple[tuple[str, Any], ...] = (),
) -> MHASpec:
    """The spec of a layer that holds these; ``beyond`` are more fields by name, which only a drop-in has.

    Example:
        >>> spec_of_values(8, 2, None, None, 0.0, True, True, False, False, True, "float16").dtype
        'float16'
    """
    return MHASpec(
        embed_dim,
        num_heads,
        kdim,
        vdim,
        dropout,
        bias,
        out_bias=out_bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        dtype=dtype,
        **dict(beyond),
    )


# A layer says what it is on every call, and a spec takes 40 microseconds to make. By position: to look up a dozen names
# takes longer than all the rest.
remembered_spec = functools.lru_cache(maxsize=1024, typed=True)(spec_of_values)


def attend(
    ops: Ops,
    spec: MHASpec,
    parameters: dict[str, Tensor],
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Output and attention weights (or None) in the user's shapes, composed.

    Args:
        ops: the framework's operations.
        spec: the layer.
        parameters: its tensors, by canonical name.
        inputs: query, key and value in the spec's axis order, or unbatched.
        key_padding_mask: (N, S), or (S,) unbatched; bool, integer or float; or None.
        attn_mask: (L, S) or (N * H, L, S); likewise.
        options: what is asked for.

    Raises:
        ArgumentError: a shape, a dtype or an option that is wrong.
        ArgumentTypeError: not a tensor of this framework.
    """
    batched = check(ops, spec, inputs, options)
    sizes = sizes_of(spec, inputs[0], inputs[1], batched)
    mask = merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    if mask is not None:
        refuse_fully_masked(ops, spec, sizes, mask, options)
    tensors = dict(zip(("query", "key", "value"), (_canonical(ops, spec, x, batched) for x in inputs)), **parameters)
    if mask is not None:
        tensors["mask"] = mask
    output, attention = composed.forward(ops, spec, tensors, _call(options))
    output = _restored(ops, spec, output, batched)
    if not options.need_weights:
        return output, None
    return output, attention if batched else ops.reshape(attention, ops.shape(attention)[1:])


def check(ops: Ops, spec: MHASpec, inputs: tuple[Any, Any, Any], options: Options) -> bool:
    """Whether the call is batched, once all but the masks is known to be right."""
    options.check()
    before = None
    for name, tensor in zip(("query", "key", "value"), inputs):
        if tensor is before:  # self-attention
            continue
        before = tensor
        if not ops.is_tensor(tensor):
            raise ArgumentTypeError(
                name,
                given=f"{type(tensor).__module__}.{type(tensor).__name__}",
                expected=f"a tensor of {ops.framework}",
                advice="mb.backend(...).run takes NumPy arrays.",
            )
        found = ops.dtype(tensor)
        if found not in dtypes.FLOATS:
            raise ArgumentTypeError(name, given=found, expected="one of " + ", ".join(dtypes.FLOATS))
        if found != spec.dtype and not ops.casts():
            raise ArgumentError(name, given=found, expected=f"{spec.dtype}, as the layer's weights have")
    return check_shapes(spec, *inputs)


def refuse_fully_masked(ops: Ops, spec: MHASpec, sizes: masks.Sizes, mask: Tensor, options: Options) -> None:
    """With the policy "error", look at the mask, and raise for a row without any open position."""
    if options.fully_masked != "error" or spec.extra_columns or not sizes.source:
        return
    values = _values(ops, mask, "fully_masked", "'error'", 'Use "nan" or "zero", or call it without a compiler.')
    dead = np.isneginf(dtypes.to_float64(values)).all(axis=-1)
    masks.refuse_fully_masked(np.broadcast_to(dead, (sizes.batch, sizes.heads, sizes.target)))


def merged(
    ops: Ops, spec: MHASpec, sizes: masks.Sizes, key_padding_mask: Any, attn_mask: Any, options: Options
) -> Tensor | None:
    """All masks as one additive tensor of the layer's dtype, or None; four axes, each 1 or the full size."""
    placed_masks = placed(ops, sizes, key_padding_mask, attn_mask)
    parts = [_additive(ops, mask, name, spec) for name, mask in placed_masks.items()]
    if options.is_causal:
        causal = ops.causal(sizes.target, sizes.source, spec.dtype)
        parts.append(ops.reshape(causal, (1, 1, sizes.target, sizes.source)))
    return functools.reduce(operator.add, parts) if parts else None


def placed(ops: Ops, sizes: masks.Sizes, key_padding_mask: Any, attn_mask: Any) -> dict[str, Tensor]:
    """The masks that were given, by name, with four axes, each 1 or the full size.

    Raises:
        ArgumentError: a wrong shape.
        ArgumentTypeError: not a tensor of this framework.
    """
    given = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    shapes = mask_shapes(ops, sizes, key_padding_mask, attn_mask)
    return {name: ops.reshape(given[name], shape) for name, shape in shapes.items()}


def mask_shapes(ops: Ops, sizes: masks.Sizes, key_padding_mask: Any, attn_mask: Any) -> dict[str, tuple[int, ...]]:
    """The four axes of each mask that was given, by name; raises as ``placed`` does."""
    found = {}
    if key_padding_mask is not None:
        mask = _checked(ops, key_padding_mask, "key_padding_mask")
        found["key_padding_mask"] = masks.padding_shape(mask, sizes)
    if attn_mask is not None:
        found["attn_mask"] = masks.attention_shape(_checked(ops, attn_mask, "attn_mask"), sizes)
    return found


def _checked(ops: Ops, mask: Any, name: str) -> Any:
    if ops.is_tensor(mask):
        return mask
    raise ArgumentTypeError(
        name, given=f"{type(mask).__module__}.{type(mask).__name__}", expected=f"a tensor of {ops.framework}"
    )


def _additive(ops: Ops, mask: Any, name: str, spec: MHASpec) -> Tensor:
    kind = ops.dtype(mask)
    if kind in dtypes.FLOATS:
        return ops.narrow(mask, spec.dtype)
    if kind not in ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"):
        raise ArgumentTypeError(name, given=kind, expected="bool, integers or " + ", ".join(dtypes.FLOATS))
    if kind not in ("bool", "uint8"):
        found = _values(ops, mask, name, f"a mask of {kind}", "Convert it to bool (True: may not attend).")
        masks.blocked_by(found, name)  # refuses other integers than 0 and 1
    return ops.blocked(mask, spec.dtype)


def _values(ops: Ops, mask: Any, name: str, given: str, advice: str) -> np.ndarray:
    if ops.traces(mask):
        raise UnsupportedError(
            name,
            given=f"{given}, in a call that is compiled, exported or vectorised",
            expected="a call that needs no look at the values in a mask",
            advice=advice,
        )
    return ops.numpy(mask)


def _canonical(ops: Ops, spec: MHASpec, x: Tensor, batched: bool) -> Tensor:
    """To (N, L, E)."""
    if not batched:
        return ops.reshape(x, (1, *ops.shape(x)))
    return x if spec.batch_first else ops.transpose(x, (1, 0, 2))


def _restored(ops: Ops, spec: MHASpec, x: Tensor, batched: bool) -> Tensor:
    if not batched:
        return ops.reshape(x, ops.shape(x)[1:])
    return x if spec.batch_first else ops.transpose(x, (1, 0, 2))


def _call(options: Options) -> Call:
    nothing = np.zeros((0, 0, 0))
    policy = "zero" if options.fully_masked == "zero" else "nan"
    return Call(
        nothing,
        nothing,
        nothing,
        need_weights=options.need_weights,
        average_attn_weights=options.average_attn_weights,
        fully_masked=policy,
        training=options.training,
    )
