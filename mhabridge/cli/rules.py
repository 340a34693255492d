"""What people say about a checkpoint, by options and in a rules file, in the form that the library takes."""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mhabridge.errors import ArgumentError, MHABridgeError

if TYPE_CHECKING:
    from mhabridge.spec import MHASpec

_KEYS = ("rename", "drop", "allow_missing", "kinds", "num_heads", "spec")
_LARGEST = 16 << 20  # bytes of a file with rules or specs
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_rules(path: str) -> dict[str, Any]:
    """A rules file: TOML with any of rename, drop, allow_missing, kinds, num_heads and spec.

    Args:
        path: the file. Its spec is a table, or the name of a JSON file beside it.

    Raises:
        ArgumentError: the file cannot be read, or says something else.
    """
    rules = _parsed(path)
    unknown = [key for key in rules if key not in _KEYS]
    if unknown:
        raise ArgumentError(
            f"{path}: {', '.join(unknown)}", given="an unknown key", expected="one of " + ", ".join(_KEYS)
        )
    for key in ("rename", "drop", "allow_missing"):
        if not isinstance(rules.get(key, []), list) or not all(isinstance(one, str) for one in rules.get(key, [])):
            raise ArgumentError(f"{path}: {key}", given=repr(rules[key]), expected="a list of strings")
    kinds, heads = rules.get("kinds", {}), rules.get("num_heads")
    if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
        raise ArgumentError(f"{path}: kinds", given=repr(kinds), expected="a table of kinds by pattern")
    if heads is not None and (not isinstance(heads, int) or isinstance(heads, bool)):
        raise ArgumentError(f"{path}: num_heads", given=repr(heads), expected="a whole number")
    if isinstance(rules.get("spec"), str):
        rules["spec"] = read_spec(str(pathlib.Path(path).parent / rules["spec"]))
    elif "spec" in rules:
        rules["spec"] = _spec_from(rules["spec"], f"{path}: spec")
    return rules


def read_spec(path: str) -> Any:
    """A JSON file with one spec for all attention layers, or with one for each prefix.

    Raises:
        ArgumentError: the file cannot be read, or holds something else.
    """
    from mhabridge.checkpoint.formats.safetensors_header import unique
    from mhabridge.checkpoint.storage import checking

    expected = "a spec as JSON, as MHASpec.to_json gives it"
    text = _text(path, expected)
    try:
        content = checking.json_of(text, object_pairs_hook=unique)
    except ValueError as error:
        raise ArgumentError(path, given=f"no JSON: {error}", expected=expected) from error
    return _spec_from(content, path)


def _spec_from(content: Any, where: str) -> MHASpec | dict[str, MHASpec]:
    from mhabridge.spec import MHASpec

    if not isinstance(content, dict):
        raise ArgumentError(where, given=type(content).__name__, expected="a spec, or specs by prefix")
    try:
        if content and all(isinstance(one, dict) for one in content.values()):
            return {prefix: MHASpec.from_dict(one) for prefix, one in content.items()}
        return MHASpec.from_dict(content)
    except MHABridgeError as error:
        raise ArgumentError(
            f"{where}: {error.subject}", given=error.given, expected=error.expected, advice=error.advice
        ) from error


def _parsed(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = _text(path, "a TOML file with rules")
    try:
        return dict(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            path, given=f"{type(error).__name__}: {error}", expected="a TOML file with rules"
        ) from error


def _text(path: str, expected: str) -> str:
    """What a small file says; nothing else is waited for or read without end (a pipe, a device).

    Raises:
        ArgumentError: it is none.
    """
    from mhabridge.checkpoint.storage import checking

    try:
        with checking.opened(pathlib.Path(path)) as descriptor:
            found = os.pread(descriptor, _LARGEST + 1, 0)
        if len(found) <= _LARGEST:
            return found.decode("utf-8")
        given = f"more than {_LARGEST} bytes"
    except MHABridgeError as error:
        given = error.given
    except ValueError as error:
        given = f"no text in UTF-8: {error}"
    raise ArgumentError(path, given=given, expected=expected)


def kinds_of(texts: Iterable[str]) -> dict[str, str]:
    """Kinds by pattern, from 'PATTERN=KIND'.

    Raises:
        ArgumentError: a text without "=".

    Example:
        >>> kinds_of(["head*=linear", "conv1=grouped_conv2d:4"])
        {'head*': 'linear', 'conv1': 'grouped_conv2d:4'}
    """
    found = {}
    for text in texts:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern or not kind:
            raise ArgumentError("--kind", given=repr(text), expected="PATTERN=KIND, such as 'tokens*=embedding'")
        found[pattern] = kind
    return found


def size_of(text: str) -> int:
    """A number of bytes from a text such as 5GB, 500MB or 1GiB.

    Raises:
        ArgumentError: it is none.

    Example:
        >>> size_of("5GB"), size_of("1.5 KiB")
        (5000000000, 1536)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size <= 0:
        raise ArgumentError("--shard-size", given=repr(text), expected="a size such as 5GB, 500MB or 1GiB")
    return size


def names_of(text: str) -> str | Mapping[str, tuple[int, ...]]:
    """The target's names and shapes: a checkpoint's path as it is, or those of the model that a function makes.

    Args:
        text: a path, or "module.path:function"; modules are also looked for in the working directory.

    Raises:
        ArgumentError: no such function, or it fails, or gives no model.
    """
    module, colon, attribute = text.partition(":")
    if os.path.exists(text) or not colon or not re.fullmatch(r"[\w.]+:[\w.]+", text):
        return text
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made: Any = importlib.import_module(module)
        for name in attribute.split("."):
            made = getattr(made, name)
        model = made()
    except (Exception, SystemExit) as error:  # a function that ends the program made no model
        raise ArgumentError(
            "--names-of",
            given=f"{text}, which raised {type(error).__name__}: {error}",
            expected="a function without arguments that makes the model",
            advice="It is called in this interpreter, so its framework has to be installed here.",
        ) from error
    from mhabridge.checkpoint.loading import names_and_shapes

    return names_and_shapes(model)
