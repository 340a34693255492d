"""The drop-in: PyTorch's multi-head attention as a layer of PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from mhabridge.initial import initial_values
from mhabridge.live import Options
from mhabridge.native import native_form
from mhabridge.spec import MHASpec

from .live import attend
from .native import FRAMEWORK, version
from .parameters import load


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
        load(self, initial_values(spec).to_layout("torch", spec))
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
