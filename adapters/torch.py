"""PyTorch: ``torch.nn.MultiheadAttention``, from 1.8.1 on.

Why it is built so:
- Both masks travel as one float mask of the layer's dtype: 1.8.1 reads the bytes of a float key_padding_mask as if
they were
  bool, and 2.x refuses a mask of another dtype than the query's.
- query, key and value are always three tensors: only a layer that sees one tensor three times takes the fast path,
which
  ignores is_causal and has its own answer for fully masked rows.
- A fully masked row is NaN only when weights are asked for (without them the row is the out bias), so they are asked
for.
- 1.8.1 keeps out_proj.bias, with random values, when bias is False; it is set to zero.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from mhabridge import dtypes, envelope, live, mapping, masks
from mhabridge.calls import Call, Result
from mhabridge.checks import sizes_of
from mhabridge.composed import Ops
from mhabridge.dialects import translate_call
from mhabridge.errors import ArgumentError, UnsupportedError, WeightsError
from mhabridge.initial import initial_values
from mhabridge.live import Options, Traits
from mhabridge.native import NativeForm, flat_mask, full_mask, native_form, parameter_grads, swap, unsayable
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FRAMEWORK = "torch"


def version() -> str:
    """PyTorch's version."""
    return str(torch.__version__)


def is_layer(layer: Any) -> bool:
    """Whether this is PyTorch's multi-head attention."""
    return isinstance(layer, torch.nn.MultiheadAttention)


def extract(layer: torch.nn.MultiheadAttention) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native layer.

    Raises:
        WeightsError: parameters that such a layer does not have, or of another shape, or without values (meta).
        UnsupportedError: a subclass with a forward of its own.
    """
    if type(layer).forward not in (torch.nn.MultiheadAttention.forward, MultiheadAttention.forward):
        raise UnsupportedError(
            "layer",
            given=f"{type(layer).__qualname__}, whose forward is its own",
            expected="torch.nn.MultiheadAttention's",
            advice="What it computes is not known; only a layer that computes plain attention can be moved.",
        )
    named = {name: _to_numpy(tensor) for name, tensor in layer.state_dict().items()}
    spec = _spec(layer)
    return spec, MHAWeights.from_layout("torch", named, spec)


def _spec(layer: torch.nn.MultiheadAttention) -> MHASpec:
    return MHASpec(
        embed_dim=layer.embed_dim,
        num_heads=layer.num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        dropout=layer.dropout,
        bias=layer.in_proj_bias is not None,
        out_bias=layer.out_proj.bias is not None,
        add_bias_kv=layer.bias_k is not None,
        add_zero_attn=layer.add_zero_attn,
        batch_first=getattr(layer, "batch_first", False),
        dtype=layer.out_proj.weight.dtype,
    )


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> torch.nn.MultiheadAttention:
    """A native layer; without weights it keeps the initial values that PyTorch gives it.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    form = native_form(spec, FRAMEWORK, version())
    return _build(spec, weights, form, device, [] if notes is None else notes)


def _build(
    spec: MHASpec, weights: MHAWeights | None, form: NativeForm, device: Any, notes: list[str]
) -> torch.nn.MultiheadAttention:
    layer = torch.nn.MultiheadAttention(**form.kwargs).to(dtype=getattr(torch, spec.dtype))
    if weights is not None:
        _load(layer, weights.to_layout("torch", spec, notes=notes))
    if device is None:
        return layer
    try:
        return layer.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; no CUDA in this build
        raise ArgumentError(
            "device", given=repr(device), expected="a device that PyTorch has here", advice=str(error)
        ) from error


def _load(layer: torch.nn.MultiheadAttention, named: dict[str, np.ndarray]) -> None:
    state = {name: _to_tensor(array) for name, array in named.items()}
    own = layer.state_dict()
    for name in set(own) - set(state):
        if name != "out_proj.bias":
            raise WeightsError(name, given="nothing", expected=f"shape {tuple(own[name].shape)}")
        state[name] = torch.zeros_like(own[name])  # PyTorch 1.8.1's left-over
    layer.load_state_dict(state, strict=True)


