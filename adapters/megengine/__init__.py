"""MegEngine: ``megengine.module.MultiHeadAttention`` and ``megengine.functional.nn.multi_head_attention``, 1.13.

Why it is built so:
- Masks travel as one float mask built in NumPy: turning a bool mask into one inside MegEngine races (a tenth and more
  of the conversions are wrong at the default async level), and cuDNN-style pairs are ignored on a CPU.
- The softmax does not subtract a negative row maximum: rows whose scores all lie below about -88 are NaN, and lose
  digits before. So the scores' range is looked at first, and outside it the call is composed.
- Backward works only in training mode (in evaluation it fails late and corrupts the heap), so the operator is told
  that it trains, with a dropout of 0, when gradients are wanted. A live call cannot know whether they are, so it always
  tells it that.
- Dropout is set after construction: the constructor sets it to zero.
- What the operator dislikes arrives later, as an AsyncError whose cause is the real one.
- So live layers are composed, and the operator answers only where mode="native" asks for it and the values allow it.

All modules of this package also run inside workers (Python 3.8).
"""

from __future__ import annotations

from . import state, transformer
from .dropin import MultiheadAttention, build_dropin
from .layers import build, extract, is_layer, require_plain, set_traits, traits
from .live import attend
from .native import FRAMEWORK, run_native, unfit, version
from .ops import OPS
from .transformer_layers import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "FRAMEWORK",
    "OPS",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
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
