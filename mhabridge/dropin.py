"""What the drop-in layers of all frameworks have in common: their constructor's arguments as a spec, and what of a spec
they hold beside their parameters.

A drop-in is composed from its spec, so one that is built from a spec can be more than PyTorch's arguments say: its
scale, its dropout on the output and its residual may be any.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from mhabridge.errors import UnsupportedError
from mhabridge.spec import MHASpec

# What PyTorch's class does not have, with the value that means none of it.
_BEYOND = {"scale": None, "out_dropout": 0.0, "residual": False}
_SIZES = ("q_proj_size", "k_proj_size", "v_proj_size", "out_proj_size")


def spec_of_arguments(
    embed_dim: int,
    num_heads: int,
    dropout: float,
    bias: bool,
    add_bias_kv: bool,
    add_zero_attn: bool,
    kdim: int | None,
    vdim: int | None,
    batch_first: bool,
    dtype: Any,
) -> MHASpec:
    """The spec of a drop-in made with these arguments, in PyTorch's order; a dtype of None is float32.

    Raises:
        ArgumentError: a size or a probability that cannot be, or an unknown dtype.
        ArgumentTypeError: a value of the wrong type.

    Example:
        >>> spec_of_arguments(8, 2, 0.0, False, False, False, None, None, True, None).batch_first
        True
    """
    return MHASpec(
        embed_dim,
        num_heads,
        kdim,
        vdim,
        dropout,
        bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        dtype="float32" if dtype is None else dtype,
    )


def beyond(spec: MHASpec) -> dict[str, Any]:
    """The fields of a spec that PyTorch's class does not have, where they are not their default.

    Example:
        >>> beyond(MHASpec(8, 2, residual=True, dropout=0.1))
        {'residual': True}
    """
    return {name: getattr(spec, name) for name, none in _BEYOND.items() if getattr(spec, name) != none}


def why_composed(spec: MHASpec) -> str:
    """Why a layer of this spec, whose parameters a native class holds, is not that class; empty when it is."""
    found = beyond(spec)
    return f"{', '.join(found)}: The native layer computes none of that." if found else ""


def plain(spec: MHASpec) -> MHASpec:
    """The same layer without what ``beyond`` finds: the same parameters, and what PyTorch's arguments can say.

    Raises:
        UnsupportedError: its projections have other sizes than PyTorch's class can have.

    Example:
        >>> plain(MHASpec(8, 2, residual=True, dropout=0.1)) == MHASpec(8, 2, dropout=0.1)
        True
    """
    odd = [name for name in _SIZES if getattr(spec, name) is not None]
    if odd:
        raise UnsupportedError(
            ", ".join(odd),
            given=", ".join(str(getattr(spec, name)) for name in odd),
            expected="None: the parameters of a layer have PyTorch's sizes, in the native class and in the drop-in",
            advice="mb.backend(...).run computes such a layer from its spec and weights, in every framework.",
        )
    return spec.replace(**_BEYOND)


def require_plain(layer: Any, method: str, *classes: type) -> None:
    """Raise unless the layer computes what one of the classes does: a subclass may have methods of its own.

    Args:
        layer: an instance of one of the classes.
        method: the name of the method that computes: "forward" or "construct".
        classes: the framework's own class and the drop-in.

    Raises:
        UnsupportedError: a method is the subclass's own, or was put on the layer itself.
    """
    kind = type(layer)
    known = kind if kind in classes else next(known for known in reversed(classes) if isinstance(layer, known))
    changed = changed_methods(layer, known)
    if not changed:
        return
    raise UnsupportedError(
        "layer",
        given=f"{type(layer).__qualname__}, whose {', '.join(changed)} is its own",
        expected=f"the {method} of {classes[0].__module__.partition('.')[0]}'s own class, or of the drop-in",
        advice="What it computes is not known; only a layer that computes plain attention can be used.",
    )


def changed_methods(layer: Any, known: type) -> list[str]:
    """The methods of a class that an instance has otherwise: from a subclass, or put on the instance itself.

    Example:
        >>> class Plain:
        ...     def forward(self): ...
        >>> class Odd(Plain):
        ...     def forward(self): ...
        >>> changed_methods(Odd(), Plain), changed_methods(Plain(), Plain)
        (['forward'], [])
    """
    methods = _methods(known)
    if type(layer) is known and methods.isdisjoint(vars(layer)):  # most layers, and every call asks
        return []
    changed = methods.intersection(vars(layer))
    if type(layer) is not known:
        own = vars(known)
        changed |= {name for name in methods if inspect.getattr_static(type(layer), name, None) is not own[name]}
    return sorted(changed)


@functools.lru_cache(maxsize=64)
def _methods(known: type) -> frozenset[str]:
    return frozenset(name for name, value in vars(known).items() if callable(value) and not name.startswith("__"))


def require_part(part: Any, path: str, method: str, *classes: type) -> Any:
    """The part itself, which must be one of a framework's own and compute what that does.

    Args:
        part: a linear map, a dropout or a norm.
        path: of the part.
        method: the name of the method that computes: "forward" or "construct".
        classes: what it may be; a subclass of one that computes the same will do.

    Raises:
        UnsupportedError: it is another one.
    """
    if is_part(part, method, *classes):
        return part
    raise UnsupportedError(
        path,
        given=f"{type(part).__module__}.{type(part).__qualname__}",
        expected=" or ".join(f"{known.__module__.partition('.')[0]}'s {known.__name__}" for known in classes),
        advice="What it computes is not known, so it is not moved. The attentions can be, one by one.",
    )


def is_part(part: Any, method: str, *classes: type) -> bool:
    """Whether a part is one of a framework's own and computes what that does; see ``require_part``.

    Example:
        >>> class Own:
        ...     def forward(self): ...
        >>> class Odd(Own):
        ...     def forward(self): ...
        >>> is_part(Own(), "forward", Own), is_part(Odd(), "forward", Own)
        (True, False)
    """
    return any(
        isinstance(part, known)
        and getattr(type(part), method, None) is getattr(known, method)
        and method not in vars(part)
        for known in classes
    )


def require_separate(parts: dict[str, Any]) -> None:
    """Raise for parameters that two parts of a model share: they would be separate after the move.

    Args:
        parts: each parameter, by its path.

    Raises:
        UnsupportedError: two are one.
    """
    seen: dict[int, str] = {}
    for path, part in parts.items():
        other = seen.setdefault(id(part), path)
        if other != path:
            raise UnsupportedError(
                path,
                given=f"shared with {other}",
                expected="parameters of its own",
                advice="Shared ones would be separate afterwards: give each part a copy (copy.deepcopy) first.",
            )
