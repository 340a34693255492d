"""Transformer layers and stacks for MegEngine, which has none: PyTorch's constructors, calls, structure and names.

Their attentions are the drop-in ``MultiheadAttention``, so masks mean what they mean everywhere; is_causal blocks by
itself and needs no mask beside it. Parameters are called as in PyTorch, but for an attention's ``io_weight_bias``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import megengine
import megengine.functional
import megengine.module
import numpy as np

from mhabridge import dtypes
from mhabridge.errors import ArgumentError, ArgumentTypeError
from mhabridge.initial import draw_uniform
from mhabridge.transformer import TransformerSpec

from .dropin import MultiheadAttention
from .parameters import parameter, refuse_dtype, spec_of, weights_of

_ACTIVATIONS = {"relu": megengine.functional.relu, "gelu": megengine.functional.gelu}


class LayerNorm(megengine.module.LayerNorm):  # type: ignore[misc]
    """MegEngine's layer norm, with a bias or without."""

    def __init__(self, features: int, eps: float, bias: bool) -> None:
        super().__init__((features,), eps=eps)
        if not bias:
            self.bias = None

    def forward(self, x: Any) -> Any:
        """x, (..., features), normalised over the features."""
        bias = megengine.functional.zeros_like(self.weight) if self.bias is None else self.bias
        return megengine.functional.nn.layer_norm(x, self.normalized_shape, True, self.weight, bias, self.eps)


class Dropout(megengine.module.Dropout):  # type: ignore[misc]
    """MegEngine's dropout, with a probability of 1 too."""

    def forward(self, inputs: Any) -> Any:
        """The inputs, in training with zeros among them."""
        if self.training and self.drop_prob == 1.0:
            return inputs * 0.0
        return inputs if self.drop_prob == 0.0 else super().forward(inputs)


class _Layer(megengine.module.Module):  # type: ignore[misc]
    """What an encoder layer and a decoder layer have in common."""

    kind = ""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        spec = TransformerSpec(
            self.kind,
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            norm_first,
            bias,
            batch_first,
            dtype="float32" if dtype is None else dtype,
        )
        refuse_dtype(spec.attention)
        self.activation, self.norm_first = spec.activation, spec.norm_first
        for name in spec.attentions():
            setattr(self, name, _attention(spec, device))
        self.linear1 = megengine.module.Linear(spec.embed_dim, spec.dim_feedforward, bias=spec.bias)
        self.linear2 = megengine.module.Linear(spec.dim_feedforward, spec.embed_dim, bias=spec.bias)
        self.dropout = Dropout(spec.dropout)
        for number, name in enumerate(spec.norms(), 1):
            setattr(self, name, LayerNorm(spec.embed_dim, spec.layer_norm_eps, spec.bias))
            setattr(self, f"dropout{number}", Dropout(spec.dropout))
        _draw_linears(self)
        set_kind(self, spec.dtype, device)

    def _check(self, **tensors: Any) -> None:
        """Refuse what is no tensor of so many features, before a norm sees it: its failure would come late."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, megengine.Tensor):
                raise ArgumentTypeError(
                    name,
                    given=f"{type(tensor).__module__}.{type(tensor).__name__}",
                    expected="a tensor of MegEngine",
                )
            shape = tuple(int(size) for size in tensor.shape)
            if len(shape) not in (2, 3) or shape[-1] != self.linear1.in_features:
                raise ArgumentError(
                    name, given=f"shape {shape}", expected=f"two or three axes, the last of {self.linear1.in_features}"
                )

    def _forward_part(self, x: Any) -> Any:
        inner = self.dropout(_ACTIVATIONS[self.activation](self.linear1(x)))
        return self.linear2(inner)

    def _add(self, x: Any, number: int, part: Any) -> Any:
        """The residual connection round one part, with its norm and its dropout."""
        norm, dropout = getattr(self, f"norm{number}"), getattr(self, f"dropout{number}")
        if self.norm_first:
            return x + dropout(part(norm(x)))
        return norm(x + dropout(part(x)))


class TransformerEncoderLayer(_Layer):
    """PyTorch's ``TransformerEncoderLayer`` as a MegEngine module.

    Args:
        d_model: E.
        nhead: H.
        dim_feedforward: features between the linear maps.
        dropout: in training, on the attention weights and behind each part.
        activation: "relu" or "gelu".
        layer_norm_eps: of both norms.
        batch_first: tensors are (N, L, E) instead of (L, N, E).
        norm_first: each norm goes before its part.
        bias: linear maps, norms and the attention have one.
        device: a MegEngine device name; None for the default one.
        dtype: float32 (None) or float16.

    Raises:
        ArgumentError: a size, a probability or a device that cannot be.
        UnsupportedError: a dtype that MegEngine does not have.

    Example:
        >>> layer = TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer(megengine.functional.ones((1, 3, 8)), is_causal=True).numpy().shape
        (1, 3, 8)
    """

    kind = "encoder_layer"

    def forward(self, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False) -> Any:
        """The output, of src's shape: (L, N, E), (N, L, E) or (L, E); masks as in ``mhabridge.attend``."""

        def attend(x: Any) -> Any:
            return self.self_attn(x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal)[0]

        self._check(src=src)
        return self._add(self._add(src, 1, attend), 2, self._forward_part)


class TransformerDecoderLayer(_Layer):
    """PyTorch's ``TransformerDecoderLayer`` as a MegEngine module; arguments as in ``TransformerEncoderLayer``."""

    kind = "decoder_layer"

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Any:
        """The output, of tgt's shape; memory is the encoder's output, (S, N, E) or as the layer has its axes."""

        def attend(x: Any) -> Any:
            return self.self_attn(x, x, x, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal)[0]

        def look(x: Any) -> Any:
            masks = (memory_key_padding_mask, False, memory_mask)
            return self.multihead_attn(x, memory, memory, *masks, is_causal=memory_is_causal)[0]

        self._check(tgt=tgt, memory=memory)
        return self._add(self._add(self._add(tgt, 1, attend), 2, look), 3, self._forward_part)


