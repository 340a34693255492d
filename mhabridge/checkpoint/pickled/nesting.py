"""Which part of a pickled checkpoint is the state dict, and what lies beside it.

``torch.save(model.state_dict(), f)`` puts the tensors on top; training scripts put them under a key, beside an epoch,
arguments and an optimizer; and some save the whole module. The part is chosen only when there is no doubt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mhabridge.checkpoint.pickled.inert import Made, Node
from mhabridge.checkpoint.pickled.objects import stored_object, survey
from mhabridge.checkpoint.pickled.pickles import Loaded
from mhabridge.checkpoint.pickled.values import KNOWN, MAX_DEPTH, Interpreter, is_dict, key_text
from mhabridge.checkpoint.pickled.whole_modules import class_of, is_module, module_entries
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import StoredObject, StoredTensor
from mhabridge.errors import CheckpointError

# Under one of these keys lies a state dict even if there are tensors beside it (a random generator's state, say).
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "net", "network", "weights", "ema")
# Parts of keys under which the tensors are no parameters, as optimizers and Lightning's callbacks have them.
_NOT_MODELS = ("optim", "sched", "scaler", "callback", "loops", "metric", "hparam", "hyper_param", "rng")
MAX_ENTRIES = checking.MOST_TENSORS
_VERSIONS = "The versions of module classes (PyTorch's _metadata) are not kept."
_ONLY_TENSOR = "tensor"  # the name of a tensor that is the whole file


@dataclasses.dataclass
class Found:
    """A checkpoint, taken apart.

    Args:
        nested: the keys under which the state dict lies.
        tensors: of the state dict.
        objects: everything else.
        notes: what people should know.
    """

    nested: tuple[str, ...] = ()
    tensors: list[StoredTensor] = dataclasses.field(default_factory=list)
    objects: list[StoredObject] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


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
        found.tensors.append(_named(interpreter, node, _ONLY_TENSOR))
        found.notes.append(f"The file holds one tensor without a name; it is called {_ONLY_TENSOR!r} here.")
    else:
        _collect(interpreter, found, node, "", 0, in_module=False)
    _require_tensors(interpreter, loaded, found, node)
    _require_known(interpreter, loaded, found)
    found.notes += interpreter.notes
    return found


def _step_into(interpreter: Interpreter, found: Found, node: Node, depth: int, key: str) -> Node:
    """The entry under a key; everything beside it becomes an object."""
    where = found.nested[:depth]
    pairs = dict_entries(interpreter, found, node, ".".join(where))
    if key not in [other for other, _ in pairs or []]:
        raise interpreter.fail(
            ".".join(where),
            f"nested={found.nested!r}",
            f"one of its keys: {', '.join(name for name, _ in pairs[:20])}" if pairs else "a dict with keys",
            "Choose another part of the file.",
        )
    for other, value in pairs or []:
        if other != key:
            found.objects.append(stored_object(interpreter, value, ".".join((*where, other))))
    return next(value for other, value in pairs or [] if other == key)


def dict_entries(interpreter: Interpreter, found: Found, node: Node, where: str) -> list[tuple[str, Node]] | None:
    """The entries of a dict under names; None if it is none. Attributes that were set on it become objects.

    ``_metadata``, which PyTorch sets on every state dict, is left out: it holds the versions of module classes, which
    no other format has and ``load_state_dict`` looks at for a few old ones only. A note says so.
    """
    pairs = interpreter.entries(node, where)
    if pairs is None:
        return None
    attributes = interpreter.entries(node.state, where) if isinstance(node, Made) and node.state is not None else []
    if attributes is None:
        raise interpreter.fail(where, "a dict with a state that is none")
    for key, value in attributes:
        if key == "_metadata":
            interpreter.notes[_VERSIONS] = None
        else:
            found.objects.append(stored_object(interpreter, value, _joined(where, f"(attribute {key_text(key)})")))
    return [(key_text(key), value) for key, value in pairs]


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
            found.tensors.append(_named(interpreter, value, prefix + key))
        elif _is_branch(value) and survey(interpreter, value).tensors:
            _collect(interpreter, found, value, f"{prefix}{key}.", depth + 1, in_module)
        elif not in_module:
            found.objects.append(stored_object(interpreter, value, _joined(where, key)))


def _children(interpreter: Interpreter, found: Found, node: Node, where: str) -> Iterable[tuple[str, Node]]:
    if is_module(node):
        return module_entries(interpreter, node, where)
    if isinstance(node, (list, tuple)):
        return ((str(number), item) for number, item in enumerate(node))
    return dict_entries(interpreter, found, node, where) or []


def _is_branch(node: Node) -> bool:
    """Whether tensors below a node count as part of the state dict that it is in."""
    return isinstance(node, (list, tuple)) or is_dict(node) or is_module(node)


def _named(interpreter: Interpreter, node: Made, name: str) -> StoredTensor:
    return dataclasses.replace(interpreter.tensor(node, name), name=name)


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
        f"Choose with nested={(*path, key)!r}, or take all with nested={path!r}.",
    )


def _may_be_state(interpreter: Interpreter, key: str, node: Node) -> bool:
    interpreter.step()
    if any(part in key.lower() for part in _NOT_MODELS):
        return False
    if is_module(node):
        return survey(interpreter, node).tensors > 0
    if not is_dict(node) or "param_groups" in [name for name, _ in interpreter.entries(node, key) or []]:
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
