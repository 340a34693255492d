"""One call of a layer: its arguments by the layer's own names, and putting others in their place.

Also part of the record kit (Python 3.8, the standard library only).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass
class Running:
    """A call that has begun and not ended.

    Args:
        index: of the call in the recording.
        nth: which call of this layer it is.
        entry: what the recording will say of it.
        whole: whether it is one of the model itself, of which only the answer is recorded.
    """

    index: int
    nth: int
    entry: dict[str, Any]
    whole: bool = False

    @property
    def name(self) -> str:
        """What the names of its tensors begin with."""
        return f"calls/{self.index:06d}"


class Arguments:
    """The arguments of a call, as they were passed, by the names in the layer's signature.

    Args:
        signature: of the method that computes; None if Python does not know it.
        args: the positional ones.
        kwargs: the others.

    Attributes:
        named: the arguments; those of ``**kwargs`` under their own names, ``*args`` as one tuple.
    """

    def __init__(self, signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._bound: inspect.BoundArguments | None = None
        self._rest = ""
        try:
            self._bound = None if signature is None else signature.bind_partial(*args, **kwargs)
        except TypeError:  # the call itself will say so
            self._bound = None
        if self._bound is None:
            self.named = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
            self._count = len(args)
            return
        self.named = dict(self._bound.arguments)
        for name, parameter in self._bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in self.named:
                self._rest = name
                self.named.update(self.named.pop(name))

    def replaced(self, change: Callable[[str, Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the layer, each one changed by a function of its name and its value."""
        self.named = {name: change(name, value) for name, value in self.named.items()}
        bound = self._bound
        if bound is None:
            values = dict(self.named)
            return tuple(values.pop(str(number)) for number in range(self._count)), values
        own = bound.signature.parameters
        bound.arguments.update({name: value for name, value in self.named.items() if name in own})
        if self._rest:
            bound.arguments[self._rest] = {name: item for name, item in self.named.items() if name not in own}
        return bound.args, bound.kwargs


def signature_of(method: Any) -> inspect.Signature | None:
    """The signature of a method of a class, without ``self``.

    Example:
        >>> class Layer:
        ...     def forward(self, query, *, mask=None): ...
        >>> str(signature_of(Layer.forward))
        '(query, *, mask=None)'
    """
    try:
        whole = inspect.signature(method)
    except (TypeError, ValueError):
        return None
    parameters = list(whole.parameters.values())
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None  # such as a wrapper's (*args, **kwargs), which swallows self
    return whole.replace(parameters=parameters[1:])


def answers(outputs: Any) -> list[Any]:
    """What a layer answered, as a list: the items of a tuple, a list or a mapping, or the one thing."""
    if isinstance(outputs, (tuple, list)):
        return list(outputs)
    if isinstance(outputs, dict):
        return list(outputs.values())
    return [outputs]


def names_of_answers(outputs: Any) -> list[str]:
    """What a layer calls its answers: the keys of a mapping; none where they have only their places.

    Example:
        >>> names_of_answers({"logits": 1, "loss": 2}), names_of_answers((1, 2))
        (['logits', 'loss'], [])
    """
    if isinstance(outputs, dict) and all(isinstance(name, str) and name for name in outputs):
        return list(outputs)
    return []


def with_answers(outputs: Any, changed: list[Any]) -> Any:
    """The same outputs, with other values in their places."""
    if all(new is old for new, old in zip(changed, answers(outputs))):
        return outputs
    if isinstance(outputs, dict):
        made = copy.copy(outputs)  # a class of its own may be made of other things than of items
        for name, new in zip(outputs, changed):
            made[name] = new
        return made
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*changed)
    return type(outputs)(changed) if isinstance(outputs, (tuple, list)) else changed[0]
