"""Which framework a checkpoint is for, and which one it is from, as far as that can be told."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhabridge import mapping
from mhabridge.checkpoint.planning import modules, sidecar
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A framework's names and shapes, perhaps in one version.

    Args:
        name: one of ``modules.known_dialects``, such as "mindspore.mint".
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
    if base not in modules.known_dialects():
        raise ArgumentError(option, given=repr(name), expected="one of " + ", ".join(modules.known_dialects()))
    return Dialect(base, version)


def source_dialects(file: StoredFile, specs: sidecar.Specs, said: str | None = None) -> tuple[str, ...]:
    """The frameworks whose names a file may have: as is said, or by what travels with it, its format, its names.

    Raises:
        ArgumentError: what is said is no framework that is known.
    """
    if said is not None:
        return (dialect(said, "source").name,)
    found = _framework_of(file, specs)
    return modules.of_framework(found) if found else mapping.FRAMEWORKS


def mark_of(framework: str) -> str | None:
    """How a framework's tools mark their safetensors files."""
    mark: str | None = _declared(framework).get("mark")
    return mark


def _framework_of(file: StoredFile, specs: sidecar.Specs) -> str | None:
    if specs.framework is not None:
        return dialect(specs.framework).framework
    by_file = (one for one in mapping.FRAMEWORKS if _has_mark(file, _declared(one)))
    leaves = {name.rpartition(".")[2] for name in file}
    by_name = (one for one in mapping.FRAMEWORKS if leaves.intersection(_declared(one).get("names", ())))
    return next(by_file, None) or next(by_name, None)


def _has_mark(file: StoredFile, declared: dict[str, Any]) -> bool:
    return file.format in declared["formats"] or file.metadata.get("format", "") == declared.get("mark")


def _declared(framework: str) -> dict[str, Any]:
    declared: dict[str, Any] = mapping.table(framework)["framework"]["checkpoints"]
    return declared
