"""Reads one attention layer out of a checkpoint file: its layout is recognised, its heads come from config.json."""

from __future__ import annotations

import difflib
import os
from typing import Any

from mhabridge import layouts, packing
from mhabridge.checkpoint.planning import configuration
from mhabridge.checkpoint.reading import TensorFile, open_tensors
from mhabridge.dtypes import FLOATS
from mhabridge.errors import ArgumentError, ArgumentTypeError, WeightsError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

_COMPARED = 1_000  # layers, and characters of their names, that a mistyped prefix is compared with


def read_attention(
    path: str | os.PathLike[str],
    prefix: str = "",
    num_heads: int | None = None,
    layout: str | None = None,
    **known: Any,
) -> tuple[MHASpec, MHAWeights, list[str]]:
    """The attention layer under a prefix of a checkpoint.

    Args:
        path: a file that ``open_tensors`` reads.
        prefix: what goes before the layer's own tensors, such as "encoder.layer.0.attention".
        num_heads: H; None to take it from a config.json beside the file. That file is read in any case: it may say
            that the layer is no plain multi-head attention, which names and shapes do not tell. Where H is given, a
            config.json that is broken or does not fit is a note.
        layout: the layout's name; None to recognise it.
        **known: fields of the spec that no file tells, such as batch_first; for MegEngine's packed vector kdim and
            vdim (None says that they are embed_dim).

    Returns:
        The spec (in the file's dtype), the weights, and notes on what was assumed or left out.

    Raises:
        ArgumentError: there is nothing under the prefix, the number of heads is not known, or a packed vector's length
            leaves the sizes open.
        ArgumentTypeError: something known that is no field of the spec, or a prefix that is no string.
        CheckpointError: the file cannot be read, or config.json beside it is broken or does not fit.
        UnsupportedError: the layer is no plain multi-head attention.
        WeightsError: the tensors are not those of one layer.
    """
    if not isinstance(prefix, str):
        raise ArgumentTypeError("prefix", given=repr(prefix), expected="a string", advice="The whole file is ''.")
    with open_tensors(path) as file:
        _require_prefix(file, prefix)
        found = layouts.recognise(file.shapes, prefix, **known) if layout is None else None
        name = found.layout if found else str(layout)
        own = _own(file, prefix, name)
        config = configuration.read(file.path)
        notes = [f"{prefix or 'the whole file'} was read in the layout {name}.", *file.notes]
        notes += configuration.require_plain(config)
        heads = config.require_num_heads(prefix) if num_heads is None else num_heads
        configuration.require_own_keys(config, heads)
        notes += packing.left_beside(packing.find(name), file, prefix)
        shapes, fields = {n: file.shapes[n] for n in own}, {"dtype": _dtype(file, own), **known}
        try:
            spec = layouts.spec_from_shapes(name, shapes, heads, prefix, notes, **fields)
        except ArgumentError:
            if num_heads is not None:
                raise
            spec = layouts.spec_from_shapes(name, shapes, 1, prefix, **fields)  # raises if heads are not what is wrong
        misfit = config.misfit(prefix, spec.embed_dim)
        if num_heads is not None:
            notes += config.notes_beside(num_heads, misfit)
        elif misfit is not None:
            raise misfit
        weights = MHAWeights.from_layout(name, {n: file[n] for n in own}, spec, prefix, notes)
    return spec, weights, notes


def _own(file: TensorFile, prefix: str, layout: str) -> list[str]:
    """The full names of the layer's tensors."""
    beside = packing.find(layout).beside
    return [packing.join(prefix, name) for name in packing.below(prefix, file.shapes) if name not in beside]


def _require_prefix(file: TensorFile, prefix: str) -> None:
    if packing.below(prefix, file.shapes):
        return
    there = [path for path in layouts.prefixes(file)[:_COMPARED] if len(path) < _COMPARED]
    near = difflib.get_close_matches(prefix, there, 5, cutoff=0.0)
    raise ArgumentError(
        "prefix",
        given=f"{prefix!r}, with which no tensor of {file.path.name} begins",
        expected="the part of the names before one attention layer",
        advice=f"There are {', '.join(near)}." if near else "No attention layer was recognised in that file.",
    )


def _dtype(file: TensorFile, own: list[str]) -> str:
    found = sorted({file.dtype_names[name] for name in own})
    if len(found) == 1 and found[0] in FLOATS:
        return found[0]
    raise WeightsError(
        f"{file.path.name}: " + ", ".join(own[:8]),
        given="the dtypes " + ", ".join(found),
        expected="one of " + ", ".join(FLOATS) + ", the same for all",
        advice="Quantised weights have to be dequantised first; mixed ones brought to one dtype.",
    )
