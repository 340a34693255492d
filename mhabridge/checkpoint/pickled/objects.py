"""The entries of a pickled checkpoint that are no tensors: their value if it is plain data, and what they ask for."""

from __future__ import annotations

from typing import Any

from mhabridge.checkpoint.pickled import arrays
from mhabridge.checkpoint.pickled.inert import Made, Name, Node, Persistent, Slice, Table, parts
from mhabridge.checkpoint.pickled.values import KNOWN, MAX_DEPTH, SETS, Interpreter, Survey
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.errors import CheckpointError

_WIDEST = 80  # characters of a text that is shown
_LARGEST_SCALAR = 16  # bytes
_PLAIN_COST = 5  # steps: what is built takes more memory than what is looked at
# Made of the list that they are called with, or (a set, from pickle's protocol 4 on) of what is added afterwards.
_CONTAINERS = (*SETS, "builtins.list", "builtins.tuple", "torch.Size")
_LEADING = (Name, list, tuple, Table, Made, Persistent)
_SHORT = 8  # parts of a tuple that are looked at at once
_DEEPEST = 10_000  # records in each other, on any way through them


def survey(interpreter: Interpreter, node: Node) -> Survey:
    """Counts the tensors in a record and finds the names that it asks for.

    Raises:
        CheckpointError: the records are nested too deep, or refer to each other too often.
    """
    found = interpreter.surveys.get(id(node))
    if found is None:
        found = interpreter.surveys[id(node)] = Survey(*_counted(interpreter, node))
    return found


def _counted(interpreter: Interpreter, node: Node) -> tuple[int, tuple[str, ...]]:
    tensors, seen = 0, set()
    inert: dict[str, None] = {}
    waiting: list[tuple[Node, bool, int]] = [(node, True, 0)]
    while waiting:
        here, counts, depth = waiting.pop()
        if isinstance(here, Name) and here.known_as not in KNOWN:
            inert[str(here)] = None
        if id(here) in seen or not isinstance(here, (list, tuple, Table, Made, Persistent)):
            continue
        interpreter.step()
        if depth > _DEEPEST:
            raise interpreter.fail("", f"records nested more than {_DEEPEST} deep", "a checkpoint's")
        seen.add(id(here))
        if interpreter.is_tensor(here):
            tensors, counts = tensors + counts, False  # a Parameter holds its tensor: one, not two
        waiting += [(part, counts, depth + 1) for part in reversed(parts(here)) if _may_lead_on(part)]
    return tensors, tuple(inert)


def _may_lead_on(node: Node) -> bool:
    """Whether there may be a tensor or a name in a record; shapes and strides, of which there are many, have none."""
    if isinstance(node, tuple) and len(node) <= _SHORT:
        return any(isinstance(part, _LEADING) for part in node)
    return isinstance(node, _LEADING)


def stored_object(interpreter: Interpreter, node: Node, name: str) -> StoredObject:
    """A record as an entry that is no tensor (or a tensor beside the state dict, such as an optimizer's).

    Args:
        interpreter: of the pickle.
        node: the record.
        name: the entry's full name.

    Raises:
        CheckpointError: a key is there twice in a dict, or the pickle refers to itself too often.
    """
    found = survey(interpreter, node)
    try:
        value = _plain(interpreter, node, 0)
    except _NotPlainError:
        value = None
    return StoredObject(name, _text(interpreter, node, found, value), value, found.inert)


def _plain(interpreter: Interpreter, node: Node, depth: int) -> Any:
    """The value of plain data that JSON can hold; tuples become lists, NumPy's scalars numbers."""
    interpreter.step(_PLAIN_COST)
    if depth > MAX_DEPTH:
        raise _NotPlainError
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, Made) and node.known_as == arrays.SCALAR:
        return _scalar(interpreter, node)
    if isinstance(node, Made) and node.known_as == "torch.Size" and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, (list, tuple)):
        return [_plain(interpreter, item, depth + 1) for item in node]
    pairs = interpreter.entries(node, "")
    if pairs is None or not all(isinstance(key, str) for key, _ in pairs):
        raise _NotPlainError
    return {key: _plain(interpreter, value, depth + 1) for key, value in pairs}


def _scalar(interpreter: Interpreter, node: Made) -> Any:
    value = arrays.scalar(node, lambda payload: _small(interpreter, payload))
    if value is None:
        raise _NotPlainError
    return value


def _small(interpreter: Interpreter, payload: Node) -> bytes:
    """A payload's bytes when they are few, else none."""
    text = arrays.text_payload(payload)
    if text is not None and isinstance(text[0], str):
        try:
            return text[0].encode(text[1])
        except UnicodeError:
            return b""
    if isinstance(payload, Slice) and payload.length <= _LARGEST_SCALAR:
        return interpreter.stream.read_at(payload.offset, payload.length)
    return b""


def _text(interpreter: Interpreter, node: Node, found: Survey, value: Any) -> str:
    if node is None or isinstance(value, (bool, int, float, str)):
        text = str(value)
        return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
    with_tensors = f" with {found.tensors} tensor{'s'[: found.tensors > 1]}" if found.tensors else ""
    pairs = interpreter.entries(node, "")
    if pairs is not None:
        return f"a dict of {len(pairs)} entries{with_tensors}"
    if isinstance(node, (list, tuple)):
        return f"a {type(node).__name__} of {len(node)} entries{with_tensors}"
    return _object_text(interpreter, node) + ("" if interpreter.is_tensor(node) else with_tensors)


def _object_text(interpreter: Interpreter, node: Node) -> str:
    if isinstance(node, Slice):
        return f"{'text' if node.encoding else 'bytes'} of length {node.length}"
    if not isinstance(node, Made):
        return str(node) if isinstance(node, Name) else "a storage"
    if interpreter.is_tensor(node):
        return _tensor_text(interpreter, node)
    found = arrays.array_element(node)
    if found is not None:
        return f"an array of {found.text}"
    if node.known_as in _CONTAINERS:
        first = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else ()
        return f"a {node.known_as.removeprefix('builtins.')} of {len(first) + len(node.items)} entries"
    return f"an object of {node.function}" if isinstance(node.function, Name) else "an object"


def _tensor_text(interpreter: Interpreter, node: Made) -> str:
    try:
        tensor = interpreter.tensor(node, "")
    except CheckpointError:
        return "a tensor that cannot be read"
    return f"a {tensor.dtype} tensor of shape {tensor.shape}"


class _NotPlainError(Exception):
    """JSON cannot hold it."""
