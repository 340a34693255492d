"""The drop-in: PyTorch's multi-head attention as a layer of PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from mhabridge.dropin import beyond, plain, spec_of_arguments
from mhabridge.initial import initial_values
from mhabridge.live import Options
from mhabridge.native import native_form
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .live import attend
from .native import FRAMEWORK, on_device, version
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
        spec = spec_of_arguments(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, dtype
        )
        self._set_up(spec, initial_values(spec), device, [])

    def _set_up(self, spec: MHASpec, weights: MHAWeights, device: Any, notes: list[str]) -> None:
        """Make it a layer of any spec that a drop-in can hold, with these weights."""
        held = plain(spec)
        super().__init__(**native_form(held, FRAMEWORK, version(), turn=True).kwargs)
        self.batch_first = spec.batch_first  # PyTorch 1.8.1 has none; such a layer is composed there
        self.beyond, self.made_of = beyond(spec), spec
        self.to(dtype=getattr(torch, spec.dtype))
        load(self, weights.to_layout("torch", held, notes=notes))
        on_device(self, device)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; whatever becomes the ``out_proj`` keeps PyTorch's encoder layer from its fast path.

        That would go round the attention: not causal, and in evaluation only. A hook keeps it from it, and on a part
        that is never called a hook costs nothing.
        """
        super().__setattr__(name, value)
        if name == "out_proj" and isinstance(value, torch.nn.Module):
            value.register_forward_pre_hook(_no_fast_path)

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


def _no_fast_path(layer: torch.nn.Module, inputs: Any) -> None:
    """A hook that does nothing: PyTorch's encoder layer takes its fast path only round modules without hooks."""


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
