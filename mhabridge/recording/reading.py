"""Reads recordings: who recorded, which layers there are, and what each call was given and answered.

A recording is a safetensors file with one JSON text in its metadata, or the journal that such a file is made of. It
may be anybody's: names, sizes and the depth of the JSON are checked before anything is believed, and tensors are read
one by one, when they are asked for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from mhabridge.checkpoint.formats import safetensors_file, safetensors_header
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor
from mhabridge.errors import ArgumentTypeError, CheckpointError, UnsupportedError
from mhabridge.recording import reading_journal
from mhabridge.recording.contents import FORMATS, METADATA_KEY
from mhabridge.recording.journal import ENDING, MAGIC
from mhabridge.recording.reading_journal import damaged

_DEEPEST = 16  # lists and objects in each other
_SCALARS = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True)
class Item:
    """One argument or output of a call; one of these, and a plain value (None among them) when it is none of them.

    Args:
        tensor: the name of the tensor that was kept.
        same_as: the argument of the same call that it is.
        left_out: why it was not kept.
        items: of a tuple, a list, a mapping or a dataclass.
        names: of the items; none of a tuple or list.
        value: a plain value.
    """

    tensor: str = ""
    same_as: str = ""
    left_out: str = ""
    items: tuple[Item, ...] | None = None
    value: Any = None
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RecordedLayer:
    """One layer.

    Args:
        path: in the model.
        of_class: the full name of its class.
        kind: the class's own name.
        attention: whether it is an attention layer that the recorder knows.
        settings: its plain attributes, by name.
        parameters: the tensors' names, by the parameters' native names; values as at the layer's first recorded call.
        whole: whether it is the model itself, of which only the answer was recorded.
    """

    path: str
    of_class: str
    kind: str
    attention: bool
    settings: dict[str, Any]
    parameters: dict[str, str]
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class RecordedCall:
    """One call of a layer.

    Args:
        index: counted over all calls.
        layer: the path of the layer.
        nth: counted over the calls of that layer.
        training: the layer was in training mode.
        arguments: as passed, by the framework's own names.
        outputs: what it returned.
        grads: by what they are of: "arguments/query", "outputs/0", "parameters/in_proj_weight".
        parameters: what the layer's parameters were at this call, by their native names.
        changed: whether they are others than at the layer's call before.
        output_names: of the outputs; none where they have only their places.
    """

    index: int
    layer: str
    nth: int
    training: bool
    arguments: dict[str, Item]
    outputs: tuple[Item, ...]
    grads: dict[str, Item]
    parameters: dict[str, Item] = dataclasses.field(default_factory=dict)
    changed: bool = False
    output_names: tuple[str, ...] = ()

    def item(self, name: str) -> Item:
        """An argument; where it is the same as another, that one."""
        found = self.arguments[name]
        return self.item(found.same_as) if found.same_as else found


@dataclasses.dataclass(frozen=True)
class Recording:
    """An open recording. Use it in a ``with`` statement, or call ``close``.

    Args:
        path: the file.
        framework: that the model is of.
        version: of the framework.
        environment: what else is known of where it ran.
        complete: the recording came to its end.
        left_out: what is not in it, and why.
        layers: by path.
        calls: in the order in which they ran.
        file: the tensors.
        follows: whether a layer's later calls say which parameters have changed; old recordings do not.
        stepped: whether the layers were given another recording's inputs.
    """

    path: Path
    framework: str
    version: str
    environment: dict[str, str]
    complete: bool
    left_out: tuple[str, ...]
    layers: dict[str, RecordedLayer]
    calls: tuple[RecordedCall, ...]
    file: StoredFile
    follows: bool = True
    stepped: bool = False

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()

    def stored(self, item: Item) -> StoredTensor | None:
        """Shape and dtype of what was kept as a tensor; None for anything else."""
        return self.file[item.tensor] if item.tensor else None

    def read(self, item: Item) -> np.ndarray | None:
        """What was kept as a tensor, read now (bfloat16 as ``ml_dtypes.bfloat16``); None for anything else.

        Raises:
            CheckpointError: the file has become shorter, or NumPy has no such dtype.
        """
        return self.file.read(item.tensor) if item.tensor else None

    def tells(self, call: RecordedCall) -> bool:
        """Whether it is known what the layer's parameters were at a call."""
        return self.follows or not call.nth

    def parameters(self, call: RecordedCall) -> dict[str, np.ndarray]:
        """The parameters of the layer that was called, as they were then, by their native names, read now.

        Raises:
            UnsupportedError: one of them was left out.
        """
        for name, item in call.parameters.items():
            if item.left_out:
                given = f"a parameter that was left out of the recording ({item.left_out})"
                raise UnsupportedError(name, given=given, expected="its values at this call")
        return {name: self.file.read(item.tensor) for name, item in call.parameters.items() if item.tensor}


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """Open a recording, or the journal of one that is still running or broke off.

    Raises:
        ArgumentTypeError: that is no path.
        CheckpointError: the file is missing, damaged, or no recording.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError("path", given=repr(path), expected="a path: a string or a pathlib.Path")
    path = Path(path)
    journal_beside = path.with_name(path.name + ENDING)
    if path.name and not os.path.lexists(path) and journal_beside.is_file():
        raise CheckpointError(
            str(path),
            given="nothing there",
            expected="a recording",
            advice=f"{journal_beside} is there: the journal of a recording that still runs or broke off. Compare that.",
        )
    with checking.opened(path) as descriptor:
        journal = os.pread(descriptor, len(MAGIC), 0) == MAGIC
    file, document = reading_journal.read(path) if journal else _finished(path)
    try:
        return _Reader(path, file, journal).recording(document)
    except BaseException:
        file.close()
        raise


def _finished(path: Path) -> tuple[StoredFile, dict[str, Any]]:
    file = safetensors_file.read(path)
    try:
        text = file.metadata.get(METADATA_KEY)
        if text is None:
            raise damaged(path, f"its metadata has no {METADATA_KEY}")
        try:
            document = checking.json_of(text, object_pairs_hook=safetensors_header.unique)
        except ValueError as error:
            raise damaged(path, f"{METADATA_KEY} is no JSON: {error!s:.200}") from None
        if not isinstance(document, dict):
            raise damaged(path, f"{METADATA_KEY} is no JSON object")
    except BaseException:
        file.close()
        raise
    return file, document


class _Reader:
    """Turns the JSON of one file into a ``Recording``, and believes nothing of it."""

    def __init__(self, path: Path, file: StoredFile, journal: bool) -> None:
        self.path, self.file, self.journal = path, file, journal

    def recording(self, document: dict[str, Any]) -> Recording:
        self._plain(document, 0)
        found = document.get("format")
        if found not in FORMATS or type(found) is not int:
            self._refuse(f"it is of format {found!r:.40}, and {', '.join(map(str, FORMATS))} are known")
        layers = {name: self._layer(name, entry) for name, entry in self._object(document, "layers").items()}
        calls = [self._call(entry, layers) for entry in self._list(document, "calls")]
        if len({call.index for call in calls}) != len(calls):
            self._refuse("two calls have one index")
        return Recording(
            self.path,
            self._text(document, "framework"),
            self._text(document, "version"),
            {name: str(value) for name, value in self._object(document, "environment").items()},
            document.get("complete") is True,
            tuple(map(str, self._list(document, "left_out"))),
            layers,
            self._with_parameters(sorted(calls, key=lambda call: call.index), layers),
            self.file,
            found > 1,
            document.get("inputs_from") is not None,
        )

    def _with_parameters(
        self, calls: list[RecordedCall], layers: Mapping[str, RecordedLayer]
    ) -> tuple[RecordedCall, ...]:
        """The calls, each of which says only what has changed, with all of their layers' parameters."""
        now = {
            path: {name: Item(tensor=tensor) for name, tensor in layer.parameters.items()}
            for path, layer in layers.items()
        }
        made = []
        for call in calls:
            if call.parameters:
                now[call.layer] = {**now[call.layer], **call.parameters}
            made.append(dataclasses.replace(call, parameters=now[call.layer], changed=bool(call.parameters)))
        return tuple(made)

    def _layer(self, path: str, entry: Any) -> RecordedLayer:
        settings = self._object(entry, "settings")
        if not all(isinstance(value, _SCALARS) for value in settings.values()):
            self._refuse(f"a setting of {path!r:.200} is no plain value")
        parameters = self._object(entry, "parameters")
        kept = {name: self._tensor(tensor) for name, tensor in parameters.items()}
        names = {name: item.tensor for name, item in kept.items() if item.tensor}
        kind, attention = self._text(entry, "kind"), entry.get("attention") is True
        whole = entry.get("whole") is True
        return RecordedLayer(path, self._text(entry, "class"), kind, attention, settings, names, whole)

    def _call(self, entry: Any, layers: Mapping[str, RecordedLayer]) -> RecordedCall:
        layer = self._text(entry, "layer")
        if layer not in layers:
            self._refuse(f"a call of the layer {layer!r:.200}, which is not there")
        arguments: dict[str, Item] = {}
        for name, given in self._object(entry, "arguments").items():
            item = self._item(given)
            if item.same_as and item.same_as not in arguments:
                self._refuse(f"an argument is the same as {item.same_as!r:.80}, which does not come before it")
            earlier = arguments[item.same_as].same_as if item.same_as else ""
            arguments[name] = Item(same_as=earlier) if earlier else item
        outputs = tuple(self._item(given) for given in self._list(entry, "outputs"))
        grads = {name: self._item(given) for name, given in self._object(entry, "grads").items()}
        training = entry.get("training") is True
        parameters = {name: self._item(given) for name, given in self._object(entry, "parameters").items()}
        index, nth = self._count(entry, "index"), self._count(entry, "nth")
        names = tuple(self._list(entry, "output_names"))
        fine = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(outputs)
        if names and not fine:
            self._refuse(f"its outputs are called {names!r:.80}")
        return RecordedCall(index, layer, nth, training, arguments, outputs, grads, parameters, output_names=names)

    def _item(self, given: Any) -> Item:
        if not isinstance(given, dict) or len(given) != 1:
            self._refuse(f"an argument or output is described by {given!r:.80}")
        ((kind, content),) = given.items()
        if kind == "tensor":
            return self._tensor(content)
        if kind == "items" and isinstance(content, list):
            return Item(items=tuple(map(self._item, content)))
        if kind == "named" and isinstance(content, dict):
            return Item(items=tuple(map(self._item, content.values())), names=tuple(content))
        if kind == "value" and isinstance(content, _SCALARS):
            return Item(value=content)
        if kind == "same_as" and isinstance(content, str) and content:
            return Item(same_as=content)
        if kind == "left_out" and isinstance(content, str) and content:
            return Item(left_out=content)
        self._refuse(f"an argument or output is described by {given!r:.80}")

    def _tensor(self, name: Any) -> Item:
        if isinstance(name, str) and name in self.file:
            return Item(tensor=name)
        if isinstance(name, str) and self.journal:
            return Item(left_out="the journal broke off before it")
        self._refuse(f"the tensor {name!r:.200} is not there")

    def _object(self, entry: Any, name: str) -> dict[str, Any]:
        found = entry.get(name, {}) if isinstance(entry, dict) else None
        if not isinstance(found, dict):
            self._refuse(f"{name} is no object")
        return found

    def _list(self, entry: Any, name: str) -> list[Any]:
        found = entry.get(name, []) if isinstance(entry, dict) else None
        if not isinstance(found, list):
            self._refuse(f"{name} is no list")
        return found

    def _text(self, entry: Any, name: str) -> str:
        found = entry.get(name, "") if isinstance(entry, dict) else None
        if not isinstance(found, str):
            self._refuse(f"{name} is no text")
        return found

    def _count(self, entry: dict[str, Any], name: str) -> int:
        found = entry.get(name)
        if type(found) is not int or not 0 <= found < 2**62:
            self._refuse(f"{name} is {found!r:.40}")
        return found

    def _plain(self, value: Any, depth: int) -> None:
        """Nothing nested deep, and no half of a surrogate pair, which JSON can hold and no terminal."""
        if depth > _DEEPEST:
            self._refuse(f"it is nested deeper than {_DEEPEST}")
        if isinstance(value, str) and not safetensors_header.is_text(value):
            self._refuse("a name in it is no text")
        for part in _parts(value):
            self._plain(part, depth + 1)

    def _refuse(self, why: str) -> NoReturn:
        raise damaged(self.path, why)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list):
        yield from value
