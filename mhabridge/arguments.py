"""A framework's arguments as data: what mappings/ says about one dialect in one version.

A *dialect* is a framework's argument names and rules. Its table lists every argument of the constructor and of the
call in positional order, and every canonical field that it has no argument for, with what holds there instead. Entries
carry ranges of versions; ``dialect`` picks those of one version. ``dialects`` gives them meaning, and ``differences``
compares two.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import Any

from mhabridge import dtypes, mapping
from mhabridge.errors import ArgumentError

# The canonical arguments of one call; those of a layer are the fields of MHASpec.
CALL_FIELDS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "attn_mask",
    "need_weights",
    "average_attn_weights",
    "is_causal",
    "cudnn_style_mask",
    "fully_masked",
    "training",
)


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a dialect.

    Args:
        name: as the framework calls it.
        field: its canonical name, or None when it has none; then ``reason`` says why.
        role: "parameter" describes the layer, "input" belongs to one call, "weights" carries the weights.
        position: counted from 1 in its own callable; None for one that is only accepted by keyword.
        default: Python source as in the signature; None when the argument is required.
        means: the canonical value of None, where the framework takes None for something else.
        operation: the rule of ``dialects`` that turns the value into the field's, where it is not a plain copy.
        only: Python source of the one value that the framework itself accepts; ``reason`` says why.
        dtypes: kinds of mask that are accepted: "bool", "uint8", "int", "float".
        hint: the value only says something about attn_mask, which does the work.
        matters_with: arguments of the same call; while all of them are 0 or False, the value has no effect.
        reason: why there is no field, or why only one value is accepted.
        note: a fact worth knowing.
        since: first version that has it, or None for the oldest.
        until: first version that has it no more, or None.
    """

    name: str
    field: str | None = None
    role: str = "parameter"
    position: int | None = None
    default: str | None = None
    means: str | None = None
    operation: str | None = None
    only: str | None = None
    dtypes: tuple[str, ...] = ()
    hint: bool = False
    matters_with: tuple[str, ...] = ()
    reason: str = ""
    note: str = ""
    since: str | None = None
    until: str | None = None

    @property
    def required(self) -> bool:
        """Whether a call of the framework's own must give it."""
        return self.default is None

    @property
    def default_value(self) -> Any:
        """What the framework takes when the argument is left out; a dtype as its canonical name."""
        return None if self.default is None else literal(self.default)

    @property
    def default_meaning(self) -> Any:
        """The canonical value of the default."""
        return self.none_meaning if self.default_value is None else self.default_value

    @property
    def none_meaning(self) -> Any:
        """The canonical value of None."""
        return None if self.means is None else literal(self.means)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A canonical field that a dialect has no argument for.

    Args:
        field: a field of MHASpec, or one of ``CALL_FIELDS``.
        value: Python source of the value that always holds; None when it follows from something else.
        operation: the rule of ``dialects`` that gives the value, where ``value`` cannot.
        tensor: the argument whose shape or dtype says it.
        reason: what the framework does.
        advice: what to do when another value is wanted.
        since: first version concerned, or None.
        until: first version that is not, or None.
    """

    field: str
    reason: str
    value: str | None = None
    operation: str | None = None
    tensor: str | None = None
    advice: str = ""
    since: str | None = None
    until: str | None = None


@dataclasses.dataclass(frozen=True)
class MasksTogether:
    """Which kinds of mask a dialect takes side by side, where it takes each of them alone.

    Args:
        kinds: groups of kinds; both masks have to be of the same group.
        reason: what the framework does otherwise.
        advice: what to do instead.
    """

    kinds: tuple[tuple[str, ...], ...]
    reason: str
    advice: str


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Something that differs between frameworks and is no argument."""

    topic: str
    text: str
    since: str | None = None
    until: str | None = None


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A framework's arguments in one version.

    Args:
        name: "torch", "megengine.functional" ...
        version: as asked for; the newest that the tables know when nothing was.
        title: for people.
        constructor: documented import path of the class; None for a function.
        call: path of the method that a call of the layer runs; None for a function.
        function: path of the function that takes the layer's and the call's arguments; None for a class.
        arguments: in positional order: the layer's, then the call's; a function's as they come.
        fixed: canonical fields without an argument.
        behaviour: differences that are no argument.
        docs: the address of the framework's own page, or empty.
        call_ignores: what the call's signature has besides the arguments of a call.
        masks_together: the kinds of mask that may be given side by side; None when all may.
    """

    name: str
    version: str
    title: str
    constructor: str | None
    call: str | None
    function: str | None
    arguments: tuple[Argument, ...]
    fixed: tuple[Fixed, ...]
    behaviour: tuple[Behaviour, ...]
    docs: str = ""
    call_ignores: tuple[str, ...] = ()
    masks_together: MasksTogether | None = None

    @property
    def label(self) -> str:
        """The title with the version, for messages and tables."""
        return f"{self.title} {self.version}"

    @property
    def path(self) -> str:
        """What is constructed or called."""
        return self.function or self.constructor or self.name

    def of_role(self, *roles: str) -> tuple[Argument, ...]:
        """The arguments of one role, or of several."""
        return tuple(argument for argument in self.arguments if argument.role in roles)

    def constructor_arguments(self) -> tuple[Argument, ...]:
        """What the constructor takes, or the function."""
        return self.arguments if self.function else self.of_role("parameter", "weights")

    def call_arguments(self) -> tuple[Argument, ...]:
        """What a call takes, or the function."""
        return self.arguments if self.function else self.of_role("input")

    def argument_for(self, field: str) -> Argument | None:
        """The first argument that says a canonical field."""
        return next((argument for argument in self.arguments if argument.field == field), None)

    def fixed_for(self, field: str) -> Fixed | None:
        """What holds for a canonical field that has no argument."""
        return next((entry for entry in self.fixed if entry.field == field), None)


def literal(text: str) -> Any:
    """The value of a default's source text; a framework's dtype becomes its canonical name.

    Example:
        >>> literal("0.0"), literal("None"), literal("mstype.float32")
        (0.0, None, 'float32')
    """
    try:
        return ast.literal_eval(text)
    except ValueError:
        return dtypes.canonical(text)


def names() -> tuple[str, ...]:
    """Every dialect that mappings/ describes.

    Example:
        >>> names()
        ('torch', 'mindspore', 'megengine', 'megengine.functional', 'numpy')
    """
    return tuple(name for framework in (*mapping.FRAMEWORKS, mapping.REFERENCE) for name in _tables(framework))


def history(name: str) -> tuple[Argument, ...]:
    """The arguments of a dialect in all its versions, without positions."""
    entries = (
        {key: value for key, value in entry.items() if key in _PLAIN_KEYS} for entry in _table(name)["arguments"]
    )
    return tuple(Argument(**entry) for entry in entries)


_PLAIN_KEYS = {"name", "field", "role", "since", "until"}


def dialect(name: str, version: str | None = None) -> Dialect:
    """A dialect's arguments in one version.

    A version newer than the tables know is taken to be like the newest entries; one that is older is refused, since
    nothing is known about it.

    Args:
        name: "torch", or with a version "torch@1.8.1".
        version: another way to give the version; the newest known when neither says it.

    Raises:
        ArgumentError: no such dialect, or a version before the known range.

    Example:
        >>> [argument.name for argument in dialect("torch@1.8.1").call_arguments()][3:]
        ['key_padding_mask', 'need_weights', 'attn_mask']
    """
    base, version = mapping.parse_name(name, version)
    return _dialect(base, version)


@functools.lru_cache(maxsize=64)
def _dialect(name: str, version: str | None) -> Dialect:
    table = _table(name)
    version = version or table["newest"]
    if mapping.version_key(version) < mapping.version_key(table["oldest"]):
        raise ArgumentError(
            "version",
            given=f"{name}@{version}",
            expected=f"{table['oldest']} or newer (known: {table['oldest']} to {table['newest']})",
            advice=f"Nothing is known about older versions of {table['title']}.",
        )
    return Dialect(
        name=name,
        version=version,
        title=table["title"],
        constructor=table.get("constructor"),
        call=table.get("call"),
        function=table.get("function"),
        arguments=_positioned(_of_version(table["arguments"], version), bool(table.get("function"))),
        fixed=tuple(Fixed(**entry) for entry in _of_version(table["fixed"], version)),
        behaviour=tuple(Behaviour(**entry) for entry in _of_version(table["behaviour"], version)),
        docs=table.get("docs", ""),
        call_ignores=tuple(table.get("call_ignores", ())),
        masks_together=_masks_together(table.get("masks_together")),
    )


def _masks_together(entry: dict[str, Any] | None) -> MasksTogether | None:
    if entry is None:
        return None
    return MasksTogether(**{**entry, "kinds": tuple(map(tuple, entry["kinds"]))})


def _positioned(entries: list[dict[str, Any]], one_callable: bool) -> tuple[Argument, ...]:
    """Arguments with their positions; a class counts its constructor and its call separately."""
    counts: dict[bool, int] = {False: 0, True: 0}
    arguments = []
    for entry in entries:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        in_call = not one_callable and fields.get("role") == "input"
        if not fields.pop("keyword_only", False):
            counts[in_call] += 1
            fields["position"] = counts[in_call]
        arguments.append(Argument(**fields))
    return tuple(arguments)


def _of_version(entries: list[dict[str, Any]], version: str) -> list[dict[str, Any]]:
    key = mapping.version_key(version)
    return [
        entry
        for entry in entries
        if ("since" not in entry or key >= mapping.version_key(entry["since"]))
        and ("until" not in entry or key < mapping.version_key(entry["until"]))
    ]


def _tables(framework: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = mapping.table(framework)["dialects"]
    return found


def _table(name: str) -> dict[str, Any]:
    for framework in (*mapping.FRAMEWORKS, mapping.REFERENCE):
        if name in _tables(framework):
            return _tables(framework)[name]
    raise ArgumentError(
        "dialect",
        given=repr(name),
        expected="one of " + ", ".join(names()),
        advice="A version goes behind an @, as in torch@1.8.1.",
    )
