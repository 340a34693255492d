"""Which layers and calls of two recordings belong together: by the user's rules, by name, by order and shape.

Names are compared as they are, and then without what frameworks add or call otherwise: prefixes of wrappers, and the
parts of transformer layers that mappings/ lists. What is left is matched in the order in which it ran, as long as kind
and shapes agree and the order is the same on both sides.
"""

from __future__ import annotations

import dataclasses
import difflib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mhabridge import dtypes, mapping
from mhabridge.checkpoint.planning.renaming import renamer
from mhabridge.errors import CheckpointError, MHABridgeError
from mhabridge.recording.reading import RecordedCall, RecordedLayer, Recording

# Wrappers that put their own name before everything: torch.nn.DataParallel and its kin, torch.compile, Hugging Face.
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "_backbone.")
# Classes that are called otherwise and do the same.
_KINDS = {"dense": "linear", "multiheadattention": "attention"}

_MOST_PAIRS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two calls that belong together; one of them is None where a side lacks it.

    Args:
        first: of the first recording.
        second: of the second.
        matched: how their layers were matched: "rule", "name" or "order"; "" for one call alone.
    """

    first: RecordedCall | None
    second: RecordedCall | None
    matched: str = ""


def match_layers(first: Recording, second: Recording, rules: Any, order: bool) -> dict[str, tuple[str, str]]:
    """For paths of the first recording the path in the second, and how it was found.

    Args:
        first: one recording.
        second: the other.
        rules: that turn the first one's paths into the second one's; as for ``renamer``.
        order: whether what no name matches may be matched by order and shape.

    Raises:
        ArgumentError: a rule that is none.
        ArgumentTypeError: something that is no rule.
    """
    ran = [list(dict.fromkeys(call.layer for call in side.calls)) for side in (first, second)]
    left = {path: first.layers[path] for path in ran[0]}
    free = {path: second.layers[path] for path in ran[1]}
    found: dict[str, tuple[str, str]] = {}

    def take(pairs: Iterable[tuple[str, str]], how: str) -> None:
        for a, b in list(pairs):
            if a in left and b in free:
                found[a] = (b, how)
                del left[a], free[b]

    rename = renamer(rules or None)
    take(((path, rename(path)) for path in left if rename(path) != path), "rule")
    take(((path, path) for path in left), "name")
    plain = [_by_plain_name(side.framework, paths) for side, paths in ((first, left), (second, free))]
    take(((a, plain[1][name]) for name, a in plain[0].items() if name in plain[1]), "name")
    if order:
        take(_in_order(first, left, second, free), "order")
    return found


def _by_plain_name(framework: str, paths: Iterable[str]) -> dict[str, str]:
    """The paths by what they are called without a framework's own ways; ambiguous ones are left out."""
    found: dict[str, str] = {}
    twice = set()
    for path in paths:
        name = plain_name(framework, path)
        if name in found:
            twice.add(name)
        found[name] = path
    return {name: path for name, path in found.items() if name not in twice}


def plain_name(framework: str, path: str) -> str:
    """A layer's path without wrappers, and with PyTorch's names of the parts.

    Example:
        >>> plain_name("mindspore", "model.encoder.layers.0.dense1")
        'encoder.layers.0.linear1'
    """
    while True:
        prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), "")
        if not prefix:
            break
        path = path[len(prefix) :]
    parts = _parts_of(framework)
    return ".".join(parts.get(part, part) for part in path.split("."))


def _parts_of(framework: str) -> dict[str, str]:
    if framework not in mapping.FRAMEWORKS:
        return {}
    entries = mapping.table(framework).get("transformer", {}).get("modules", [])
    return {entry["name"]: entry["canonical"] for entry in entries}


def _in_order(
    first: Recording, left: Mapping[str, RecordedLayer], second: Recording, free: Mapping[str, RecordedLayer]
) -> Iterator[tuple[str, str]]:
    signs = [[signature(side, layer) for layer in of.values()] for side, of in ((first, left), (second, free))]
    names = list(left), list(free)
    prints = [[fingerprint(side, layer) for layer in of.values()] for side, of in ((first, left), (second, free))]
    for a, b in longest_common(*signs, *prints):
        yield names[0][a], names[1][b]


def fingerprint(side: Recording, layer: RecordedLayer) -> int | None:
    """A number for the values that a layer holds, whatever framework packs them; None where it holds none."""
    from mhabridge.diff.recordings import canonical, other_layers

    call = next(call for call in side.calls if call.layer == layer.path)
    try:
        if layer.attention:
            arrays = canonical.describe(side, layer, call).weights.arrays()
        else:
            arrays = other_layers.parameters_of(side, layer, call)
    except CheckpointError:
        raise
    except MHABridgeError:  # judging the layer says so
        return None
    found = 0
    for name in sorted(arrays):
        words = np.ascontiguousarray(dtypes.to_words(arrays[name])).reshape(-1)
        found = zlib.crc32(words.view(np.uint8).data, zlib.crc32(name.encode(), found))
    return found if arrays else None


