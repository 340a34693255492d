"""Which layers of a model are recorded: the attention layers, or those that are asked for.

Also part of the record kit (Python 3.8, the standard library only).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from mhabridge.errors import ArgumentError, ArgumentTypeError

ALL = "all"
_SHOWN = 6


@dataclasses.dataclass
class Selected:
    """A layer that is recorded.

    Args:
        path: in the model; "" for the model itself.
        layer: the framework's own.
        attention: whether it is a multi-head attention that the framework's adapter knows.
        aliases: other paths to the same layer.
        inside: whether it is a part of such an attention, which need not call it.
        asked: whether it was asked for by a pattern or a class.
        whole: whether it is the model itself, of which only the answer is recorded: what comes after the last layer.
    """

    path: str
    layer: Any
    attention: bool
    aliases: list[str]
    inside: bool
    asked: bool = False
    whole: bool = False

    @property
    def missed(self) -> bool:
        """Whether something is wrong when it is never called."""
        return self.attention or (self.asked and not self.inside)


def select(adapter: Any, model: Any, wanted: Any) -> list[Selected]:
    """The layers of a model that are wanted, and by default the model itself beside its attention layers.

    Args:
        adapter: the recording module of the model's framework.
        model: the model.
        wanted: None for the attention layers; "all"; a pattern of paths, a class, or a list of these.

    Raises:
        ArgumentError: something that is wanted is not there.
        ArgumentTypeError: what is wanted is neither a pattern nor a class.
    """
    everything = _everything(adapter, model)
    if wanted is None:
        return _with_whole(_attentions(everything), everything)
    if wanted == ALL:
        return everything
    chosen: dict[int, Selected] = {}
    for one in [wanted] if isinstance(wanted, (str, type)) else _list(wanted):
        matches = [selected for selected in everything if _matches(selected, one)]
        if not matches:
            raise _nothing(one, everything)
        for selected in matches:
            selected.asked = True
            chosen[id(selected.layer)] = selected
    return [selected for selected in everything if id(selected.layer) in chosen]


def _everything(adapter: Any, model: Any) -> list[Selected]:
    """Every layer of the model once, in the framework's order: what is inside another comes after it."""
    found: dict[int, Selected] = {}
    attentions: list[str] = []
    for path, layer in adapter.parts(model):
        if id(layer) in found:
            found[id(layer)].aliases.append(path)
            continue
        attention = bool(adapter.is_attention(layer))
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in attentions)
        found[id(layer)] = Selected(path, layer, attention, [], inside)
        if attention:
            attentions.append(path)
    return list(found.values())


def _attentions(everything: list[Selected]) -> list[Selected]:
    found = [selected for selected in everything if selected.attention]
    if found:
        return found
    raise ArgumentError(
        "model",
        given=f"{type(everything[0].layer).__qualname__} without an attention layer of its framework or of mhabridge",
        expected="a model with one",
        advice=f'Say which layers instead: layers="all", a class, or a pattern; there are {_some(everything)}.',
    )


def _with_whole(found: list[Selected], everything: list[Selected]) -> list[Selected]:
    whole = everything[0]
    if whole.path or whole in found:
        return found
    whole.whole = True
    return [whole, *found]


def _list(wanted: Any) -> list[Any]:
    if isinstance(wanted, (list, tuple, set, frozenset)) and wanted:
        return list(wanted)
    raise ArgumentTypeError("layers", given=repr(wanted), expected='None, "all", a pattern, a class, or a list of them')


def _matches(selected: Selected, one: Any) -> bool:
    if isinstance(one, type):
        return isinstance(selected.layer, one)
    if isinstance(one, str):
        return any(fnmatch.fnmatchcase(path, one) for path in (selected.path, *selected.aliases))
    raise ArgumentTypeError("layers", given=repr(one), expected="a pattern or a class")


def _nothing(one: Any, everything: list[Selected]) -> ArgumentError:
    name = repr(one) if isinstance(one, str) else one.__qualname__
    return ArgumentError(
        "layers", given=f"{name}, which no layer matches", expected=f"one of the paths, such as {_some(everything)}"
    )


def _some(everything: list[Selected]) -> str:
    named = [selected.path for selected in everything if selected.path]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more if named else "no layers in it"
