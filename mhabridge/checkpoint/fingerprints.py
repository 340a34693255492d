"""A hash of a checkpoint's weights that is the same in every framework's layout and in every file format.

The attention hash is that of the canonical parameters of all attention layers: name, dtype, shape and bytes of each,
sorted by their hashes, so that names, prefixes and the order of the layers do not count. The hash of all tensors adds
the others, each with its dtype, its bytes, and its shape without axes of length 1 (which frameworks add and leave out)
and without an axis of groups. SHA-256 throughout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.planning import kinds, modules, sidecar, turned
from mhabridge.checkpoint.planning.drafts import by_module
from mhabridge.checkpoint.planning.layers import Block, find_blocks
from mhabridge.checkpoint.planning.origins import source_dialects
from mhabridge.checkpoint.storage.comparing import all_zero
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor
from mhabridge.errors import ArgumentError, CheckpointError

# Counters that some frameworks keep and others do not have; they are no weights.
_NOT_COUNTED = ("num_batches_tracked",)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What ``fingerprint`` gives.

    Args:
        attention: of all attention layers, in hexadecimal.
        all: of all tensors.
        layers: how many attention layers there are.
        tensors: how many tensors there are; that depends on the layout, so two fingerprints can be equal without it.
    """

    attention: str
    all: str
    layers: int
    tensors: int = dataclasses.field(compare=False)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self))


def fingerprint(
    src: str | os.PathLike[str],
    spec: Any = None,
    num_heads: int | None = None,
    nested: Sequence[str] | None = None,
) -> Fingerprint:
    """The hashes of a checkpoint's weights.

    An absent bias differs from one that is zero, unless the specs that travel with the file say that it was added.

    Args:
        src: a checkpoint of any format.
        spec: an ``MHASpec`` for all attention layers, or a mapping from prefixes to them, where the file does not tell.
        num_heads: of all attention layers; it does not change the hashes.
        nested: the keys under which the state dict lies; None to find it.

    Raises:
        ArgumentError: a packed vector with several readings.
        CheckpointError: the file cannot be read.
        UnsupportedError: attention that is no plain multi-head attention.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from mhabridge import MHASpec, MHAWeights
        >>> folder, spec = Path(tempfile.mkdtemp()), MHASpec(4, 2)
        >>> weights = MHAWeights.random(spec)
        >>> for layout in ("torch", "hf-bert"):
        ...     np.savez(folder / f"{layout}.npz", **weights.to_layout(layout, spec, prefix=layout))
        >>> fingerprint(folder / "torch.npz") == fingerprint(folder / "hf-bert.npz")
        True
    """
    with open_checkpoint(src, nested) as file:
        specs = sidecar.known(file, spec)
        blocks = find_blocks(file, dict(file), specs, num_heads)
        hashes = [_block(file, block) for block in blocks]
        taken = {name for block in blocks for name in block.names}
        others = [name for name in file if name not in taken]
        lying = turned.paths((block.prefix, block.layout) for block in blocks)
        attention, rest = _together(hashes), _others(file, others, specs, lying)
        return Fingerprint(attention.hex(), _together([*hashes, *rest]).hex(), len(blocks), len(file))


def _block(file: StoredFile, block: Block) -> bytes:
    """The hash of an attention layer; zeros that only its layout asked for do not count."""
    own = block.spec.parameter_shapes()
    counted = [part for part, view in block.views.items() if part in own or not all_zero(file, view)]
    return _together(_tensor(file, block.views[part], part.encode(), block.views[part].shape) for part in counted)


def _others(file: StoredFile, names: Iterable[str], specs: sidecar.Specs, lying: Collection[str]) -> Iterator[bytes]:
    """The hashes of the tensors that are no attention; linear maps that lie the other way round count as all others."""
    dialects = source_dialects(file, specs)
    for path, leaves in by_module(names).items():
        own = {leaf: file[name].shape for leaf, name in leaves.items()}
        if path in lying and specs.kinds.get(path) is None and turned.reading(own, turned=True):
            weight, bias = turned.unturned(file[leaves["weight"]]), file[leaves["bias"]]
            yield from (_tensor(file, one, b"", tuple(n for n in one.shape if n != 1)) for one in (weight, bias))
            continue
        shapes = {**own, **_without_groups(path, modules.readings(own, dialects), specs.kinds.get(path))}
        for leaf, name in leaves.items():
            if leaf not in _NOT_COUNTED:
                yield _tensor(file, file[name], b"", tuple(size for size in shapes[leaf] if size != 1))


def _without_groups(path: str, found: list[modules.Reading], kind: str | None) -> dict[str, tuple[int, ...]]:
    """PyTorch's shapes of a convolution whose groups are an axis of its weight; empty for everything else."""
    if all("G" not in reading.sizes for reading in found):
        return {}
    try:
        choice = kinds.decide(path, found, "torch") if kind is None else kinds.stated(path, found, kind, "torch")
    except (ArgumentError, CheckpointError):
        return {}  # several readings: the shapes count as they are
    written = choice.written("torch")
    return {leaf: written[part][1] for leaf, part in choice.reading.parts.items()}


def _tensor(file: StoredFile, tensor: StoredTensor, name: bytes, shape: tuple[int, ...]) -> bytes:
    found = hashlib.sha256(b"%s\0%s\0%s\0" % (name, tensor.dtype.encode(), repr(shape).encode()))
    for piece in file.chunks(tensor):
        found.update(piece)
    return found.digest()


def _together(hashes: Iterable[bytes]) -> bytes:
    return hashlib.sha256(b"".join(sorted(hashes))).digest()