def unfit(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    """Why the native class cannot be used for a call, beyond the table's envelope; empty when it can."""
    return unsayable(spec, FRAMEWORK, version())


def run_native(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native layer, forward and, when asked for, backward."""
    form = native_form(spec, FRAMEWORK, version(), turn=True)
    notes = ["native: torch.nn.MultiheadAttention", *form.notes]
    layer = _build(spec, weights, form, None, notes)
    layer.train(call.training)
    inputs = {name: _leaf(swap(getattr(call, name), form.spec.batch_first), call) for name in ("query", "key", "value")}
    merged = masks.merge(call.blocked, call.added, spec.dtype)
    mask = None if merged is None else _leaf(flat_mask(merged, spec, call), call)
    if merged is not None:
        notes.append("masks merged into one float mask")
    with torch.set_grad_enabled(call.wants_grads):
        output, attention = _forward(layer, inputs, mask, spec, call)
    grads = _grads(layer, inputs, mask, output, attention, form, spec, call) if call.wants_grads else {}
    attention = _to_numpy(attention) if call.need_weights else None
    return Result(swap(_to_numpy(output), form.spec.batch_first), attention, grads, tuple(notes))


def _forward(
    layer: torch.nn.MultiheadAttention, inputs: dict[str, Any], mask: Any, spec: MHASpec, call: Call
) -> tuple[Any, Any]:
    options = {
        "attn_mask": mask,
        "need_weights": call.need_weights or bool(envelope.fully_masked(spec, call).any()),
        "average_attn_weights": call.average_attn_weights or not call.need_weights,
    }
    args, kwargs = translate_call("numpy", f"{FRAMEWORK}@{version()}", tuple(inputs.values()), options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1.8.1 warns about its own integer division
        output, attention = layer(*args, **kwargs)
    return output, attention


def _grads(
    layer: torch.nn.MultiheadAttention,
    inputs: dict[str, Any],
    mask: Any,
    output: Any,
    attention: Any,
    form: NativeForm,
    spec: MHASpec,
    call: Call,
) -> dict[str, np.ndarray]:
    loss = torch.zeros((), dtype=output.dtype)
    if call.grad_output is not None:
        loss = loss + (output * _cast(swap(call.grad_output, form.spec.batch_first), spec)).sum()
    if call.grad_attn_weights is not None:
        loss = loss + (attention * _cast(call.grad_attn_weights, spec)).sum()
    parameters = dict(layer.named_parameters())
    leaves = {**inputs, **parameters, **({"mask": mask} if call.mask_grad else {})}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    arrays = {
        name: _to_numpy(torch.zeros_like(leaf) if grad is None else grad)
        for (name, leaf), grad in zip(leaves.items(), found)
    }
    named = {name: arrays[name] for name in parameters if form.spec.out_bias or name != "out_proj.bias"}
    grads = parameter_grads("torch", named, form.spec.replace(dtype=spec.dtype), spec)
    grads.update({name: swap(arrays[name], form.spec.batch_first) for name in inputs})
    if call.mask_grad:
        grads["mask"] = full_mask(arrays["mask"], spec, call)
    return grads


class _Ops(Ops):
    """PyTorch's operations, from 1.8 on."""

    framework = "PyTorch"

    def is_tensor(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor)

    def dtype(self, x: torch.Tensor) -> str:
        return str(x.dtype).rpartition(".")[2]

    def casts(self) -> bool:
        try:
            return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        except TypeError:  # before 2.4 it takes no argument
            return bool(torch.is_autocast_enabled()) or bool(getattr(torch, "is_autocast_cpu_enabled", bool)())

    def narrow(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        limit = dtypes.LARGEST[dtype]
        if dtypes.LARGEST[self.dtype(x)] <= limit:
            return x.to(getattr(torch, dtype))
        return torch.where(torch.isneginf(x), x, x.clamp(-limit, limit)).to(getattr(torch, dtype))

    def blocked(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        zeros = torch.zeros(x.shape, dtype=getattr(torch, dtype), device=x.device)
        return zeros.masked_fill(x != 0, -np.inf)

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def constant(self, array: np.ndarray, dtype: str) -> torch.Tensor:
        tensor = _to_tensor(dtypes.round_to(array, dtype))
        return tensor if self.device is None else tensor.to(self.device)

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        return _to_numpy(tensor)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)

    def transpose(self, x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return x.permute(*axes)

    def reshape(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.reshape(shape)

    def concat(self, parts: list[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(parts, dim=axis)

    def broadcast(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.expand(shape)

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        if not x.shape[-1]:
            return x.new_zeros((*x.shape[:-1], 1))
        return x.detach().max(dim=-1, keepdim=True)[0]

    def total(self, x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return x.sum(dim=axes, keepdim=True)

    def replace(self, x: torch.Tensor, value: float, by: float) -> torch.Tensor:
        return x.masked_fill(x == value, by)

    def dropout(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        return torch.nn.functional.dropout(x, probability, training=True)

    def run(
        self, function: Any, leaves: list[torch.Tensor], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
        wanted = any(seed is not None for seed in seeds)
        with torch.set_grad_enabled(wanted):
            leaves = [leaf.requires_grad_(wanted) for leaf in leaves]
            results = function(*leaves)
        if not wanted:
            return (*results, [])
        pairs = [(result, seed) for result, seed in zip(results, seeds) if seed is not None]
        grad_outputs = [self.constant(seed, str(result.dtype)[6:]) for result, seed in pairs]
        found = torch.autograd.grad([result for result, _ in pairs], leaves, grad_outputs, allow_unused=True)
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]
        return (*results, [_to_numpy(grad) for grad in grads])


OPS = _Ops()


def traits(layer: torch.nn.MultiheadAttention) -> Traits:
    """Training flag, requires_grad of each parameter, and kind of device."""
    named = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    trainable = {name: named[own] for name, own in _owners(layer).items()}
    return Traits(layer.training, trainable, "cpu" if layer.out_proj.weight.device.type == "cpu" else "gpu")


def set_traits(layer: torch.nn.MultiheadAttention, wanted: Traits) -> None:
    """The inverse of ``traits``."""
    owners = _owners(layer)
    for own, parameter in layer.named_parameters():
        names = [name for name in owners if owners[name] == own and name in wanted.trainable]
        parameter.requires_grad_(wanted.all_alike(names, own))
    layer.train(wanted.training)
    if wanted.device == "gpu":
        layer.to("cuda")


def _owners(layer: torch.nn.MultiheadAttention) -> dict[str, str]:
    """The native parameter that holds each canonical one."""
    packed = layer.in_proj_weight is not None
    found = {f"{x}_weight": "in_proj_weight" if packed else f"{x}_proj_weight" for x in "qkv"}
    if layer.in_proj_bias is not None:
        found.update({f"{x}_bias": "in_proj_bias" for x in "qkv"})
    found["out_weight"] = "out_proj.weight"
    if layer.out_proj.bias is not None:
        found["out_bias"] = "out_proj.bias"
    if layer.bias_k is not None:
        found.update(bias_k="bias_k", bias_v="bias_v")
    return found


# -- live layers -----------------------------------------------------------------------------------------------------


def attend(
    layer: torch.nn.MultiheadAttention,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live layer, native where that needs no look at the values, else composed."""
    spec = _spec(layer)
    ops = _Ops(layer.out_proj.weight.device)
    masked = key_padding_mask is not None or attn_mask is not None or options.is_causal
    reason = _why_composed(spec, options, masked)
    if not reason:
        notes.append("native: torch.nn.MultiheadAttention")
        return _attend_native(ops, layer, spec, inputs, key_padding_mask, attn_mask, options)
    if options.mode == "native":
        raise UnsupportedError("mode", given="'native'", expected="'auto' or 'composed'", advice=reason)
    notes.append(f"composed: {reason}")
    return live.attend(ops, spec, _tensors(layer), inputs, key_padding_mask, attn_mask, options)


def _why_composed(spec: MHASpec, options: Options, masked: bool) -> str:
    if options.mode == "composed":
        return "asked for"
    if masked and options.fully_masked == "zero":
        return "The native layer has no answer of zeros for fully masked rows."
    if not options.average_attn_weights and mapping.version_key(version()) < (1, 11):
        return "PyTorch before 1.11 returns only the average over heads."
    return ""


def _attend_native(
    ops: _Ops,
    layer: torch.nn.MultiheadAttention,
    spec: MHASpec,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> tuple[Any, Any]:
    batched = live.check(ops, spec, inputs, options)
    sizes = sizes_of(spec, inputs[0], inputs[1], batched)
    mask = live.merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    if mask is not None:
        live.refuse_fully_masked(ops, spec, sizes, mask, options)
        flat = mask[0, 0] if tuple(mask.shape[:2]) == (1, 1) else mask.expand(sizes.batch, sizes.heads, -1, -1)
        mask = flat if flat.dim() == 2 else flat.reshape(sizes.batch * sizes.heads, *flat.shape[2:])
    # Only with weights is a fully masked row NaN; without them it would be the out bias.
    asked = {"attn_mask": mask, "need_weights": options.need_weights or mask is not None}
    if not options.average_attn_weights:
        asked["average_attn_weights"] = False
    output, attention = torch.nn.MultiheadAttention.forward(layer, *inputs, **asked)
    return output, attention if options.need_weights else None


def _tensors(layer: torch.nn.MultiheadAttention) -> dict[str, torch.Tensor]:
    """The layer's own parameters, differentiable, by canonical name."""
    if layer.in_proj_weight is None:
        found = {name: getattr(layer, f"{name[0]}_proj_weight") for name in ("q_weight", "k_weight", "v_weight")}
    else:
        found = dict(zip(("q_weight", "k_weight", "v_weight"), layer.in_proj_weight.chunk(3)))
    found["out_weight"] = layer.out_proj.weight
    if layer.in_proj_bias is not None:
        found.update(zip(("q_bias", "k_bias", "v_bias"), layer.in_proj_bias.chunk(3)))
    found.update(out_bias=layer.out_proj.bias, bias_k=layer.bias_k, bias_v=layer.bias_v)
    return {
        name: tensor.reshape(-1) if tensor.dim() == 3 else tensor
        for name, tensor in found.items()
        if tensor is not None
    }


class MultiheadAttention(torch.nn.MultiheadAttention):  # type: ignore[misc]
    """``torch.nn.MultiheadAttention`` with the rules of mhabridge: the same answer on every framework.

    The constructor, the parameters and their names are PyTorch's own, so checkpoints go both ways. The call differs
    where PyTorch disagrees with itself: is_causal needs no attn_mask and is never dropped, masks may be byte or of
    another dtype than the query, and a fully masked row is NaN whatever need_weights is.

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.ones(1, 3, 8)
        >>> output, weights = layer(x, x, x, is_causal=True)
        >>> weights[0, 0].tolist()
        [1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        spec = MHASpec(
            embed_dim,
            num_heads,
            kdim,
            vdim,
            dropout,
            bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            batch_first=batch_first,
            dtype=dtype,
        )
        super().__init__(**native_form(spec, FRAMEWORK, version(), turn=True).kwargs)
        self.batch_first = batch_first  # PyTorch 1.8.1 has none: its own forward is not used then
        self.to(dtype=dtype)
        _load(self, initial_values(spec).to_layout("torch", spec))
        if device is not None:
            self.to(device)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """PyTorch's call; see ``mhabridge.attend`` for what the arguments mean."""
        options = Options(is_causal, need_weights, average_attn_weights, training=self.training)
        return attend(self, (query, key, value), key_padding_mask, attn_mask, options, [])


def _leaf(array: np.ndarray | None, call: Call) -> Any:
    assert array is not None
    return _to_tensor(array).requires_grad_(call.wants_grads)


def _cast(array: np.ndarray, spec: MHASpec) -> Any:
    return _to_tensor(dtypes.round_to(array, spec.dtype))


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own (never a view of the caller's memory); bfloat16 goes over as its bits."""
    array = dtypes.to_words(np.array(array, order="C"))
    if array.dtype == dtypes.BFLOAT16_WORDS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.device.type == "meta":
        raise WeightsError(
            "layer", given="a meta tensor", expected="values", advice="Load the weights before extracting."
        )
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy()).view(dtypes.BFLOAT16_WORDS)
    return np.array(tensor.numpy())
