"""What is in a checkpoint, without reading its numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.planning import sidecar
from mhabridge.checkpoint.planning.layers import Block, find_blocks, incomplete
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.errors import MHABridgeError

_LISTED = 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor: name, dtype, shape, bytes, and what it is tied with (the same numbers in the file).

    Of several that are tied the first names all others, and each of these the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    tied: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What ``inspect_checkpoint`` gives.

    Args:
        path: the file.
        format: its format.
        tensors: all of them, in the file's order.
        blocks: the attention layers, each with its spec; num_heads may be unknown.
        objects: the entries that are no tensors, as text, by name.
        nested: the keys under which the state dict was found.
        metadata: what the format keeps beside the tensors.
        notes: what the reader noticed, and why attention layers could not be told, if they could not.
    """

    path: str
    format: str
    tensors: tuple[TensorInfo, ...]
    blocks: tuple[Block, ...]
    objects: dict[str, str]
    nested: tuple[str, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Everything as one JSON object."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["tensors"] = [dataclasses.asdict(tensor) for tensor in self.tensors]
        fields["blocks"] = [block.to_dict() for block in self.blocks]
        return json.dumps(fields)


def inspect_checkpoint(
    src: str | os.PathLike[str], spec: Any = None, num_heads: int | None = None, nested: Sequence[str] | None = None
) -> CheckpointInfo:
    """The tensors of a checkpoint of any format, and its attention layers with their specs.

    Args:
        src: the file.
        spec: an ``MHASpec`` for all attention layers, or a mapping from prefixes to them, where the file does not tell.
        num_heads: of all attention layers.
        nested: the keys under which the state dict lies; None to find it.

    Raises:
        CheckpointError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from mhabridge import MHASpec, MHAWeights
        >>> file, spec = Path(tempfile.mkdtemp()) / "a.npz", MHASpec(4, 2)
        >>> np.savez(file, **MHAWeights.random(spec).to_layout("hf-bert", spec, prefix="layer.0.attention"))
        >>> info = inspect_checkpoint(file)
        >>> len(info.tensors), info.blocks[0].prefix, info.blocks[0].layout
        (8, 'layer.0.attention', 'hf-bert')
    """
    with open_checkpoint(src, nested) as file:
        blocks, notes = _blocks(file, spec, num_heads)
        return CheckpointInfo(
            str(file.path),
            file.format,
            _tensors(file),
            blocks,
            {entry.name: entry.text for entry in file.objects},
            file.nested,
            file.metadata,
            (*file.notes, *_unreadable(file), *notes),
        )


def _blocks(file: StoredFile, spec: Any, num_heads: int | None) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """The attention layers; when they cannot be told, a note says why: inspecting is to help with exactly that."""
    try:
        blocks = find_blocks(file, dict(file), sidecar.known(file, spec), num_heads)
    except MHABridgeError as error:
        return (), (f"attention layers: {error}",)
    taken = {name for block in blocks for name in block.names}
    left = incomplete(name for name in file if name not in taken)
    return tuple(blocks), tuple(dict.fromkeys([*(note for block in blocks for note in block.notes), *left]))


def _unreadable(file: StoredFile) -> list[str]:
    """Notes on tensors whose numbers cannot be read; those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, tensor in file.items():
        if tensor.unreadable is not None:
            by_reason.setdefault(tensor.unreadable[0], []).append(name)
    more = {reason: f" and {len(names) - _LISTED} more" * (len(names) > _LISTED) for reason, names in by_reason.items()}
    return [f"{', '.join(names[:_LISTED])}{more[reason]}: {reason}." for reason, names in by_reason.items()]


def _tensors(file: StoredFile) -> tuple[TensorInfo, ...]:
    same: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in file.items():
        same.setdefault((tensor.storage, tensor.start, tensor.strides, tensor.shape, tensor.dtype), []).append(name)
    tied: dict[str, tuple[str, ...]] = {name: (first,) for first, *others in same.values() for name in others}
    tied |= {first: tuple(others) for first, *others in same.values()}
    return tuple(
        TensorInfo(name, tensor.dtype, tensor.shape, tensor.nbytes, tied[name]) for name, tensor in file.items()
    )
