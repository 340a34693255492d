"""Which of a dialect's arguments a call gives: positional or not, each once, and none that it does not have.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from mhabridge.arguments import Argument, Dialect, dialect, history, names
from mhabridge.errors import ArgumentTypeError, UnsupportedError


def bind(
    spoken: Dialect,
    arguments: tuple[Argument, ...],
    args: Iterable[Any],
    kwargs: dict[str, Any],
    hints: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The given arguments by name.

    Args:
        spoken: the dialect.
        arguments: those that its callable takes.
        args: the positional ones, in the dialect's order.
        kwargs: the others.
        hints: more keywords that are understood, though the framework has no such argument.

    Raises:
        ArgumentTypeError: too many positional arguments, or one given twice.
        UnsupportedError: the dialect has no such argument in this version.

    Example:
        >>> torch = dialect("torch")
        >>> bind(torch, torch.constructor_arguments(), (8, 2), {"bias": False})
        {'embed_dim': 8, 'num_heads': 2, 'bias': False}
    """
    args = tuple(args)
    order = [argument.name for argument in arguments if argument.position is not None]
    if len(args) > len(order):
        raise ArgumentTypeError(
            spoken.path,
            given=f"{len(args)} positional arguments",
            expected=f"at most {len(order)}: {', '.join(order)}",
            advice=f"These are the arguments of {spoken.label}, in its order.",
        )
    given = {order[index]: value for index, value in enumerate(args)}
    for name, value in kwargs.items():
        if name in given:
            raise ArgumentTypeError(
                name, given="twice, by position and by keyword", expected="one value", advice="Leave one of them away."
            )
        if name not in hints and all(name != argument.name for argument in arguments):
            raise _unknown(spoken, arguments, name)
        given[name] = value
    return given


def require(spoken: Dialect, arguments: Iterable[Argument], given: dict[str, Any]) -> None:
    """Refuse a call that lacks required arguments.

    Raises:
        ArgumentTypeError: naming all that are missing.
    """
    missing = [argument.name for argument in arguments if argument.required and argument.name not in given]
    if missing:
        raise ArgumentTypeError(
            ", ".join(missing),
            given="nothing",
            expected="a value",
            advice=f"{spoken.label} requires it in {spoken.path}.",
        )


def _unknown(spoken: Dialect, arguments: tuple[Argument, ...], name: str) -> UnsupportedError:
    known = [argument.name for argument in arguments]
    advice = _elsewhere_here(spoken, name) or _other_version(spoken, name) or _other_dialect(spoken, name)
    if not advice:
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"Did you mean {close[0]}?" if close else ""
    return UnsupportedError(
        name,
        given=f"an argument that {spoken.label} does not have here",
        expected="one of " + ", ".join(known),
        advice=advice,
    )


def _elsewhere_here(spoken: Dialect, name: str) -> str:
    """The advice for an argument of the layer given to a call, or the other way round."""
    role = next((argument.role for argument in spoken.arguments if argument.name == name), None)
    if role is None:
        return ""
    place = (
        "the call, not the layer: see mb.translate_call"
        if role == "input"
        else "the layer, not the call: see MHASpec.from_kwargs"
    )
    return f"In {spoken.title} it belongs to {place}."


def _other_version(spoken: Dialect, name: str) -> str:
    entries = [argument for argument in history(spoken.name) if argument.name == name]
    if not entries:
        return ""
    ranges = []
    if entries[0].since:
        ranges.append(f"from {entries[0].since} on")
    if entries[-1].until:
        ranges.append(f"before {entries[-1].until}")
    fixed = spoken.fixed_for(entries[0].field or "")
    here = f" In {spoken.label} {fixed.reason}." if fixed else ""
    return (
        f"{spoken.title} has it {', and '.join(ranges)}; name the version you mean, as in {spoken.name}@VERSION.{here}"
    )


def _other_dialect(spoken: Dialect, name: str) -> str:
    """The advice for a name that another dialect uses, as has_bias given to PyTorch."""
    for other in names():
        found = next((argument for argument in history(other) if argument.name == name and argument.field), None)
        if found is None or found.field is None:
            continue
        title = dialect(other).title
        if found.field in ("q_bias", "k_bias", "v_bias", "out_bias") and spoken.argument_for(found.field) is None:
            return f"That is {title}'s name; {spoken.title} has one bias for all projections."
        same = spoken.argument_for(found.field)
        if same is not None:
            return f"That is {title}'s name; {spoken.title} says {same.name}."
        fixed = spoken.fixed_for(found.field)
        if fixed is not None:
            return f"That is {title}'s name; in {spoken.title} {fixed.reason}."
    return ""
