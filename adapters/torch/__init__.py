"""PyTorch: ``torch.nn.MultiheadAttention``, from 1.8.1 on.

Why it is built so:
- Both masks travel as one float mask of the layer's dtype: 1.8.1 reads the bytes of a float key_padding_mask as if they
  were bool, and 2.x refuses a mask of another dtype than the query's.
- query, key and value are always three tensors: only a layer that sees one tensor three times takes the fast path,
  which ignores is_causal and has its own answer for fully masked rows.
- A fully masked row is NaN only when weights are asked for (without them the row is the out bias), so they are asked
  for. A live layer's call, whose values nobody looks at, asks for them where they cost nothing (fast path on a CPU),
  and elsewhere has NaN put into such rows of the mask or the output.
- A live layer gets bool masks as they are where that is right: its fast path takes them, and no float ones.
- 1.8.1 keeps out_proj.bias, with random values, when bias is False; it is set to zero.

All modules of this package also run inside workers (Python 3.8).
"""

from __future__ import annotations

from . import state, transformer
from .dropin import MultiheadAttention, build_dropin
from .layers import build, extract, is_layer, require_plain, set_traits, traits
from .live import attend
from .native import FRAMEWORK, run_native, unfit, version
from .ops import OPS

__all__ = [
    "FRAMEWORK",
    "OPS",
    "MultiheadAttention",
    "attend",
    "build",
    "build_dropin",
    "extract",
    "is_layer",
    "require_plain",
    "run_native",
    "set_traits",
    "state",
    "traits",
    "transformer",
    "unfit",
    "version",
]
