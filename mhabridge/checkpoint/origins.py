"""Which framework a checkpoint is for, and which one it is from, as far as that can be told."""

from __future__ import annotations

import dataclasses

from mhabridge import mapping
from mhabridge.checkpoint import modules, sidecar
from mhabridge.checkpoint.stored import StoredFile
from mhabridge.errors import ArgumentError

_BY_FORMAT = {"torch": "torch", "torch-legacy": "torch", "mindspore-ckpt": "mindspore", "megengine": "megengine"}
_BY_METADATA = {"pt": "torch", "ms": "mindspore"}  # how these frameworks' tools mark safetensors files
_BY_LEAF = {
    **dict.fromkeys(("gamma", "beta", "embedding_table", "moving_mean", "moving_variance"), "mindspore"),
    "io_weight_bias": "megengine",
}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A framework's names and shapes, perhaps in one version.

    Args:
        name: one of ``modules.DIALECTS``, such as "mindspore.mint".
        version: None for the newest that the tables know.
    """

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"

    @property
    def framework(self) -> str:
        """The framework, whichever of its ways to name layers it is: "mindspore"."""
        return self.name.partition(".")[0]

    @property
    def attention_layout(self) -> str:
        """The layout of its own attention layer."""
        return self.framework if self.version is None else f"{self.framework}@{self.version}"


def dialect(name: str, option: str = "to") -> Dialect:
    """What the user says, such as "mindspore@2.0".

    Raises:
        ArgumentError: no framework that is known.
    """
    base, version = mapping.parse_name(name)
    if base not in modules.DIALECTS:
        raise ArgumentError(option, given=repr(name), expected="one of " + ", ".join(modules.DIALECTS))
    return Dialect(base, version)


def source_dialects(file: StoredFile, specs: sidecar.Specs, said: str | None = None) -> tuple[str, ...]:
    """The frameworks whose names a file may have: as is said, or by what travels with it, its format, its names.

    Raises:
        ArgumentError: what is said is no framework that is known.
    """
    if said is not None:
        return (dialect(said, "source").name,)
    found = _framework_of(file, specs)
    if found == "mindspore":
        return ("mindspore", "mindspore.mint")  # a file may hold both, and does not say which
    return (found,) if found else mapping.FRAMEWORKS


def _framework_of(file: StoredFile, specs: sidecar.Specs) -> str | None:
    if specs.framework is not None:
        return dialect(specs.framework).framework
    known = _BY_FORMAT.get(file.format) or _BY_METADATA.get(file.metadata.get("format", ""))
    by_leaf = (_BY_LEAF.get(name.rpartition(".")[2]) for name in file)
    return known or next((name for name in by_leaf if name), None)
