"""MindSpore: ``mindspore.nn.MultiheadAttention``, from 2.0 on.

Why it is built so:
- Both masks travel as one float mask: a bool key_padding_mask beside a float attn_mask is *added* as 1.0 by the cell.
- query, key and value are passed by position (keywords raise IndexError) and are always three tensors: the cell
  remembers from one call to the next whether they were one (in graph mode it then answers for the wrong ones).
- A cell is in evaluation mode when it is made; ``set_train`` says which, always.
- need_weights=False gives a 1-tuple.
- A live native cell is composed in graph mode: what was compiled for one tensor given three times also answers for
  three.
- The drop-in has two forms. Called from Python in PyNative it is ``attend``, with every check and the native cell
  where that serves. Its construct is what a compiler reads (graph mode, ``jit``, a larger cell that is compiled): one
  formula in plain operations, with shapes, dtypes and flags resolved while compiling. 2.0 compiles also what a flag
  excludes, so construct must not mention the other form.
- If the first gradient of a process is taken with a source of one position, 2.10 gives wrong gradients from then on,
  for any shape. So the first one here is a small known one; if that is already wrong, the process cannot be used. One
  that fails makes it forget the first, so a known one comes after it again.
- Without a batch or a target row 2.10 leaves the gradients of parameters unwritten, so nothing is computed there.

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
