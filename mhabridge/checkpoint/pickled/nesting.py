"""Which part of a pickled checkpoint is the state dict, and what lies beside it.

``torch.save(model.state_dict(), f)`` puts the tensors on top; training scripts put them under a key, beside an epoch,
arguments and an optimizer; and some save the whole module. The part is chosen only when there is no doubt.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mhabridge.checkpoint.pickled import versions
from mhabridge.checkpoint.pickled.inert import Made, Node
from mhabridge.checkpoint.pickled.objects import stored_object, survey
from mhabridge.checkpoint.pickled.pickles import Loaded
from mhabridge.checkpoint.pickled.values import KNOWN, MAX_DEPTH, Interpreter, is_dict, key_shown, key_text
from mhabridge.checkpoint.pickled.whole_modules import class_of, is_module, module_entries
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.packed import Deflated
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject, StoredTensor
from mhabridge.errors import CheckpointError

# Under one of these keys lies a state dict even if there are tensors beside it (a random generator's state, say).
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "net", "network", "weights", "ema")
# Parts of keys under which the tensors are no parameters, as optimizers and Lightning's callbacks have them.
_NOT_MODELS = ("optim", "sched", "scaler", "callback", "loops", "metric", "hparam", "hyper_param", "rng")
MAX_ENTRIES = checking.MOST_TENSORS
_VERSIONS = "The versions of module classes (PyTorch's _metadata) of a part of the state dict are not kept."
_LISTED = 4  # keys in a note
_ONLY_TENSOR = "tensor"  # the name of a tensor that is the whole file


@dataclasses.dataclass
class Found:
    """A checkpoint, taken apart.

    Args:
        nested: the keys under which the state dict lies.
        tensors: of the state dict.
        objects: everything else.
        notes: what people should know.
        made: the first keys that are no texts, and of which names were made all the same.
        made_more: how many there are besides.
        metadata: the versions of module classes, if the state dict has some; see ``versions``.
    """

    nested: tuple[str, ...] = ()
    tensors: list[StoredTensor] = dataclasses.field(default_factory=list)
    objects: list[StoredObject] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    made: list[str] = dataclasses.field(default_factory=list)
    made_more: int = 0
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def opened(
        self, path: Path, format: str, files: Sequence[Path | Deflated], metadata: Mapping[str, str] | None = None
    ) -> StoredFile:
        """The open checkpoint, with the files that its extents count and what the format keeps beside the tensors."""
        return StoredFile(
            path,
            format,
            self.tensors,
            tuple(self.objects),
            metadata,
            self.nested,
            tuple(files),
            tuple(self.notes),
        )

    def name(self, key: Node) -> str | None:
        """A key as part of a name; None of what no name can be made of. One that is no text is told in a note."""
        text = key_text(key)
        if text is not None and not isinstance(key, str):
            if len(self.made) < _LISTED:
                self.made.append(f"{text} ({type(key).__name__})")
            else:
                self.made_more += 1
        return text


def find(interpreter: Interpreter, loaded: Loaded, nested: Sequence[str] | None = None) -> Found:
    """The state dict in a pickle, and what lies beside it.

    Args:
        interpreter: of the pickle.
        loaded: the pickle.
        nested: the keys under which the state dict lies, () for the top; None to find it.

    Raises:
        CheckpointError: it could be more than one part, or there is no tensor, or a tensor is of a kind that cannot be
            read, or the file asks for a name that no entry shows.
    """
    interpreter.allow(loaded.operations)
    found = Found(_guess(interpreter, loaded.root, ()) if nested is None else tuple(nested))
    node = loaded.root
    for depth, key in enumerate(found.nested):
        node = _step_into(interpreter, found, node, depth, key)
    if interpreter.is_tensor(node):
        found.tensors.append(interpreter.tensor(node, _ONLY_TENSOR))
        found.notes.append(f"The file holds one tensor without a name; it is called {_ONLY_TENSOR!r} here.")
    else:
        _collect(interpreter, found, node, "", 0, in_module=False)
    _require_tensors(interpreter, loaded, found, node)
    _require_known(interpreter, loaded, found)
    found.notes += interpreter.notes
    if found.made:
        more = f" and {found.made_more} more" if found.made_more else ""
        found.notes.append(f"Names are texts; these are made of other keys: {', '.join(found.made)}{more}.")
    return found


def _step_into(interpreter: Interpreter, found: Found, node: Node, depth: int, key: str) -> Node:
    """The entry under a key; everything beside it becomes an object."""
    where = found.nested[:depth]
    pairs = _dict_entries(interpreter, found, node, ".".join(where)) or []
    place = next((number for number, (other, _) in enumerate(pairs) if key_text(other) == key), None)
    if place is None:
        listed = ", ".join(key_text(other) or key_shown(other) for other, _ in pairs[:20])
        raise interpreter.fail(
            ".".join(where),
            f"nested={found.nested!r}",
            f"one of its keys: {listed}" if pairs else "a dict with keys",
            "Choose another part of the file: nested=(KEY, ...), on the command line --nested KEY for each.",
        )
    for other, value in (*pairs[:place], *pairs[place + 1 :]):
        found.objects.append(_object(interpreter, found, value, ".".join(where), other))
    return pairs[place][1]


def _object(interpreter: Interpreter, found: Found, node: Node, where: str, key: Node) -> StoredObject:
    """An entry that is no tensor; under a key of which no name can be made it is listed only, without its value."""
    name = found.name(key)
    if name is not None:
        return stored_object(interpreter, node, _joined(where, name))
    shown = stored_object(interpreter, node, _joined(where, f"(the key {key_shown(key)})"))
    return dataclasses.replace(shown, value=None, text=f"{shown.text}, under a key that is no name")


def _dict_entries(interpreter: Interpreter, found: Found, node: Node, where: str) -> list[tuple[Node, Node]] | None:
    """The entries of a dict; None if it is none. Attributes that were set on it become objects.

    ``_metadata``, which PyTorch sets on every state dict, is kept by itself: it holds the versions of module classes.
    That of a dict inside the state dict, whose paths begin elsewhere, is left out, and a note says so.
    """
    pairs = interpreter.entries(node, where)
    if pairs is None:
        return None
    attributes = interpreter.entries(node.state, where) if isinstance(node, Made) and node.state is not None else []
    if attributes is None:
        raise interpreter.fail(where, "a dict with a state that is none")
    for key, value in attributes:
        if key == versions.KEY:
            text = versions.text_of(stored_object(interpreter, value, key).value)
            if text is None or where != ".".join(found.nested):
                interpreter.notes[_VERSIONS] = None
            else:
                found.metadata[versions.KEY] = text
        else:
            shown = key_text(key) or key_shown(key)
            found.objects.append(stored_object(interpreter, value, _joined(where, f"(attribute {shown})")))
    return pairs


def _collect(interpreter: Interpreter, found: Found, node: Node, prefix: str, depth: int, in_module: bool) -> None:
    """Takes the tensors out of a state dict or a module, all levels down."""
    where = ".".join((*found.nested, prefix.rstrip(".")) if prefix else found.nested)
    if depth > MAX_DEPTH:
        raise interpreter.fail(where, f"more than {MAX_DEPTH} levels, or a loop", "a state dict")
    if is_module(node) and not in_module:
        found.objects.append(_module_object(interpreter, found, node, where))
        in_module = True
    for key, value in _children(interpreter, found, node, where):
        interpreter.step()
        if len(found.tensors) + len(found.objects) > MAX_ENTRIES:
            raise interpreter.fail("", f"more than {MAX_ENTRIES} entries", "a checkpoint's")
        if interpreter.is_tensor(value):
            found.tensors.append(interpreter.tensor(value, prefix + _required_name(interpreter, found, where, key)))
        elif _is_branch(value) and survey(interpreter, value).tensors:
            below = f"{prefix}{_required_name(interpreter, found, where, key)}."
            _collect(interpreter, found, value, below, depth + 1, in_module)
        elif not in_module:
            found.objects.append(_object(interpreter, found, value, where, key))


def _required_name(interpreter: Interpreter, found: Found, where: str, key: Node) -> str:
    """A tensor's key as part of its name.

    Raises:
        CheckpointError: no name can be made of it.
    """
    name = found.name(key)
    if name is None:
        raise interpreter.fail(
            where,
            f"a tensor under the key {key_shown(key)}",
            "a key that is a name: a text, or a number",
            "Give it a name where the file comes from, and save again.",
        )
    return name


def _children(interpreter: Interpreter, found: Found, node: Node, where: str) -> Iterable[tuple[Node, Node]]:
    if is_module(node):
        return module_entries(interpreter, node, where)
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    return _dict_entries(interpreter, found, node, where) or []


def _is_branch(node: Node) -> bool:
    """Whether tensors below a node count as part of the state dict that it is in."""
    return isinstance(node, (list, tuple)) or is_dict(node) or is_module(node)


def _module_object(interpreter: Interpreter, found: Found, node: Made, where: str) -> StoredObject:
    content = survey(interpreter, node)
    text = f"a module of the class {class_of(node)}"
    found.notes.append(
        f"The file holds {text} as a whole: the tensors of its state dict are read, its other attributes (such as "
        "the number of heads) are not."
    )
    return StoredObject(where or "(module)", text, None, content.inert)


# ---- choosing


def _guess(interpreter: Interpreter, node: Node, path: tuple[str, ...]) -> tuple[str, ...]:
    pairs = interpreter.entries(node, ".".join(path))
    if pairs is None:
        return path
    if len(path) > MAX_DEPTH:
        raise interpreter.fail(".".join(path[:3]), f"more than {MAX_DEPTH} levels, or a loop", "a state dict")
    direct = any(interpreter.is_tensor(value) for _, value in pairs)
    parts = {key: value for key, value in pairs if isinstance(key, str) and _may_be_state(interpreter, key, value)}
    if not parts:
        return path
    key = next(iter(parts))
    if len(parts) == 1 and (not direct or key in USUAL_KEYS):
        return _guess(interpreter, parts[key], (*path, key))
    counts = [f"{key} ({survey(interpreter, value).tensors} tensors)" for key, value in parts.items()]
    on_top = ["the top level"] if direct else []
    raise interpreter.fail(
        ".".join(path),
        f"more than one state dict: {', '.join([*on_top, *counts[:20]])}",
        "one, or to be told which",
        f"Choose with nested={(*path, key)!r} ({_option((*path, key))}), or take all with nested={path!r} "
        f"({_option(path)}).",
    )


def _option(path: Sequence[str]) -> str:
    """How the command line is told the same.

    Example:
        >>> _option(("ema", "model")), _option(())
        ('--nested ema --nested model', "--nested ''")
    """
    return " ".join(f"--nested {shlex.quote(key)}" for key in path) or "--nested ''"


def _may_be_state(interpreter: Interpreter, key: str, node: Node) -> bool:
    interpreter.step()
    module = is_module(node)
    if not (module or is_dict(node)) or any(part in key.lower() for part in _NOT_MODELS):
        return False
    if not module and "param_groups" in [name for name, _ in interpreter.entries(node, key) or []]:
        return False
    return survey(interpreter, node).tensors > 0


# ---- checks


def _require_tensors(interpreter: Interpreter, loaded: Loaded, found: Found, node: Node) -> None:
    if found.tensors or (not found.nested and interpreter.entries(node, "") == []):
        return
    asked = [f"{name:.200}" for name in _unknown(loaded)]
    raise interpreter.fail(
        ".".join(found.nested),
        "no tensors" + (f"; it asks for {', '.join(asked[:10])}" if asked else ""),
        "a state dict",
        "Nothing of the file was run.",
    )


def _require_known(interpreter: Interpreter, loaded: Loaded, found: Found) -> None:
    """Every name that is asked for must be seen in an entry: what is hidden elsewhere would be run by the framework."""
    shown = {name for entry in found.objects for name in entry.inert}
    hidden = [f"{name:.200}" for name in _unknown(loaded) if name not in shown]
    if hidden:
        raise CheckpointError(
            str(interpreter.path),
            given=f"a pickle that asks for {', '.join(hidden[:10])}",
            expected="nothing but tensors and plain data",
            advice="Nothing of it was run; the file's own framework would run it. Use it only if you trust its source.",
        )


def _unknown(loaded: Loaded) -> list[str]:
    return [str(name) for name in loaded.names if name.known_as not in KNOWN]


def _joined(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
