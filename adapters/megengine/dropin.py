"""The drop-in: PyTorch's multi-head attention as a layer of MegEngine."""

from __future__ import annotations

import dataclasses
from typing import Any

import megengine
import megengine.functional
import megengine.module

from mhabridge.dropin import beyond, plain, spec_of_arguments
from mhabridge.initial import initial_values
from mhabridge.live import Options
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .live import attend
from .parameters import packed_part, parameter, refuse_dtype


class MultiheadAttention(megengine.module.Module):  # type: ignore[misc]
    """PyTorch's multi-head attention as a MegEngine module: its constructor, its call and its defaults.

    The trainable parameter is ``io_weight_bias`` (1, n), packed as ``megengine.module.MultiHeadAttention`` packs it, so
    a state dict goes both ways; with ``add_bias_kv``, which that module does not have, also ``bias_k`` and ``bias_v``
    (1, 1, E). Initial values are PyTorch's (see ``mhabridge.manual_seed``).

    Under ``megengine.jit.trace`` a trace is of one set of shapes; a call with others is a TraceError.

    Args:
        embed_dim: E.
        num_heads: H.
        dropout: on the attention weights, in training.
        bias: all four projections have one.
        add_bias_kv: a learned position is appended to the keys and values.
        add_zero_attn: a position of zeros is appended.
        kdim: features of the keys; None for E.
        vdim: features of the values; None for E.
        batch_first: tensors are (N, L, E) instead of (L, N, E).
        device: a MegEngine device name; None for the default one.
        dtype: float32 (None) or float16.

    Raises:
        ArgumentError: a size, a probability or a device that cannot be.
        UnsupportedError: a dtype that MegEngine does not have.

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True)
        >>> x = megengine.functional.ones((1, 3, 8))
        >>> output, weights = layer(x, x, x, is_causal=True)
        >>> weights.numpy()[0, 0].tolist()
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
        spec = spec_of_arguments(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, dtype
        )
        self._set_up(spec, initial_values(spec), device, [])

    def _set_up(self, spec: MHASpec, weights: MHAWeights, device: Any, notes: list[str]) -> None:
        """Make it a layer of any spec that a drop-in can hold, with these weights."""
        super().__init__()
        refuse_dtype(spec)
        self.embed_dim, self.num_heads = spec.embed_dim, spec.num_heads
        self.kdim, self.vdim = spec.key_features, spec.value_features
        self.dropout, self.bias, self.batch_first = spec.dropout, spec.bias is not False, spec.batch_first
        self.add_bias_kv, self.add_zero_attn = spec.add_bias_kv, spec.add_zero_attn
        self.beyond = beyond(spec)
        self._set_parameters(weights, plain(spec), device, notes)

    def _set_parameters(self, weights: MHAWeights, spec: MHASpec, device: Any, notes: list[str]) -> None:
        part = dataclasses.replace(weights, bias_k=None, bias_v=None)
        packed = part.to_layout("megengine", packed_part(spec), notes=notes)
        self.io_weight_bias = parameter(packed["io_weight_bias"], device)
        for name in ("bias_k", "bias_v"):
            array = getattr(weights, name)
            setattr(self, name, None if array is None else parameter(array.reshape(1, 1, -1), device))

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """PyTorch's call; see ``mhabridge.attend`` for what the arguments mean."""
        options = Options(is_causal, need_weights, average_attn_weights, training=self.training)
        return attend(self, (query, key, value), key_padding_mask, attn_mask, options, [])

    def _module_info_string(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, bias={self.bias}"
        return f"{text}, kdim={self.kdim}, vdim={self.vdim}, batch_first={self.batch_first}"


def build_dropin(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> MultiheadAttention:
    """A drop-in of a spec; it also computes a scale, a dropout on the output and a residual of the spec's own.

    Args:
        spec: the layer.
        weights: its parameters; None for PyTorch's initial values (see ``mhabridge.manual_seed``).
        device: as for the class.
        notes: a list that is filled with what it has beyond the spec: where only some projections have a bias, zeros.

    Raises:
        UnsupportedError: projections of other sizes than PyTorch's, or a dtype that the framework does not have.
    """
    layer = MultiheadAttention.__new__(MultiheadAttention)
    layer._set_up(spec, initial_values(spec) if weights is None else weights, device, [] if notes is None else notes)
    return layer
