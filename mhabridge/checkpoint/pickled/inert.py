"""What a pickle is turned into: plain data, and records of what it asks for. Making or using them runs nothing.

Strings, numbers, None, lists and tuples stand for themselves. Dicts are ``Table``s, since hashing a hostile key can be
slow or crash, and bytes are ``Slice``s of the file, since they may be gigabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

Node = Any  # what a pickle was turned into: plain data or one of the records below


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """The name of a class or function that a pickle asks for; it is never looked up.

    Attributes:
        known_as: the name as Python 3 and NumPy 1 spell it; each tensor asks for some a few times.

    Example:
        >>> str(Name("__builtin__", "set")), Name("__builtin__", "set").known_as
        ('__builtin__.set', 'builtins.set')
    """

    module: str
    name: str
    known_as: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        module = _NEW_MODULES.get(self.module, self.module)
        if module == "numpy._core" or module.startswith("numpy._core."):
            module = "numpy.core" + module[len("numpy._core") :]
        object.__setattr__(self, "known_as", f"{module}.{self.name}")

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# Python 2's module names, which protocols 0 to 2 still use.
_NEW_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Made:
    """An object that the pickle would have made by a call.

    Args:
        function: what it calls: a ``Name``, or whatever else it put there.
        args: the positional arguments.
        keywords: the keyword arguments (a ``Table``), or None.
        state: what it would give the object afterwards, or None.
        items: what it would append or add to the object.
        pairs: the keys and values that it would set in the object.
    """

    function: Node
    args: tuple[Node, ...] = ()
    keywords: Node = None
    state: Node = None
    items: Sequence[Node] = ()  # no list before there is something in it: a byte of a hostile file makes a record
    pairs: Sequence[tuple[Node, Node]] = ()

    @property
    def known_as(self) -> str:
        """``Name.known_as`` of the function; empty when it is not called by a name, or with keywords."""
        return self.function.known_as if isinstance(self.function, Name) and self.keywords is None else ""


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Table:
    """A dict: its keys and values in the order in which they were set, doubles included."""

    pairs: Sequence[tuple[Node, Node]] = ()


@dataclasses.dataclass(frozen=True, eq=False, repr=False, slots=True)
class Persistent:
    """A reference to something outside the pickle, such as a storage of PyTorch."""

    id: Node


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Bytes, or a long text, that stay in the file.

    Args:
        offset: of the first byte in the file.
        length: in bytes.
        encoding: of a text; empty for bytes.
    """

    offset: int
    length: int
    encoding: str = ""


def parts(node: Node) -> list[Node]:
    """All nodes that a node is made of, one level down.

    Example:
        >>> parts(Made(Name("torch", "Size"), ((2, 3),)))
        [Name(module='torch', name='Size'), (2, 3), None, None]
    """
    if isinstance(node, (list, tuple)):
        return list(node)
    if isinstance(node, Table):
        return [part for pair in node.pairs for part in pair]
    if isinstance(node, Made):
        flat = [part for pair in node.pairs for part in pair]
        return [node.function, *node.args, node.keywords, node.state, *node.items, *flat]
    return [node.id] if isinstance(node, Persistent) else []
