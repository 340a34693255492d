"""Whole modules in a pickle: objects of classes that stay names, whose attributes hold the tensors of a state dict."""

from __future__ import annotations

from collections.abc import Iterator

from mhabridge.checkpoint.pickled.inert import Made, Name, Node, Persistent, Table
from mhabridge.checkpoint.pickled.values import KNOWN, Interpreter, is_dict


def is_module(node: Node) -> bool:
    """Whether a record is an object of an unknown class with attributes, as a pickled module is."""
    return (
        isinstance(node, Made)
        and isinstance(class_of(node), Name)
        and node.known_as not in KNOWN
        and isinstance(_attributes(node), Table)
    )


def class_of(node: Made) -> Node:
    """The class; old files of PyTorch put a module's class into a persistent id, beside its source code."""
    if isinstance(node.function, Persistent) and isinstance(node.function.id, tuple) and len(node.function.id) > 1:
        return node.function.id[1]
    return node.function


def _attributes(node: Made) -> Node:
    """The attributes of an object; those of a class with slots come as the second of two."""
    if isinstance(node.state, tuple) and len(node.state) == 2:
        return node.state[0] or node.state[1]
    return node.state


def module_entries(interpreter: Interpreter, node: Made, where: str) -> Iterator[tuple[Node, Node]]:
    """What a module's state dict is made of: its parameters, buffers and submodules, under their names.

    PyTorch keeps these in three dicts, and leaves some buffers out of state dicts; elsewhere they are plain attributes.
    """
    every = interpreter.entries(_attributes(node), where) or []
    attributes = {key: value for key, value in every if isinstance(key, str)}
    if not {"_parameters", "_modules"} <= attributes.keys() or not is_dict(attributes["_parameters"]):
        yield from every
        return
    transient = attributes.get("_non_persistent_buffers_set")
    left_out = [*transient.items, *(transient.args[0] if transient.args else ())] if isinstance(transient, Made) else []
    for table in ("_parameters", "_buffers", "_modules"):
        for key, value in interpreter.entries(attributes.get(table), where) or []:
            if value is not None and (table != "_buffers" or key not in left_out):
                yield key, value
