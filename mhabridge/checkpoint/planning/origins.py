"""Which framework a checkpoint is for, and which one it is from, as far as that can be told."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mhabridge import mapping
from mhabridge.checkpoint.planning import evidence, modules, sidecar
from mhabridge.checkpoint.storage.stored import StoredFile, shapes_of
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
        ArgumentError: no framework that is known, or a version of it that is not.

    Example:
        >>> dialect("mindspore@2.4").version
        '2.4'
    """
    found = _parsed(name, option)
    require_known(found.framework, found.version, option)
    return found


def installed(framework: str, version: str) -> str:
    """What a framework that is at hand is called here: in a version newer than the tables know, like the newest.

    Example:
        >>> installed("torch", "99.0"), installed("torch", "2.1.0+cpu")
        ('torch', 'torch@2.1.0+cpu')
    """
    return framework if _is_newer(framework, version) else f"{framework}@{version}"


def require_known(framework: str, version: str | None, option: str) -> None:
    """Refuse a version that the tables do not know: what it calls things is not known either.

    Args:
        framework: its name; anything else has no versions that are known here.
        version: None for the newest.
        option: that it was given as.

    Raises:
        ArgumentError: it is newer or older than all that are known.
    """
    if version is None or framework not in mapping.FRAMEWORKS:
        return
    oldest, newest = _range(framework)
    if mapping.version_key(version) < mapping.version_key(oldest) or _is_newer(framework, version):
        raise ArgumentError(
            option,
            given=repr(f"{framework}@{version}"),
            expected=f"a version that is known: {framework}@{oldest} to {framework}@{newest}",
            advice=f"{framework!r} alone is the newest.",
        )


def _range(framework: str) -> tuple[str, str]:
    table = mapping.table(framework)
    return table["layouts"][framework]["oldest"], table["dialects"][framework]["newest"]


def _is_newer(framework: str, version: str) -> bool:
    """Whether it comes after the newest one: 2.10.3 does not come after 2.10."""
    newest = mapping.version_key(_range(framework)[1])
    return mapping.version_key(version)[: len(newest)] > newest


def _parsed(name: str, option: str) -> Dialect:
    base, version = mapping.parse_name(name)
    if base not in modules.known_dialects():
        near = difflib.get_close_matches(base.lower().split()[0] if base.split() else "", modules.known_dialects(), 1)
        raise ArgumentError(
            option,
            given=repr(name),
            expected="one of " + ", ".join(modules.known_dialects()),
            advice="".join(f"Did you mean {one}? " for one in near) + "A version follows an @, as in torch@1.8.1.",
        )
    return Dialect(base, version)


def notes_on_dtypes(to: Dialect, named: Iterable[tuple[str, str]]) -> list[str]:
    """What a framework does with tensors of dtypes that it does not have, or treats in its own way.

    Args:
        to: the framework.
        named: each tensor's name and dtype.

    Example:
        >>> notes_on_dtypes(Dialect("megengine"), [("a", "uint64"), ("b", "float32")])
        ['uint64 (a): MegEngine has no tensors of it.']
    """
    names: dict[str, list[str]] = {}
    for name, dtype in named:
        names.setdefault(dtype, []).append(name)
    return [
        f"{entry['dtype']} ({_few(names[entry['dtype']])}): {entry['reason']}"
        for entry in _declared(to.framework).get("dtypes", [])
        if entry["dtype"] in names and _concerns(entry, to.version)
    ]


def _concerns(entry: Mapping[str, str], version: str | None) -> bool:
    """Whether an entry is about a version; None is the newest."""
    if version is None:
        return "until" not in entry
    since, key, until = (
        mapping.version_key(one) for one in (entry.get("since", "0"), version, entry.get("until", "99"))
    )
    return since <= key < until


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a checkpoint is from.

    Args:
        dialects: the frameworks whose names it may have.
        note: why, where only the names in it tell; empty where somebody said so, or its format or mark does.
    """

    dialects: tuple[str, ...]
    note: str = ""


def origin(file: StoredFile, specs: sidecar.Specs, said: str | None = None) -> Origin:
    """The frameworks whose names a file may have: as is said, or by what travels with it, its format, its names.

    Raises:
        ArgumentError: what is said is no framework that is known.
    """
    if said is not None:
        return Origin((dialect(said, "source").name,))
    found = _framework_of(file, specs)
    if found is not None:
        return Origin(modules.of_framework(found))
    verdict = evidence.weigh(shapes_of(file))
    return Origin(mapping.FRAMEWORKS) if verdict is None else Origin(verdict.dialects, verdict.note)


def source_dialects(file: StoredFile, specs: sidecar.Specs, said: str | None = None) -> tuple[str, ...]:
    """The frameworks whose names a file may have, as ``origin`` finds them."""
    return origin(file, specs, said).dialects


def mark_of(framework: str) -> str | None:
    """How a framework's tools mark their safetensors files."""
    mark: str | None = _declared(framework).get("mark")
    return mark


def notes_on_format(to: str | None, format: str) -> list[str]:
    """What to say where one framework's names go into a format that only another one writes and reads.

    Args:
        to: the target's framework, as the user says it; None where all names stay.
        format: of the target.

    Example:
        >>> notes_on_format("torch", "mindspore-ckpt")
        ["mindspore-ckpt is MindSpore's own format, and gets PyTorch's names and layouts."]
        >>> notes_on_format("mindspore@2.0", "mindspore-ckpt"), notes_on_format("torch", "safetensors")
        ([], [])
    """
    if to is None:
        return []
    own = dialect(to).framework
    return [
        f"{format} is {mapping.table(one)['framework']['title']}'s own format, and gets "
        f"{mapping.table(own)['framework']['title']}'s names and layouts."
        for one in mapping.FRAMEWORKS
        if one != own and format in _declared(one)["formats"]
    ]


def _framework_of(file: StoredFile, specs: sidecar.Specs) -> str | None:
    if specs.framework is not None:  # of any version: it says how names are to be read, and these stay
        return _parsed(specs.framework, "source").framework
    return next((one for one in mapping.FRAMEWORKS if _has_mark(file, _declared(one))), None)


def _has_mark(file: StoredFile, declared: dict[str, Any]) -> bool:
    return file.format in declared["formats"] or file.metadata.get("format", "") == declared.get("mark")


def _declared(framework: str) -> dict[str, Any]:
    declared: dict[str, Any] = mapping.table(framework)["framework"]["checkpoints"]
    return declared
