"""Reads one attention layer out of a checkpoint file: its layout is recognised, its heads come from config.json."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from mhabridge import layouts, mapping, packing
from mhabridge.checkpoint.reading import TensorFile, open_tensors
from mhabridge.dtypes import FLOATS
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError, WeightsError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


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
        num_heads: H; None to take it from a config.json beside the file.
        layout: the layout's name; None to recognise it.
        **known: fields of the spec that no file tells, such as batch_first, or the sizes of MegEngine's packed vector.

    Returns:
        The spec (in the file's dtype), the weights, and notes on what was assumed or left out.

    Raises:
        ArgumentError: there is nothing under the prefix, or the number of heads is not known.
        CheckpointError: the file cannot be read.
        UnsupportedError: the layer is no plain multi-head attention.
        WeightsError: the tensors are not those of one layer.
    """
    with open_tensors(path) as file:
        _require_prefix(file, prefix)
        found = layouts.recognise(file.shapes, prefix, **known) if layout is None else None
        name = found.layout if found else str(layout)
        own = _own(file, prefix, name)
        config = _config(Path(path))
        _refuse_config(config)
        heads = _num_heads(config, prefix) if num_heads is None else num_heads
        _refuse_shared_keys(config, heads)
        notes: list[str] = []
        fields = {"dtype": _dtype(file, own), **known}
        spec = layouts.spec_from_shapes(name, {n: file.shapes[n] for n in own}, heads, prefix, notes, **fields)
        weights = MHAWeights.from_layout(name, {n: file[n] for n in own}, spec, prefix, notes)
    return spec, weights, [f"{prefix or 'the whole file'} was read in the layout {name}.", *notes]


def _own(file: TensorFile, prefix: str, layout: str) -> list[str]:
    """The full names of the layer's tensors."""
    beside = packing.find(layout).beside
    return [packing.join(prefix, name) for name in packing.below(prefix, file.shapes) if name not in beside]


def _require_prefix(file: TensorFile, prefix: str) -> None:
    if packing.below(prefix, file.shapes):
        return
    there = layouts.prefixes(file)
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


def _config(path: Path) -> dict[str, Any]:
    file = path.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(file), given=f"no JSON ({error})", expected="a model's configuration") from error
    return content if isinstance(content, dict) else {}


def _words() -> dict[str, Any]:
    """What config.json calls things; data, in mappings/layouts.toml."""
    words: dict[str, Any] = mapping.table("layouts")["config"]
    return words


def _num_heads(config: dict[str, Any], prefix: str) -> int:
    found = {name: config[name] for name in _words()["num_heads"] if isinstance(config.get(name), int)}
    if len(set(found.values())) == 1:
        return int(next(iter(found.values())))
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    raise ArgumentError(
        "num_heads",
        given=f"None, and config.json beside the file says {said or 'nothing of it'}",
        expected="the number of heads of the layer" + (f" under {prefix}" if prefix else ""),
        advice="No weight tells it: pass num_heads=..., or --num-heads on the command line.",
    )


def _refuse_config(config: dict[str, Any]) -> None:
    for name, value in _words()["refused"].items():
        if config.get(name) == value:
            raise UnsupportedError(
                name,
                given=f"{json.dumps(value)} in config.json",
                expected="a plain multi-head attention",
                advice="MHASpec does not describe such a layer.",
            )


def _refuse_shared_keys(config: dict[str, Any], heads: int) -> None:
    for name in _words()["key_value_heads"]:
        if isinstance(config.get(name), int) and config[name] != heads:
            raise UnsupportedError(
                name,
                given=f"{config[name]} in config.json, with {heads} heads: grouped-query or multi-query attention",
                expected=f"{heads}, as many as heads",
                advice="Several heads share a key there, which MHASpec does not describe.",
            )
