"""Interprets the inert records of a pickle: which are tensors, which are plain data, and which ask for something else.

The names below are all that is recognised. Anything else stays a record with a name that is shown to people, and never
becomes a tensor. A pickle may hold cycles, and a few bytes may stand for a tree of any size (each level twice the one
below), so every walk is bounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.pickled import arrays, torch_tensors
from mhabridge.checkpoint.pickled.inert import Made, Name, Node, Slice, Table
from mhabridge.checkpoint.pickled.spill import Spill
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredTensor
from mhabridge.checkpoint.storage.streams import DAMAGED, ByteStream
from mhabridge.errors import CheckpointError

MAX_DEPTH = 60  # of dicts, lists and modules in each other
MAX_STEPS = 5_000_000  # records looked at in all, each as often as it is; more in a pickle of many operations
_STEPS_EACH = 3

MEGENGINE_TENSORS = ("megengine.tensor.Parameter", "megengine.tensor.Tensor")
MAX_KEY = 2**60  # Python's hashes of larger integers can be made to collide, which takes quadratic time
_WITH_ATTRIBUTES = (torch_tensors.FROM_TYPE, torch_tensors.PARAMETERS[1])  # as their last argument
_ARRAYS = (arrays.RECONSTRUCT, arrays.FROM_BUFFER)
DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")
SETS = ("builtins.set", "builtins.frozenset")

# Names that are harmless to be asked for, since they make plain data or tensors.
KNOWN = {
    *_ARRAYS, *DICTS, *SETS, *MEGENGINE_TENSORS, *torch_tensors.REBUILD, *torch_tensors.PARAMETERS,
    *torch_tensors.TENSOR_CLASSES, arrays.SCALAR, arrays.ENCODE, torch_tensors.FROM_TYPE,
    "numpy.ndarray", "numpy.dtype", "megengine.core._imperative_rt.pybfloat16", "torch.Size", "torch.device",
    *(f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in torch_tensors.STORAGES),
    *(f"{module}.{name}" for module in ("torch", "ml_dtypes") for name in ITEM_SIZES),
    *(f"builtins.{kind.__name__}" for kind in (bool, bytearray, bytes, complex, float, int, list, str, tuple)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a record is made of, all levels down: how many tensors, and the names that are not ``KNOWN``."""

    tensors: int
    inert: tuple[str, ...]


