"""The user's own rules about names: they come before everything else.

A rule is "PATTERN=REPLACEMENT": each * in the pattern stands for any text, which comes back where the replacement has
its own *, in order. The first rule that fits a name is used; a name that none fits stays.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mhabridge.errors import ArgumentError, ArgumentTypeError, WeightsError

Rename = Callable[[str], str]
_COMPARED, _LONGEST = (
    5_000,
    200,
)  # names that a mistyped one is compared with, and their characters: files may be hostile


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        text: as the user gave it.
        pattern: the names that it is for.
        pieces: what stands between the stars of the replacement.
    """

    text: str
    pattern: re.Pattern[str]
    pieces: tuple[str, ...]

    def __call__(self, name: str) -> str | None:
        """The new name, which may be the old one; None where the rule is not for it."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        texts = (*match.groups()[: len(self.pieces) - 1], "")
        return "".join(piece for pair in zip(self.pieces, texts, strict=True) for piece in pair)


def rule(text: str) -> Rule:
    """One rule, which gives a name's new one, or None for a name that it is not for.

    Raises:
        ArgumentError: no "=", nothing before or after it, or more stars after it than before.
        ArgumentTypeError: it is no text.

    Example:
        >>> rule("module.*.attn.*=encoder.*.self_attn.*")("module.3.attn.out_proj.bias")
        'encoder.3.self_attn.out_proj.bias'
    """
    if not isinstance(text, str):
        raise ArgumentTypeError("rename", given=repr(text), expected="a rule, such as 'module.*=*'")
    pattern, _, replacement = text.partition("=")
    if not pattern or not replacement or pattern.count("*") < replacement.count("*"):
        raise ArgumentError(
            "rename",
            given=repr(text),
            expected="PATTERN=REPLACEMENT, with no more * in the replacement than in the pattern",
            advice="For example 'module.*=*' takes a prefix away.",
        )
    compiled = re.compile("(.*)".join(map(re.escape, pattern.split("*"))), re.DOTALL)
    return Rule(text, compiled, tuple(replacement.split("*")))


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
        return _checked(lambda name: rules.get(name, name))
    if isinstance(rules, (str, Iterable)):
        return _checked(_first(_rules(rules)))
    raise ArgumentTypeError(
        "rename", given=type(rules).__name__, expected="a function, a mapping, a rule or a list of rules"
    )


def require_met(rules: Any, names: Iterable[str]) -> None:
    """Refuse a rule that is for none of some names: it is mistyped, or for another file.

    Args:
        rules: as for ``renamer``; what a function is for cannot be told.
        names: that they are for.

    Raises:
        ArgumentError: with the rule, and names that are close to it.
    """
    if callable(rules) or rules is None:
        return
    there = dict.fromkeys(names)
    if isinstance(rules, Mapping):
        unmet = {old: str(old) for old in rules if old not in there}
    else:
        made = _rules(rules)
        unmet = {one.text: one.text.partition("=")[0] for one in made if not any(map(one.pattern.fullmatch, there))}
    if unmet:
        raise nothing("rename", unmet, there)


def nothing(option: str, unmet: Mapping[str, str], names: Iterable[str]) -> ArgumentError:
    """The error for patterns that no name fits.

    Args:
        option: that they were given as.
        unmet: the pattern in each thing that was given.
        names: that there are.

    Example:
        >>> print(nothing("drop", {"hed.*": "hed.*"}, ["head.weight", "fc.bias"]))
        drop: given 'hed.*', which no name fits; expected patterns of names in the file. Close to it: head.weight.
    """
    near = dict.fromkeys(name for pattern in unmet.values() for name in close(pattern, names))
    return ArgumentError(
        option,
        given=", ".join(map(repr, unmet)) + ", which no name fits",
        expected="patterns of names in the file",
        advice=f"Close to it: {', '.join(near)}." if near else "`mhabridge inspect` lists the names.",
    )


def close(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three names that a pattern may have been meant for.

    Example:
        >>> close("encodr.*", ["encoder.weight", "head.bias"])
        ['encoder.weight']
    """
    plain = pattern.replace("*", "")[:_LONGEST]
    length = len(plain) + 2 if "*" in pattern else _LONGEST
    ends = slice(-length, None) if pattern.startswith("*") else slice(length)
    found: dict[str, str] = {}
    for name in itertools.islice(names, _COMPARED):
        found.setdefault(name[ends], name)
    return [found[end] for end in difflib.get_close_matches(plain, found, 3)]


def _rules(rules: str | Iterable[str]) -> list[Rule]:
    return [rule(rules)] if isinstance(rules, str) else [rule(text) for text in rules]


def _first(made: list[Rule]) -> Rename:
    def rename(name: str) -> str:
        return next((found for found in (one(name) for one in made) if found is not None), name)

    return rename


def _checked(function: Callable[[str], Any]) -> Rename:
    """The function, whose names must be some: 'module*=*' would leave the dot at the start."""

    def rename(name: str) -> str:
        found = function(name)
        if not isinstance(found, str):
            raise ArgumentTypeError("rename", given=f"{found!r} for {name!r}", expected="a name")
        if found != name and "" in found.split(".") and "" not in name.split("."):
            raise ArgumentError(
                "rename",
                given=f"{found!r} for {name!r}",
                expected="a name without empty parts between its dots",
                advice="For example 'module.*=*' takes a prefix away together with its dot.",
            )
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


def patterns(option: str, given: Any) -> tuple[str, ...]:
    """One pattern, or several.

    Raises:
        ArgumentTypeError: something else.

    Example:
        >>> patterns("drop", "head.*"), patterns("drop", ["a", "b"])
        (('head.*',), ('a', 'b'))
    """
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(one, str) for one in found):
        raise ArgumentTypeError(option, given=f"{given!r:.80}", expected="a pattern of names, or a list of them")
    return found


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first of some patterns (as in a shell) that fits a name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def matches_entry(name: str, patterns: Iterable[str]) -> str | None:
    """The first of some patterns that fits an entry that is no tensor, or all that lies below it.

    Example:
        >>> matches_entry("optimizer", ["fc.*", "optimizer.*"])
        'optimizer.*'
    """
    return next((one for one in patterns if fnmatchcase(name, one) or fnmatchcase(f"{name}.", one)), None)
