"""PyTorch: ``torch.nn.MultiheadAttention``, from 1.8.1 on.

Why it is built so:
- Both masks travel as one float mask of the layer's dtype: 1.8.1 reads the bytes of a float key_padding_mask as if they
  were bool, and 2.x refuses a mask of another dtype than the query's.
- query, key and value are always three tensors: only a layer that sees one tensor three times takes the fast path,
  which ignores is_causal and has its own answer for fully masked rows.
- A fully masked row is NaN only when weights are asked for (without them the row is the out bias), so they are asked
  for.
- 1.8.1 keeps out_proj.bias, with random values, when bias is False; it is set to zero.

All modules of this package also run inside workers (Python 3.8).
"""

from __future__ import annotations

from .dropin import MultiheadAttention
from .layers import build, extract, is_layer, set_traits, traits
from .live import attend
from .native import FRAMEWORK, run_native, unfit, version
from .ops import OPS

__all__ = [
    "FRAMEWORK",
    "OPS",
    "MultiheadAttention",
    "attend",
    "build",
    "extract",
    "is_layer",
    "run_native",
    "set_traits",
    "traits",
    "unfit",
    "version",
]
