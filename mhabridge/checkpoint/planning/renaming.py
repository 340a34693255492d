"""The user's own rules about names: they come before everything else.

A rule is "PATTERN=REPLACEMENT": each * in the pattern stands for any text, which comes back where the replacement has
its own *, in order. The first rule that fits a name is used; a name that none fits stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mhabridge.errors import ArgumentError, ArgumentTypeError, WeightsError

Rename = Callable[[str], str]


def rule(text: str) -> Rename:
    """One rule as a function that renames, or gives the name back.

    Raises:
        ArgumentError: no "=", or more stars after it than before.

    Example:
        >>> rule("module.*.attn.*=encoder.*.self_attn.*")("module.3.attn.out_proj.bias")
        'encoder.3.self_attn.out_proj.bias'
    """
    pattern, equals, replacement = text.partition("=")
    if not equals or not pattern or pattern.count("*") < replacement.count("*"):
        raise ArgumentError(
            "rename",
            given=repr(text),
            expected="PATTERN=REPLACEMENT, with no more * in the replacement than in the pattern",
            advice="For example 'module.*=*' takes a prefix away.",
        )
    matcher = re.compile("(.*)".join(map(re.escape, pattern.split("*"))))
    pieces = replacement.split("*")

    def rename(name: str) -> str:
        match = matcher.fullmatch(name)
        if match is None:
            return name
        filled = [
            piece for pair in zip(pieces, (*match.groups()[: len(pieces) - 1], ""), strict=True) for piece in pair
        ]
        return "".join(filled)

    return rename


def renamer(rules: Any) -> Rename:
    """One function for whatever the user gives: a callable, a mapping of names, a rule, or several rules.

    Raises:
        ArgumentError: a rule that is none.
        ArgumentTypeError: something else.
    """
    if rules is None:
        return lambda name: name
    if callable(rules):
        return _checked(rules)
    if isinstance(rules, Mapping):
        return lambda name: str(rules.get(name, name))
    if isinstance(rules, str):
        return rule(rules)
    if isinstance(rules, Iterable):
        return _first([rule(text) for text in rules])
    raise ArgumentTypeError(
        "rename", given=type(rules).__name__, expected="a function, a mapping, a rule or a list of rules"
    )


def _first(made: list[Rename]) -> Rename:
    def rename(name: str) -> str:
        return next((found for found in (one(name) for one in made) if found != name), name)

    return rename


def _checked(function: Callable[[str], Any]) -> Rename:
    def rename(name: str) -> str:
        found = function(name)
        if not isinstance(found, str):
            raise ArgumentTypeError("rename", given=f"{found!r} for {name!r}", expected="a name")
        return found

    return rename


def renamed(names: Iterable[str], rename: Rename) -> dict[str, str]:
    """The old name of each new one.

    Raises:
        WeightsError: two names become one.
    """
    found: dict[str, str] = {}
    for name in names:
        new = rename(name)
        if new in found:
            raise WeightsError(
                new,
                given=f"{found[new]} and {name}, which both get this name",
                expected="a name for each",
                advice="One of them would be lost. Change the rules.",
            )
        found[new] = name
    return found


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first of some patterns (as in a shell) that fits a name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