class _Stack(megengine.module.Module):  # type: ignore[misc]
    def __init__(self, layer: Any, num_layers: int, norm: Any = None) -> None:
        super().__init__()
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ArgumentTypeError("num_layers", given=repr(num_layers), expected="an integer of at least 1")
        self.layers = [copy.deepcopy(layer) for _ in range(num_layers)]
        self.norm = norm


class TransformerEncoder(_Stack):
    """PyTorch's ``TransformerEncoder`` as a MegEngine module: copies of one layer, one after another.

    Args:
        encoder_layer: the layer; each copy starts with its values.
        num_layers: how many.
        norm: a module for the last layer's output, or None.
    """

    def __init__(self, encoder_layer: TransformerEncoderLayer, num_layers: int, norm: Any = None) -> None:
        super().__init__(encoder_layer, num_layers, norm)

    def forward(
        self, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
    ) -> Any:
        """The output, of src's shape; ``is_causal`` None is False."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, bool(is_causal))
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(_Stack):
    """PyTorch's ``TransformerDecoder`` as a MegEngine module; arguments as in ``TransformerEncoder``."""

    def __init__(self, decoder_layer: TransformerDecoderLayer, num_layers: int, norm: Any = None) -> None:
        super().__init__(decoder_layer, num_layers, norm)

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """The output, of tgt's shape; ``tgt_is_causal`` None is False."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks, bool(tgt_is_causal), memory_is_causal)
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(megengine.module.Module):  # type: ignore[misc]
    """PyTorch's ``Transformer`` as a MegEngine module: an encoder and a decoder, each with a norm behind it.

    Args:
        d_model: E.
        nhead: H.
        num_encoder_layers: of the encoder.
        num_decoder_layers: of the decoder.
        dim_feedforward: features between the linear maps.
        dropout: in training, on the attention weights and behind each part.
        activation: "relu" or "gelu".
        custom_encoder: another encoder, or None.
        custom_decoder: another decoder, or None.
        layer_norm_eps: of all norms.
        batch_first: tensors are (N, L, E) instead of (L, N, E).
        norm_first: each norm goes before its part.
        bias: linear maps, norms and attentions have one.
        device: a MegEngine device name; None for the default one.
        dtype: float32 (None) or float16.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        self.encoder, self.decoder = custom_encoder, custom_decoder
        if custom_encoder is None:
            norm = LayerNorm(d_model, layer_norm_eps, bias)
            one = TransformerEncoderLayer(*layer, device=device, dtype=dtype)
            self.encoder = TransformerEncoder(one, num_encoder_layers, set_kind(norm, dtype, device))
        if custom_decoder is None:
            norm = LayerNorm(d_model, layer_norm_eps, bias)
            other = TransformerDecoderLayer(*layer, device=device, dtype=dtype)
            self.decoder = TransformerDecoder(other, num_decoder_layers, set_kind(norm, dtype, device))
        _draw_matrices(self)

    def forward(
        self,
        src: Any,
        tgt: Any,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """The decoder's output, of tgt's shape; masks as in ``mhabridge.attend``."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return self.decoder(tgt, memory, *masks, tgt_is_causal, memory_is_causal)


def _attention(spec: TransformerSpec, device: Any) -> MultiheadAttention:
    return MultiheadAttention(
        spec.embed_dim,
        spec.num_heads,
        dropout=spec.dropout,
        bias=spec.bias,
        batch_first=spec.batch_first,
        device=device,
        dtype=spec.dtype,
    )


def set_kind(module: Any, dtype: Any, device: Any) -> Any:
    """Bring a module's parameters to a dtype and a device, where they are of another."""
    kind = "float32" if dtype is None else dtypes.canonical(dtype)
    for owner in module.modules():
        for name, value in list(owner.__dict__.items()):
            if isinstance(value, megengine.Parameter) and (np.dtype(value.dtype).name != kind or device is not None):
                setattr(owner, name, parameter(value.numpy().astype(kind), device))
    return module


def _draw_linears(layer: _Layer) -> None:
    """The initial values of torch.nn.Linear: weight and bias uniform in +-1/sqrt(features in)."""
    for linear in (layer.linear1, layer.linear2):
        for name in ("weight", "bias"):
            if getattr(linear, name) is not None:
                _draw(linear, name, 1.0 / math.sqrt(linear.in_features))


def _draw_matrices(model: Transformer) -> None:
    """PyTorch's Transformer draws every matrix again, Xavier-uniform by its own shape."""
    for module in list(model.modules()):
        if isinstance(module, megengine.module.Linear):
            _draw(module, "weight", math.sqrt(6.0 / (module.in_features + module.out_features)))
        elif isinstance(module, MultiheadAttention):  # q, k and v are so already
            spec = spec_of(module)
            bound = math.sqrt(6.0 / (2 * spec.embed_dim))
            drawn = dtypes.round_to(draw_uniform(bound, (spec.embed_dim, spec.embed_dim)), spec.dtype)
            weights = dataclasses.replace(weights_of(module, spec), out_weight=drawn)
            module.io_weight_bias[...] = megengine.tensor(weights.to_layout("megengine", spec)["io_weight_bias"])


def _draw(owner: Any, name: str, bound: float) -> None:
    there = getattr(owner, name)
    values = draw_uniform(bound, tuple(there.shape))
    there[...] = megengine.tensor(dtypes.round_to(values, np.dtype(there.dtype).name))
