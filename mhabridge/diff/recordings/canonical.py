"""Recorded attention layers in canonical form: a native layer's settings and parameters as a spec and weights, a native
call as canonical inputs and masks, its answer in one axis order.

Names, defaults and packing are those of mappings/; a layer of mhabridge's own speaks the canonical dialect. What cannot
be read is an error with its reason, and then nothing is computed of that layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mhabridge import arguments, dtypes, layouts, mapping, masks, packing
from mhabridge.checks import check_shapes, sizes_of
from mhabridge.dialects import translate_call
from mhabridge.diff.recordings.arrays import coarsest_of
from mhabridge.errors import ArgumentError, MHABridgeError, UnsupportedError
from mhabridge.recording.reading import RecordedCall, RecordedLayer, Recording
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

_INPUTS = ("query", "key", "value")
_NOT_SETTINGS = ("dtype", "bias", "q_bias", "k_bias", "v_bias", "out_bias", "add_bias_kv")  # the parameters tell
_OWN = "mhabridge"


@dataclasses.dataclass(frozen=True)
class Described:
    """What an attention layer is.

    Args:
        spec: its settings.
        weights: its parameters.
        dialect: the names of its arguments.
        layout: the names of its parameters.
    """

    spec: MHASpec
    weights: MHAWeights
    dialect: str
    layout: str


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of an attention layer, batched and batch first.

    Args:
        layer: what was called.
        query: (N, L, E).
        key: (N, S, kdim).
        value: (N, S, vdim).
        masks: in canonical form.
        asked: the other arguments as they were passed, by canonical name: masks, is_causal, ...
        batched: the call had a batch axis.
        shared: for key and value that were the very tensor of an input before them, which one.
        training: the layer was in training mode.
        output: (N, L, out_features); None if it was not kept.
        attn_weights: (N, H, L, S') or averaged (N, L, S'); None if they were not returned or not kept.
        dtype: what the call was computed in: the coarsest of weights, inputs and output.
        fully_masked: how the output answers rows that are fully masked: "nan" or "zero".
    """

    layer: Described
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    masks: masks.Masks
    asked: dict[str, Any]
    batched: bool
    shared: dict[str, str]
    training: bool
    output: np.ndarray | None
    attn_weights: np.ndarray | None
    dtype: str
    fully_masked: str

    @property
    def spec(self) -> MHASpec:
        """The layer, with arrays batch first."""
        return self.layer.spec.replace(batch_first=True)

    @property
    def random(self) -> bool:
        """Whether dropout was active: then no two calls agree."""
        return self.training and (self.layer.spec.dropout > 0.0 or self.layer.spec.out_dropout > 0.0)

    @property
    def passed(self) -> str:
        """The masks as they were passed, in words."""
        said = []
        for name in ("key_padding_mask", "attn_mask"):
            mask = self.asked.get(name)
            if isinstance(mask, np.ndarray):
                said.append(f"{name} {dtypes.name_of(mask)} {mask.shape}")
        if self.asked.get("is_causal") is True:
            said.append("is_causal")
        return ", ".join(said) or "no mask"


def describe(recording: Recording, layer: RecordedLayer, call: RecordedCall) -> Described:
    """The spec and weights of a recorded attention layer, as they were at a call.

    Raises:
        MHABridgeError: they cannot be told, or are no plain multi-head attention.
    """
    if not call.parameters:
        raise UnsupportedError(layer.path, given="no parameters in the recording", expected="those of the layer")
    dialect = _dialect(recording, layer)
    named = recording.parameters(call)
    layout = packing.find(recording.framework)
    extra = {name: named.pop(name).reshape(-1) for name in _beside(layout, named)}
    known = _known(dialect, layout, layer.settings)
    dtype = coarsest_of(named.values())
    shapes = {name: tuple(array.shape) for name, array in named.items()}
    spec = layouts.spec_from_shapes(layout.name, shapes, _heads(layer), dtype=dtype, **known)
    weights = MHAWeights.from_layout(layout.name, named, spec)
    if extra:
        spec, weights = spec.replace(add_bias_kv=True), dataclasses.replace(weights, **extra)
        weights.check(spec)
    return Described(spec, weights, dialect, layout.name)


def _dialect(recording: Recording, layer: RecordedLayer) -> str:
    if layer.of_class.partition(".")[0] == _OWN:
        return mapping.REFERENCE
    try:
        return f"{recording.framework}@{arguments.dialect(recording.framework, recording.version).version}"
    except ArgumentError:  # an unknown version: the newest that is known
        return arguments.dialect(recording.framework).name


