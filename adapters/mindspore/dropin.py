"""The drop-in: PyTorch's multi-head attention as a layer of MindSpore."""

from __future__ import annotations

from typing import Any

import mindspore

from mhabridge.dropin import beyond, plain, spec_of_arguments
from mhabridge.initial import initial_values
from mhabridge.live import Options
from mhabridge.native import native_form
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .compiled import additive, compiled_causal, compiled_mask, compiled_sizes, rows_times, softmax
from .gradients import prove_gradients
from .live import attend
from .native import FRAMEWORK, compiles_cells, constructor_kwargs, refuse_device, version
from .parameters import load


class MultiheadAttention(mindspore.nn.MultiheadAttention):  # type: ignore[misc]
    """``torch.nn.MultiheadAttention`` as a MindSpore cell: PyTorch's constructor, call, defaults and answers.

    The parameters have the names and shapes of ``mindspore.nn.MultiheadAttention``, so checkpoints go both ways. It is
    in training mode when it is made, always returns a pair, and may be called with keywords. In a compiled graph masks
    must be bool, byte or float: those of wider integers need a look at their values. A function that ``mindspore.jit``
    compiled keeps the training flag that the cell had then (so does every MindSpore cell in one).

    Args:
        embed_dim: E.
        num_heads: H.
        dropout: on the attention weights, in training.
        bias: for all four projections.
        add_bias_kv: a learned key and value behind the source.
        add_zero_attn: a key and value of zeros behind the source.
        kdim: features of the key; None for E.
        vdim: features of the value; None for E.
        batch_first: (N, L, E) instead of (L, N, E).
        device: None: MindSpore's device belongs to the process.
        dtype: of the parameters; None for float32.

    Raises:
        ArgumentError: a size or probability that is wrong, or a device.
        UnsupportedError: a dtype that this version's cell cannot have.

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True)
        >>> x = mindspore.Tensor(np.ones((1, 3, 8), np.float32))
        >>> output, weights = layer(x, x, x, is_causal=True)
        >>> weights[0, 0].asnumpy().tolist()
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
        refuse_device(device)
        held = plain(spec)
        form = native_form(held, FRAMEWORK, version())
        super().__init__(**constructor_kwargs(form.spec.replace(dtype=spec.dtype)))
        self.beyond = beyond(spec)
        self._spec = spec.to_json()
        self._dtype = spec.dtype
        self._scale = spec.score_scale
        self._out_dropout, self._residual = spec.out_dropout, spec.residual
        self.set_train(True)
        load(self, weights.to_layout("mindspore", held, notes=notes))
        if not compiles_cells():
            prove_gradients()

    def __call__(
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
        """PyTorch's call; see ``mhabridge.attend`` for what the arguments mean. Compilers do not come here."""
        args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if "construct" in self.__dict__ or compiles_cells():
            answer: tuple[Any, Any] = mindspore.nn.Cell.__call__(self, *args)
            return answer
        self.__dict__["construct"] = self._answer  # for this call: a compiler shall find the class's own
        try:
            answer = mindspore.nn.Cell.__call__(self, *args)
            return answer
        finally:
            del self.__dict__["construct"]

    def _answer(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: bool,
        attn_mask: Any,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Any, Any]:
        options = Options(is_causal, need_weights, average_attn_weights, training=self.training)
        return attend(self, (query, key, value), key_padding_mask, attn_mask, options, [], pynative=True)

    def construct(
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
        """The call as a compiler reads it."""
        batch, target, source, batched = compiled_sizes(
            self._spec,
            self.batch_first,
            (query.shape, key.shape, value.shape),
            (query.dtype, key.dtype, value.dtype),
            (need_weights, average_attn_weights, is_causal),
        )
        sizes = (batch, self.num_heads, target, source, batched)
        q, k, v = self._projected(query, key, value, batch, batched)
        mask = self._mask(key_padding_mask, attn_mask, is_causal, sizes)
        scores = mindspore.ops.matmul(q * self._scale, mindspore.ops.transpose(k, (0, 1, 3, 2)))
        attention = softmax(scores if mask is None else scores + mask)
        if self.training and self.dropout == 1.0:
            attention = attention * 0.0
        elif self.training and self.dropout > 0.0:
            attention = mindspore.ops.dropout(attention, self.dropout, training=True)
        context = mindspore.ops.transpose(mindspore.ops.matmul(attention, v), (0, 2, 1, 3))
        rows = mindspore.ops.reshape(context, (batch * target, self.embed_dim))
        output = rows_times(rows, self.out_proj.weight, self.out_proj.bias)
        output = self._turned(mindspore.ops.reshape(output, (batch, target, self.embed_dim)), batched)
        if not batched:
            output = mindspore.ops.reshape(output, (target, self.embed_dim))
        if self.training and self._out_dropout == 1.0:
            output = output * 0.0
        elif self.training and self._out_dropout > 0.0:
            output = mindspore.ops.dropout(output, self._out_dropout, training=True)
        if self._residual:
            output = output + query
        if not need_weights:
            return output, None
        if average_attn_weights:
            attention = attention.sum(1) * (1.0 / self.num_heads)
        return output, attention if batched else attention[0]

    def _turned(self, x: Any, batched: bool) -> Any:
        """Between the user's order of axes and (N, L, E), either way."""
        return mindspore.ops.transpose(x, (1, 0, 2)) if batched and not self.batch_first else x

    def _projected(self, query: Any, key: Any, value: Any, batch: int, batched: bool) -> tuple[Any, Any, Any]:
        """The heads' queries, keys and values, (N, H, T, E / H), with the columns that the layer appends."""
        size = self.embed_dim
        if self.in_proj_weight is None:
            q_weight, k_weight, v_weight = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            packed = self.in_proj_weight
            q_weight, k_weight, v_weight = packed[:size], packed[size : 2 * size], packed[2 * size :]
        q_bias, k_bias, v_bias = None, None, None
        if self.in_proj_bias is not None:
            packed_bias = self.in_proj_bias
            q_bias, k_bias, v_bias = packed_bias[:size], packed_bias[size : 2 * size], packed_bias[2 * size :]
        q = self._heads(self._turned(query, batched), batch, q_weight, q_bias)
        k = self._appended(self._heads(self._turned(key, batched), batch, k_weight, k_bias), self.bias_k)
        v = self._appended(self._heads(self._turned(value, batched), batch, v_weight, v_bias), self.bias_v)
        return q, k, v

    def _heads(self, x: Any, batch: int, weight: Any, bias: Any) -> Any:
        rows = rows_times(mindspore.ops.reshape(x, (-1, x.shape[-1])), weight, bias)
        heads = mindspore.ops.reshape(rows, (batch, -1, self.num_heads, self.head_dim))
        return mindspore.ops.transpose(heads, (0, 2, 1, 3))

    def _appended(self, x: Any, bias: Any) -> Any:
        shape = (x.shape[0], self.num_heads, 1, self.head_dim)
        if bias is not None:
            column = mindspore.ops.reshape(bias, (1, self.num_heads, 1, self.head_dim))
            x = mindspore.ops.concat((x, mindspore.ops.broadcast_to(column, shape)), 2)
        if self.add_zero_attn:
            x = mindspore.ops.concat((x, mindspore.ops.zeros(shape, x.dtype)), 2)
        return x

    def _mask(self, key_padding_mask: Any, attn_mask: Any, is_causal: bool, sizes: Any) -> Any:
        """All masks as one to add, with open columns for those that the layer appends; None without any."""
        mask = None
        if key_padding_mask is not None:
            shape = compiled_mask("key_padding_mask", key_padding_mask.shape, key_padding_mask.dtype, sizes)
            mask = mindspore.ops.reshape(additive(key_padding_mask, self._dtype), shape)
        if attn_mask is not None:
            shape = compiled_mask("attn_mask", attn_mask.shape, attn_mask.dtype, sizes)
            added = mindspore.ops.reshape(additive(attn_mask, self._dtype), shape)
            mask = added if mask is None else mask + added
        if is_causal:
            causal = compiled_causal(sizes, self._dtype)
            mask = causal if mask is None else mask + causal
        if mask is not None:
            extra = (1 if self.bias_k is not None else 0) + (1 if self.add_zero_attn else 0)
            if extra > 0:
                shape = (mask.shape[0], mask.shape[1], mask.shape[2], extra)
                mask = mindspore.ops.concat((mask, mindspore.ops.zeros(shape, mask.dtype)), 3)
        return mask


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
