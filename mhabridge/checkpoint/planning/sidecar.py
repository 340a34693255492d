"""What is known of a checkpoint's layers beside its tensors: specs of attention, and kinds that no shape tells.

They travel with a converted file: in the metadata of a safetensors file, under the key "mhabridge", or in a small file
``NAME.mhabridge.json`` beside a format that has no room. Both hold the same JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhabridge import mapping, packing
from mhabridge.checkpoint.planning import modules
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.errors import ArgumentTypeError, CheckpointError, MHABridgeError
from mhabridge.spec import MHASpec

KEY = "mhabridge"
_VERSION = 1
_LARGEST = 16 << 20  # bytes; thousands of layers take far less


@dataclasses.dataclass(frozen=True)
class Specs:
    """What is known of a checkpoint's layers.

    Args:
        by_prefix: fields of ``MHASpec``, and "layout", of single attention layers.
        for_all: such fields, for the layers that are not among them.
        framework: the framework (with its version) that the file was written for; None when that is not known.
        kinds: what other layers are whose names and shapes leave that open, by path ("embedding").
        where: what travels with the file, for messages; None when nothing does.
        stated: the prefixes that the user speaks of.
    """

    by_prefix: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    for_all: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    framework: str | None = None
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str | None = None
    stated: frozenset[str] = frozenset()

    def of(self, *prefixes: str) -> dict[str, Any]:
        """What is known of the attention layer under a prefix; the first of several names for it that is known."""
        return dict(next((self.by_prefix[one] for one in prefixes if one in self.by_prefix), self.for_all))

    def travelling(self, *prefixes: str) -> bool:
        """Whether what is known of a layer came with the file."""
        return any(one in self.by_prefix and one not in self.stated for one in prefixes)

    def stale(self, why: str) -> CheckpointError:
        """The error for what travels with a file and does not fit it."""
        return CheckpointError(
            str(self.where),
            given=f"what belongs to another file: {why}",
            expected="what was written together with this one",
            advice="Was the checkpoint replaced since? Then take this away, and give what is not known with --spec, "
            "--num-heads and --kind.",
        )

    def moved(self, new_paths: Mapping[str, str]) -> Specs:
        """The same of layers that are called otherwise; those without a new path are gone."""

        def of_new(known: Mapping[str, Any]) -> dict[str, Any]:
            return {new_paths[path]: what for path, what in known.items() if path in new_paths}

        return dataclasses.replace(self, by_prefix=of_new(self.by_prefix), kinds=of_new(self.kinds))

    def dumped(self) -> str:
        """The JSON that travels with a file."""
        content = {"mhabridge": _VERSION, "framework": self.framework, "attention": self.by_prefix, "kinds": self.kinds}
        return json.dumps(content)


def path_beside(path: Path) -> Path:
    """Where the sidecar of a file is."""
    return path.with_name(path.name + ".mhabridge.json")


def known(file: StoredFile, spec: Any = None) -> Specs:
    """What the user says, then what travels with the file.

    Args:
        file: an open checkpoint.
        spec: an ``MHASpec`` for all its attention layers, a mapping from prefixes to them, or None.

    Raises:
        ArgumentTypeError: the spec is neither.
        CheckpointError: what travels with the file is not what we write there.
    """
    travelling = _read(file)
    if spec is None:
        return travelling
    if isinstance(spec, MHASpec):
        return dataclasses.replace(travelling, by_prefix={}, for_all=fields_of(spec))
    if not isinstance(spec, Mapping) or not all(isinstance(one, MHASpec) for one in spec.values()):
        raise ArgumentTypeError(
            "spec", given=type(spec).__name__, expected="an MHASpec, or a mapping from prefixes to them"
        )
    given = {prefix: fields_of(one) for prefix, one in spec.items()}
    return dataclasses.replace(travelling, by_prefix={**travelling.by_prefix, **given}, stated=frozenset(given))


def fields_of(spec: MHASpec) -> dict[str, Any]:
    """The fields of a spec but for the dtype: the file's own counts."""
    fields = spec.to_dict()
    del fields["dtype"]
    return fields


def _read(file: StoredFile) -> Specs:
    text, where = file.metadata.get(KEY), f"{file.path}: metadata {KEY!r}"
    beside = path_beside(file.path)
    if text is None and beside.is_file():
        where = str(beside)
        with checking.opened(beside) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > _LARGEST:
                raise CheckpointError(where, given=f"{size} bytes", expected="a few kilobytes")
            text = os.pread(descriptor, size, 0).decode("utf-8", "replace")
    return Specs() if text is None else _parsed(text, where)


def _parsed(text: str, where: str) -> Specs:
    try:
        content = checking.json_of(text)
        if content["mhabridge"] != _VERSION:
            raise ValueError(f"version {content['mhabridge']}")
        framework, kinds = content["framework"], content["kinds"]
        if framework is not None and mapping.parse_name(framework)[0] not in modules.known_dialects():
            raise ValueError(f"the framework {framework}")
        if not all(isinstance(kind, str) for kind in kinds.values()):
            raise ValueError("a kind that is no string")
        layers = {prefix: _checked(fields) for prefix, fields in content["attention"].items()}
        return Specs(layers, {}, framework, kinds, where)
    except (ValueError, TypeError, KeyError, AttributeError, MHABridgeError) as error:
        raise CheckpointError(
            where,
            given=f"what mhabridge does not write there ({type(error).__name__}: {error!s:.200})",
            expected="the specs of the file's attention layers",
            advice="Take it away, and give what is not known with --spec, --num-heads and --kind.",
        ) from error


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as MHASpec has them, num_heads among them only if it is known."""
    found = packing.find(fields["layout"])
    if found.refused:
        raise ValueError(f"the layout {found.name}, in which nothing is written")
    layout = found.name
    given = {name: value for name, value in fields.items() if name not in ("layout", "num_heads")}
    spec = MHASpec.from_dict({**given, "num_heads": fields.get("num_heads", 1)})
    known = {**fields_of(spec), "layout": layout}
    if "num_heads" not in fields:
        del known["num_heads"]
    return known