class Interpreter:
    """Says what the records of one pickle stand for.

    Args:
        path: of the file, for messages.
        descriptor: of the open file, to read small values from it.
        spill: where payloads that are written as text go.
        storage_of: finds the storage of a persistent id, or says what is wrong; None if the format has no such ids.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        spill: Spill,
        storage_of: Callable[[Node], torch_tensors.Storage | str] | None = None,
    ) -> None:
        self.path = path
        self.notes: dict[str, None] = {}
        self.surveys: dict[int, Survey] = {}  # of the records looked through so far, by identity
        self.stream = ByteStream(descriptor, path)
        self._spill, self._storage_of = spill, storage_of or (lambda node: "a storage in a file that has none")
        self._tensors: dict[int, StoredTensor] = {}  # by the record's identity: what the memo shares is tied
        self._spilled: dict[int, Extent] = {}
        self._steps = MAX_STEPS

    def fail(self, where: str, given: str, expected: str = "", advice: str = DAMAGED) -> CheckpointError:
        """An error about one entry."""
        subject = f"{self.path}: {where}" if where else str(self.path)
        return CheckpointError(subject, given=given, expected=expected, advice=advice)

    def allow(self, operations: int) -> None:
        """As many steps as a pickle of so many operations takes, each of which makes one record at most."""
        self._steps = max(self._steps, _STEPS_EACH * operations)

    def step(self, cost: int = 1) -> None:
        """Counts one look at a record, or several.

        Raises:
            CheckpointError: it is one too many.
        """
        self._steps -= cost
        if self._steps < 0:
            raise self.fail("", "a pickle whose parts refer to each other too often", "a checkpoint's")

    # ---- tensors

    def is_tensor(self, node: Node) -> bool:
        """Whether a record stands for a tensor, perhaps one that ``tensor`` refuses."""
        if not isinstance(node, Made):
            return False
        name = node.known_as
        if name not in _ARRAYS:
            return name in _TENSORS
        found = arrays.array_element(node)
        return found is not None and bool(found.dtype or "metadata" in found.text)

    def tensor(self, node: Made, name: str) -> StoredTensor:
        """The tensor that a record stands for.

        Args:
            node: a record for which ``is_tensor`` holds.
            name: the tensor's full name.

        Raises:
            CheckpointError: it is damaged, or of a kind that no format here has.
        """
        found = self._tensors.get(id(node))
        if found is None:
            found = self._tensors[id(node)] = self._interpreted(node, name)
        return found if found.name == name else found.named(name)

    def _interpreted(self, node: Made, where: str) -> StoredTensor:
        for _ in range(MAX_DEPTH):  # wrappers: a Parameter holds a tensor
            name = node.known_as
            if name in torch_tensors.REFUSED:
                raise self._refused(where, torch_tensors.REFUSED[name])
            if name in torch_tensors.REBUILD:
                return self._checked(torch_tensors.tensor(node, where, self._storage_of), where)
            if name in _ARRAYS:
                return self._array(node, where)
            inner = self._inside(node, where)
            if not isinstance(inner, Made):
                break
            node = inner
        raise self.fail(where, "a tensor that is made of no numbers", "an array or a storage")

    def _inside(self, node: Made, where: str) -> Node:
        """What a wrapper holds."""
        last = node.args[-1] if node.args else None
        if node.known_as in _WITH_ATTRIBUTES and isinstance(last, Table) and last.pairs:
            self.notes["Python attributes that were set on tensors are not read."] = None
        if node.known_as == torch_tensors.FROM_TYPE and len(node.args) == 4:
            function, kind, args, _ = node.args
            if not isinstance(kind, Name) or kind.known_as not in torch_tensors.TENSOR_CLASSES:
                raise self._refused(where, f"a tensor of the class {kind if isinstance(kind, Name) else 'of no name'}")
            return Made(function, args) if isinstance(args, tuple) else None
        state = node.state.pairs if isinstance(node.state, Table) else []
        if node.known_as in MEGENGINE_TENSORS and any(key == "qparams" and value is not None for key, value in state):
            raise self._refused(where, "a quantised tensor")
        return node.args[0] if node.args else None

    def _refused(self, where: str, what: str) -> CheckpointError:
        return self.fail(
            where, what, "a dense tensor of plain numbers", "Make it one where it comes from, and save again."
        )

    def _checked(self, found: StoredTensor | str, where: str) -> StoredTensor:
        if isinstance(found, str):
            raise self.fail(
                where, found, "a tensor of plain numbers", "The file is damaged, or not written by torch.save."
            )
        return found

    def _array(self, node: Made, where: str) -> StoredTensor:
        found = arrays.array_element(node)
        if found is None or not found.dtype:
            raise self._refused(where, f"an array of {found.text if found else 'no dtype'}")
        return self._checked(arrays.array(node, where, f"array {len(self._tensors)}", self._payload), where)

    def _payload(self, node: Node) -> Extent | None:
        if isinstance(node, Slice) and not node.encoding:
            return Extent(0, node.offset, node.length)
        if isinstance(node, Made) and node.known_as == "builtins.bytes" and not node.args:
            return Extent(0, 0, 0)
        text = arrays.text_payload(node)
        if text is None:
            return None
        if id(node) not in self._spilled:
            self._spilled[id(node)] = self._spill.add(*text)
        return self._spilled[id(node)]

    # ---- dicts

    def entries(self, node: Node, where: str) -> list[tuple[Node, Node]] | None:
        """The keys and values of a dict of any known kind; None if it is none.

        Raises:
            CheckpointError: a key is there twice.
        """
        if isinstance(node, Table):
            pairs = [*node.pairs]
        elif isinstance(node, Made) and node.known_as in DICTS:
            pairs = [*self._first_pairs(node, where), *node.pairs]
        else:
            return None
        seen: set[Any] = set()
        for key, _ in pairs:
            if not isinstance(key, (str, int)):
                continue
            if isinstance(key, int) and abs(key) > MAX_KEY:
                raise self.fail(where, "an integer of more than 60 bits as a key", "a checkpoint's keys")
            if key in seen:
                raise self.fail(
                    where, f"the key {str(key)[:60]!r} twice in one dict", "each once", "One would be lost."
                )
            seen.add(key)
        return pairs

    def _first_pairs(self, node: Made, where: str) -> list[tuple[Node, Node]]:
        """What a dict is made with: Python 2 gives an OrderedDict a list of pairs, a defaultdict has its default."""
        given = node.args[0] if node.args else None
        if given is None or isinstance(given, Name):
            return []
        if isinstance(given, Table):
            return [*given.pairs]
        if isinstance(given, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given):
            return [(key, value) for key, value in given]
        raise self.fail(where, "a dict that is made of something else than keys and values")


def is_dict(node: Node) -> bool:
    """Whether a record stands for a dict of a known kind."""
    return isinstance(node, Table) or (isinstance(node, Made) and node.known_as in DICTS)


def key_text(key: Node) -> str | None:
    """A dict's key as part of a name; None of what no name can be made of.

    Example:
        >>> key_text("fc"), key_text(0), key_text(None), key_text(("fc", 0))
        ('fc', '0', 'None', None)
    """
    return str(key) if isinstance(key, (str, int, float)) or key is None else None


def key_shown(key: Node, depth: int = 0) -> str:
    """Any key, for people.

    Example:
        >>> key_shown(("fc", 0)), key_shown(Slice(10, 3)), key_shown(7)
        ("('fc', 0)", '3 bytes', '7')
    """
    if isinstance(key, tuple) and depth < _SHOWN:
        inner = [key_shown(part, depth + 1) for part in key[:_SHOWN]] + ["..."] * (len(key) > _SHOWN)
        return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"
    if isinstance(key, Slice):
        return f"a text of {key.length} bytes" if key.encoding else f"{key.length} bytes"
    if isinstance(key, Made):
        text = key.args[0] if key.known_as == arrays.ENCODE and key.args else None
        return f"b{text!r:.60}" if isinstance(text, str) else f"an object of {key.function!s:.60}"
    return f"{key!r:.60}" if isinstance(key, (str, int, float)) or key is None else f"a {type(key).__name__.lower()}"


_SHOWN = 4  # parts of a tuple that is a key, and tuples in each other

_TENSORS = {
    *torch_tensors.REBUILD,
    *torch_tensors.PARAMETERS,
    *torch_tensors.REFUSED,
    torch_tensors.FROM_TYPE,
    *MEGENGINE_TENSORS,
}