def _beside(layout: packing.Layout, named: dict[str, np.ndarray]) -> list[str]:
    """Canonical parameters that a layer of ours keeps beside the packed ones of its framework."""
    packed = {tensor.name for tensor in layout.tensors}
    return [name for name in ("bias_k", "bias_v") if name in named and name not in packed]


def _known(dialect: str, layout: packing.Layout, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of the spec that the layer's attributes say."""
    spoken = arguments.dialect(dialect)
    vector = any("flatten" in tensor.steps for tensor in layout.tensors)
    skipped = ("dtype", "add_bias_kv") if vector else _NOT_SETTINGS
    known = {
        argument.field: settings[argument.name]
        for argument in spoken.of_role("parameter")
        if argument.field and argument.field not in skipped and settings.get(argument.name) is not None
    }
    fixed = spoken.fixed_for("batch_first")
    if fixed is not None and fixed.value is not None:
        known["batch_first"] = arguments.literal(fixed.value)
    if vector:
        known = {"kdim": None, "vdim": None, **known}
    return {name: value for name, value in known.items() if name != "num_heads"}


def _heads(layer: RecordedLayer) -> int:
    heads = layer.settings.get("num_heads")
    if type(heads) is not int:
        raise UnsupportedError(layer.path, given=f"num_heads={heads!r:.40} in the recording", expected="an integer")
    return heads


def attention_call(recording: Recording, call: RecordedCall, layer: Described) -> AttentionCall:
    """A recorded call of an attention layer.

    Raises:
        MHABridgeError: it is no call that can be read: an argument was left out, is unknown, or does not fit.
    """
    given = {name: _value(recording, call, name) for name in call.arguments}
    positional, keywords = translate_call(layer.dialect, mapping.REFERENCE, (), given)
    arrays = [_array(name, array) for name, array in zip(_INPUTS, positional, strict=True)]
    batched = check_shapes(layer.spec, *arrays)
    padding, attention = keywords.get("key_padding_mask"), keywords.get("attn_mask")
    sizes = sizes_of(layer.spec, arrays[0], arrays[1], batched)
    found = masks.canonical(padding, attention, bool(keywords.get("is_causal", False)), sizes=sizes)
    turned = [_batch_first(array, layer.spec, batched) for array in arrays]
    if not call.outputs or not (call.outputs[0].tensor or call.outputs[0].left_out):
        raise UnsupportedError("output", given="no tensor in the first place", expected="what attention returns")
    output = _output(recording, call, 0)
    output = None if output is None else _batch_first(output, layer.spec, batched)
    weights = _attention(_output(recording, call, 1), sizes)
    dtype = coarsest_of([*layer.weights.arrays().values(), *arrays, output])
    shared = _shared(call, layer)
    policy = _policy(output, found.fully_masked(layer.spec.extra_columns))
    query, key, value = turned
    return AttentionCall(
        layer, query, key, value, found, keywords, batched, shared, call.training, output, weights, dtype, policy
    )


def _shared(call: RecordedCall, layer: Described) -> dict[str, str]:
    fields = {argument.name: argument.field for argument in arguments.dialect(layer.dialect).call_arguments()}
    same = {fields.get(name): fields.get(item.same_as) for name, item in call.arguments.items() if item.same_as}
    return {str(name): str(other) for name, other in same.items() if name in _INPUTS and other in _INPUTS}


def _value(recording: Recording, call: RecordedCall, name: str) -> Any:
    item = call.item(name)
    if item.left_out or item.items is not None:
        raise UnsupportedError(
            name,
            given=f"an argument that was left out of the recording ({item.left_out or 'several tensors'})",
            expected="the tensor that was passed",
        )
    return recording.read(item) if item.tensor else item.value


def _array(name: str, array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray) or dtypes.name_of(array) not in dtypes.FLOATS:
        raise UnsupportedError(name, given=f"{type(array).__name__}", expected="a tensor of floats")
    return array


def _batch_first(array: np.ndarray, spec: MHASpec, batched: bool) -> np.ndarray:
    if not batched:
        return array[None]
    return array if spec.batch_first or array.ndim < 2 else array.swapaxes(0, 1)


def _output(recording: Recording, call: RecordedCall, number: int) -> np.ndarray | None:
    return recording.read(call.outputs[number]) if number < len(call.outputs) else None


def _attention(array: np.ndarray | None, sizes: masks.Sizes) -> np.ndarray | None:
    """Returned weights as (N, H, L, S') or (N, L, S'); one framework returns (N * H, L, S')."""
    if array is None:
        return None
    if not sizes.batched and array.ndim in (2, 3):
        array = array[None]
    if array.ndim == 3 and array.shape[0] == sizes.batch * sizes.heads and sizes.heads > 1:
        return array.reshape(sizes.batch, sizes.heads, *array.shape[1:])
    return array


def _policy(output: np.ndarray | None, dead: np.ndarray) -> str:
    """What the output says about fully masked rows: frameworks answer them with NaN or with zeros, by their version."""
    rows = dead.any(axis=1)
    if output is None or not rows.any() or output.shape[:2] != rows.shape:
        return "nan"
    return "zero" if dtypes.all_finite(output[rows]) else "nan"


@dataclasses.dataclass(frozen=True)
class Grads:
    """The recorded gradients of one call by canonical name: "query", "q_weight", ..., "output" for that of the output.

    Args:
        arrays: those that are there.
        left_out: the names of those that the recording says it left out.
        unread: what is there and cannot be read, and why.
    """

    arrays: dict[str, np.ndarray]
    left_out: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()


def canonical_grads(recording: Recording, call: RecordedCall, layer: Described) -> Grads:
    """The recorded gradients of a call."""
    names = _names_of_grads(layer)
    found: dict[str, np.ndarray] = {}
    of_parameters: dict[str, np.ndarray] = {}
    unread = []
    for path, item in call.grads.items():
        kind, _, name = path.partition("/")
        array = recording.read(item)
        if array is None:
            continue
        if kind != "parameters":
            found.update(dict.fromkeys(names.get(path, ()), array))
            continue
        try:
            of_parameters.update(_parameter_grads(name, array, layer, names.get(path, ())))
        except MHABridgeError as error:
            unread.append(f"the gradient of {name}: {error}")
    batched = all(array.ndim == 3 for array in found.values())
    turned = {name: _batch_first(array, layer.spec, batched) for name, array in found.items()}
    left_out = [own for path, every in names.items() if _is_left_out(recording, call, path) for own in every]
    return Grads({**turned, **of_parameters}, frozenset(left_out), tuple(unread))


def _names_of_grads(layer: Described) -> dict[str, tuple[str, ...]]:
    """For each path of a gradient in a recording the canonical names of what it holds."""
    fields = {argument.name: argument.field for argument in arguments.dialect(layer.dialect).call_arguments()}
    names: dict[str, tuple[str, ...]] = {
        f"arguments/{name}": (str(field),) for name, field in fields.items() if field in _INPUTS
    }
    names["outputs/0"] = ("output",)
    there = layer.weights.arrays()
    tensors = packing.find(layer.layout).tensors
    for tensor in tensors:
        if packing.CONDITIONS[tensor.when](layer.spec):
            path = f"parameters/{tensor.name}"
            names[path] = (*names.get(path, ()), *(part for part in tensor.parts if part in there))
    for name in ("bias_k", "bias_v"):
        if name in there and name not in {tensor.name for tensor in tensors}:
            names[f"parameters/{name}"] = (name,)
    return names


def _is_left_out(recording: Recording, call: RecordedCall, path: str) -> bool:
    """Whether a recording says that it left a gradient out."""
    item, name = call.grads.get(path), f"calls/{call.index:06d}"
    if item is not None and item.left_out:
        return True
    starts = [f"{name}/grads/{path}:"]
    starts += [f"{call.layer}: gradients of parameters:"] if path.startswith("parameters/") else []
    for line in recording.left_out:
        if line.startswith(tuple(starts)) or line.endswith("more things, for which there was no line"):
            return True
        if line.startswith("gradients of ") and (name in line or (" more: " in line and not call.grads)):
            return True
    return False


def _parameter_grads(name: str, array: np.ndarray, layer: Described, parts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What one native tensor holds: the others are taken as zeros, so that one that is missing spoils no other.

    Raises:
        MHABridgeError: it does not fit the layer.
    """
    beside = {part: value for part, value in layer.weights.arrays().items() if part in ("bias_k", "bias_v")}
    if parts == (name,) and name in beside:
        return {name: array.reshape(-1)}
    dtype = coarsest_of([array])
    layout = packing.find(layer.layout)
    outside = beside.keys() - {part for tensor in layout.tensors for part in tensor.parts}
    spec = layer.spec.replace(dtype=dtype, **({"add_bias_kv": False} if outside else {}))
    weights = dataclasses.replace(layer.weights, **dict.fromkeys(outside)) if outside else layer.weights
    zeros = {each: np.zeros_like(value) for each, value in weights.astype(dtype).to_layout(layout.name, spec).items()}
    found = MHAWeights.from_layout(layout.name, {**zeros, name: array}, spec).arrays()
    return {part: found[part] for part in parts}