def longest_common(
    first: Sequence[Any], second: Sequence[Any], held: Sequence[Any] = (), other: Sequence[Any] = ()
) -> list[tuple[int, int]]:
    """The places of the most items that can be paired in order, as close to the same place as may be.

    Args:
        first: items.
        second: others.
        held: what each of the first holds, if that is known; two that hold the same count for two pairs.
        other: likewise of the second.

    Example:
        >>> longest_common("aaa", "aa", "xyz", "xz")
        [(0, 0), (2, 1)]
        >>> longest_common("abaa", "acaa")
        [(0, 0), (2, 2), (3, 3)]
    """
    if len(first) * len(second) > _MOST_PAIRS:  # a coarser way, for thousands of layers without a name in common
        numbers: dict[Any, int] = {}
        coded = [[numbers.setdefault(sign, len(numbers)) for sign in side] for side in (first, second)]
        blocks = difflib.SequenceMatcher(None, coded[0], coded[1], autojunk=False).get_matching_blocks()
        return [(a + n, b + n) for a, b, size in blocks for n in range(size)]
    best = _scores(first, second, held, other)
    found, a, b = [], 0, 0
    while a < len(first) and b < len(second):
        if best[a][b] == best[a + 1][b]:
            a += 1
        elif best[a][b] == best[a][b + 1]:
            b += 1
        else:
            found.append((a, b))
            a, b = a + 1, b + 1
    return found


def _scores(
    first: Sequence[Any], second: Sequence[Any], held: Sequence[Any], other: Sequence[Any]
) -> list[list[float]]:
    """For each two tails the largest number of pairs, less a little for pairs at different places."""
    far = 1.0 / (1 + (len(first) + len(second)) ** 2)
    best = [[0.0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for a in range(len(first) - 1, -1, -1):
        below, here = best[a + 1], best[a]
        for b in range(len(second) - 1, -1, -1):
            here[b] = max(below[b], here[b + 1])
            if first[a] == second[b]:
                same = bool(held and other) and held[a] is not None and held[a] == other[b]
                here[b] = max(here[b], below[b + 1] + (2.0 if same else 1.0) - far * abs(a - b))
    return best


def kind_of(layer: RecordedLayer) -> str:
    """A layer's kind, whatever its framework calls it.

    Example:
        >>> kind_of(RecordedLayer("fc", "mindspore.nn.layer.basic.Dense", "Dense", False, {}, {}))
        'linear'
    """
    name = layer.kind.lower()
    return "attention" if layer.attention else _KINDS.get(name, name)


def signature(side: Recording, layer: RecordedLayer) -> tuple[Any, ...]:
    """What two layers must have in common to be matched by their order: kind, heads, and how many numbers they hold."""
    sizes = sum(side.file[name].size for name in layer.parameters.values())
    settings = layer.settings
    return layer.whole, kind_of(layer), str(settings.get("embed_dim")), str(settings.get("num_heads")), sizes


def pairs(first: Recording, second: Recording, layers: Mapping[str, tuple[str, str]]) -> list[Pair]:
    """All calls in the order in which they ended: those of the first recording, and between them those that only the
    second has.
    """
    mine, theirs = in_order_of_ending(first.calls), in_order_of_ending(second.calls)
    others = {(call.layer, call.nth): place for place, call in enumerate(theirs)}
    matched = {(layers[call.layer][0], call.nth) for call in mine if call.layer in layers}
    waiting = [place for key, place in others.items() if key not in matched]
    found: list[Pair] = []
    for call in mine:
        path, how = layers.get(call.layer, ("", ""))
        place = others.get((path, call.nth)) if how else None
        while place is not None and waiting and waiting[0] < place:
            found.append(Pair(None, theirs[waiting.pop(0)]))
        found.append(Pair(call, None if place is None else theirs[place], "" if place is None else how))
    return found + [Pair(None, theirs[place]) for place in waiting]


def weights_at(first: tuple[Recording, RecordedCall], second: tuple[Recording, RecordedCall]) -> str:
    """How the parameters of a layer are compared at a call: see ``compare_attention``; not, where one is not known."""
    sides = first, second
    if all(call.nth == 0 for _, call in sides):
        return "recorded"
    known = all(recording.tells(call) for recording, call in sides)
    return "trained" if known and any(call.changed for _, call in sides) else ""


def in_order_of_ending(calls: Iterable[RecordedCall]) -> list[RecordedCall]:
    """Calls in the order in which they ended: a layer that holds others after those that it called.

    Example:
        >>> names = ["", "layers.0", "layers.0.attn", "layers.0.ffn", "layers.1", "head"]
        >>> calls = [RecordedCall(number, name, 0, False, {}, (), {}) for number, name in enumerate(names)]
        >>> [call.layer for call in in_order_of_ending(calls)]
        ['layers.0.attn', 'layers.0.ffn', 'layers.0', 'layers.1', 'head', '']
    """
    running: list[RecordedCall] = []
    ended: list[RecordedCall] = []
    for call in calls:
        while running and not _holds(running[-1].layer, call.layer):
            ended.append(running.pop())
        running.append(call)
    return ended + running[::-1]


def _holds(path: str, other: str) -> bool:
    return other != path and (not path or other.startswith(f"{path}."))
