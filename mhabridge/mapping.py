"""Reads mappings/: one TOML table for each framework, as plain dictionaries.

A table holds what is data about a framework: its dialects (argument names), its layouts (how weights are named, packed
and turned) and its envelope (what its native layer answers wrongly). ``dialects``, ``layouts`` and ``envelope`` give
them meaning. Inside a worker there is no TOML parser: the parent hands the parsed tables over with ``provide``.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

from mhabridge.errors import ArgumentError, ArgumentTypeError

# Every framework that has a table in mappings/ and an adapter in adapters/. "numpy" is the float64 reference.
FRAMEWORKS = ("torch", "mindspore", "megengine")
REFERENCE = "numpy"

_provided: dict[str, dict[str, Any]] = {}
# Numbers with dots, then the tail of a pre-release ("rc1", ".dev20240101") and of a build ("+cpu").
_VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:[-_.]?[A-Za-z][\w.]*)?(?:\+[\w.]+)?")


def provide(tables: dict[str, dict[str, Any]]) -> None:
    """Use these parsed tables instead of files (in a worker)."""
    _provided.update(tables)
    table.cache_clear()


@functools.lru_cache(maxsize=None)
def table(name: str) -> dict[str, Any]:
    """The parsed table of a framework (or "layouts", for layouts that belong to none). Do not change it.

    Raises:
        ArgumentError: there is no such table.
    """
    if name in _provided:
        return _provided[name]
    if name not in names():
        raise ArgumentError(
            "framework",
            given=repr(name),
            expected="one of " + ", ".join(names()),
            advice="See `mhabridge backends list`.",
        )
    return _read(name)


def names() -> tuple[str, ...]:
    """The names of all tables."""
    return (*FRAMEWORKS, REFERENCE, "layouts")


def tables() -> dict[str, dict[str, Any]]:
    """All tables by name: what a parent hands to a worker."""
    return {name: table(name) for name in names()}


def _read(name: str) -> dict[str, Any]:
    from importlib import resources

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = resources.files("mhabridge.mappings").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    parsed: dict[str, Any] = tomllib.loads(text)
    return parsed


def parse_name(name: str, version: str | None = None) -> tuple[str, str | None]:
    """Split "torch@1.8.1" into its name and version; ``version`` is another way to give the latter.

    Raises:
        ArgumentError: both are given and differ, one is empty, or the version is none.
        ArgumentTypeError: one of them is no string.

    Example:
        >>> parse_name("torch@1.8.1"), parse_name("megengine.functional")
        (('torch', '1.8.1'), ('megengine.functional', None))
    """
    for what, text in (("name", name), ("version", "" if version is None else version)):
        if not isinstance(text, str):
            raise ArgumentTypeError(
                what, given=type(text).__name__, expected="a string", advice="For example torch@1.8.1."
            )
    base, at, inline = name.partition("@")
    if not base or (at and not inline):
        raise ArgumentError(
            "name", given=repr(name), expected="a name, or name@version", advice="For example torch@1.8.1."
        )
    if inline and version is not None and inline != version:
        raise ArgumentError("version", given=f"{name!r} and version={version!r}", expected="one version")
    found = inline or version
    if found is not None:
        version_key(found)
    return base, found


def version_key(version: str) -> tuple[int, ...]:
    """A version as numbers, for comparing: "2.13.0+cpu" is (2, 13, 0), and a pre-release's tail is ignored.

    Raises:
        ArgumentError: that is no version.

    Example:
        >>> version_key("2.3.0rc1") >= version_key("2.3"), version_key("1.13.0+cpu")
        (True, (1, 13, 0))
    """
    match = _VERSION.fullmatch(version)
    if not match:
        raise ArgumentError("version", given=repr(version), expected="numbers with dots, such as 2.3")
    return tuple(int(part) for part in match.group(1).split("."))
